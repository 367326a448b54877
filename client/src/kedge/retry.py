"""Repeating calls that may succeed later: which may be repeated the catalogue says, when and how often is here."""

import logging
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from kedge.wire.errors import KedgeError, Retry

FIRST_DELAY_SECONDS = 0.1
MAX_DELAY_SECONDS = 5.0

_logger = logging.getLogger("kedge")
T = TypeVar("T")


class Retrier:
    """Makes calls, and makes them again with exponential backoff and full jitter as long as that may help.

    Thread-safe: a client, its runs and its workers share one.

    Args:
        retry_seconds: how long to go on after the first failure of a call.
        clock: seconds that only grow.
        wait: sleeps for some seconds; None sleeps until `close` at most.
        jitter: a number in [0, 1] each time.
    """

    def __init__(
        self,
        retry_seconds: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        wait: Callable[[float], object] | None = None,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._retry_seconds = retry_seconds
        self._clock = clock
        self._closed = threading.Event()
        self._wait = wait or self._closed.wait
        self._jitter = jitter

    def call(self, attempt: Callable[[], T]) -> T:
        """What `attempt` returns; blocks while it is repeated.

        Raises:
            KedgeError: what `attempt` raised last, or CANCELLED after `close`.
        """
        give_up_at: float | None = None
        for delay in self._delays():
            if self._closed.is_set():
                raise KedgeError("CANCELLED", "the client was closed: make another with kedge.connect")
            try:
                return attempt()
            except KedgeError as error:
                if error.entry.retry is not Retry.BACKOFF:
                    raise
                now = self._clock()
                if give_up_at is None and self._retry_seconds > 0:
                    _logger.warning("%s; trying again for %g s", error, self._retry_seconds)
                give_up_at = now + self._retry_seconds if give_up_at is None else give_up_at
                if now >= give_up_at:
                    raise
                _logger.debug("repeating a call after %s", error)
                self._wait(min(max(delay, error.retry_after_seconds or 0.0), give_up_at - now))
        raise AssertionError("the delays never end")

    def close(self) -> None:
        """Ends all waiting, and refuses further calls."""
        self._closed.set()

    def _delays(self) -> Iterator[float]:
        limit = FIRST_DELAY_SECONDS
        while True:
            # At least a tenth, so that a server that refuses at once is not called without pause.
            yield limit * max(self._jitter(), 0.1)
            limit = min(2 * limit, MAX_DELAY_SECONDS)
