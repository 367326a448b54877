"""The heartbeats of a lease: a daemon thread that knows the lease, not the worker, so that a forgotten worker ends."""

import contextlib
import logging
import threading
import time
from collections.abc import Callable

from kedge.transport import Lease, Transport
from kedge.wire.errors import KedgeError, Retry
from kedge.wire.names import parse_worker

_RETRY_SECONDS = 1.0
_SHORTEST_INTERVAL_SECONDS = 0.05
_LONGEST_INTERVAL_SECONDS = 3.0  # whatever the lease: it is by heartbeats that lost connections are noticed

_PATIENCE_SECONDS = 10.0
_REMINDER_SECONDS = 60.0

_FINAL = frozenset({"WORKER_SUPERSEDED", "WORKER_EVICTED", "RUN_NOT_FOUND", "CANCELLED"})

_logger = logging.getLogger("kedge")


class Waiting:
    """Whether the worker waits for its round; a `with` block around the wait. The heartbeats say so when it is long."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began_at: float | None = None
        self._report_at = 0.0

    def __enter__(self) -> None:
        self._began_at = self._clock()
        self._report_at = self._began_at + _PATIENCE_SECONDS

    def __exit__(self, *_: object) -> None:
        self._began_at = None

    def overdue_seconds(self) -> float | None:
        """How long it has lasted, when that is to be said: after ten seconds, and then once a minute."""
        began_at, now = self._began_at, self._clock()
        if began_at is None or now < self._report_at:
            return None
        self._report_at = now + _REMINDER_SECONDS
        return now - began_at


def start_heartbeats(transport: Transport, lease: Lease, waiting: Waiting) -> Callable[[], None]:
    """Renews a lease every third of it, or every 3 s, until the function returned is called or the lease is lost."""
    stopped = threading.Event()
    thread = threading.Thread(
        target=_beat, args=(transport, lease, waiting, stopped), name=f"kedge heartbeat {lease.worker}", daemon=True
    )
    thread.start()
    return stopped.set


def _beat(transport: Transport, lease: Lease, waiting: Waiting, stopped: threading.Event) -> None:
    interval = min(max(lease.lease_seconds / 3, _SHORTEST_INTERVAL_SECONDS), _LONGEST_INTERVAL_SECONDS)
    delay = interval
    while not stopped.wait(delay):
        try:
            transport.heartbeat(lease)
            _remind_when_overdue(transport, lease, waiting)
            delay = interval
        except KedgeError as error:
            if stopped.is_set() or _is_final(error):
                _report(error, lease, stopped)
                return
            delay = min(interval, _RETRY_SECONDS)


def _remind_when_overdue(transport: Transport, lease: Lease, waiting: Waiting) -> None:
    seconds = waiting.overdue_seconds()
    if seconds is not None:  # in a thread of its own: the next heartbeat does not wait for the answer
        threading.Thread(target=_remind, args=(transport, lease, seconds), daemon=True).start()


def _remind(transport: Transport, lease: Lease, seconds: float) -> None:
    with contextlib.suppress(KedgeError):
        status = transport.get_run(parse_worker(lease.worker).run, with_manifest=False).status
        if status.waiting_for:
            _logger.warning("%s has waited for %.0f s: for %s", lease.worker, seconds, status.waiting_for)


def is_lease_lost(error: KedgeError) -> bool:
    """Whether the lease has ended, and the worker may take another."""
    return error.entry.retry is Retry.REJOIN or error.reason == "EPOCH_FORGOTTEN"


def _is_final(error: KedgeError) -> bool:
    # A lost lease is taken again by the worker's next push, from its own thread.
    return is_lease_lost(error) or error.reason in _FINAL


def _report(error: KedgeError, lease: Lease, stopped: threading.Event) -> None:
    if not stopped.is_set() and error.reason != "CANCELLED":
        _logger.warning("%s: no more heartbeats: %s", lease.worker, error)
