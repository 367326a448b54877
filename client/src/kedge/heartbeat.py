"""The heartbeats of a lease: a daemon thread that knows the lease, not the worker, so that a forgotten worker ends."""

import logging
import threading
from collections.abc import Callable

from kedge.transport import Lease, Transport
from kedge.wire.errors import KedgeError, Retry

_RETRY_SECONDS = 1.0
_SHORTEST_INTERVAL_SECONDS = 0.05

_logger = logging.getLogger("kedge")


def start_heartbeats(transport: Transport, lease: Lease) -> Callable[[], None]:
    """Renews a lease every third of it until the function returned is called, or the lease is lost."""
    stopped = threading.Event()
    thread = threading.Thread(
        target=_beat, args=(transport, lease, stopped), name=f"kedge heartbeat {lease.worker}", daemon=True
    )
    thread.start()
    return stopped.set


def _beat(transport: Transport, lease: Lease, stopped: threading.Event) -> None:
    interval = max(lease.lease_seconds / 3, _SHORTEST_INTERVAL_SECONDS)
    delay = interval
    while not stopped.wait(delay):
        try:
            transport.heartbeat(lease)
            delay = interval
        except KedgeError as error:
            if stopped.is_set() or _is_final(error):
                _report(error, lease, stopped)
                return
            delay = min(interval, _RETRY_SECONDS)


def _is_final(error: KedgeError) -> bool:
    # A lost lease is taken again by the worker's next push, from its own thread.
    return error.entry.retry is Retry.REJOIN or error.reason in ("WORKER_SUPERSEDED", "RUN_NOT_FOUND", "CANCELLED")


def _report(error: KedgeError, lease: Lease, stopped: threading.Event) -> None:
    if not stopped.is_set() and error.reason != "CANCELLED":
        _logger.warning("%s: no more heartbeats: %s", lease.worker, error)
