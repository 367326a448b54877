"""Repeating calls that may succeed later: which may be repeated the catalogue says, when and how often is here."""

import logging
import random
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from kedge.wire.errors import KedgeError, Retry

FIRST_DELAY_SECONDS = 0.1
MAX_DELAY_SECONDS = 5.0

AWAY_DELAY_SECONDS = 1.0
"""The longest delay while the server is away, or its disk: what comes back soon is not kept waiting for."""

SILENCE_SECONDS = 60.0
"""An attempt that lasted longer had an answer on its way: a silent connection is given up by then."""

_AWAY = frozenset({"SERVER_UNAVAILABLE", "TLS_FAILED", "SERVER_DRAINING", "STORAGE_FULL", "STORAGE_UNAVAILABLE"})

_logger = logging.getLogger("kedge")
T = TypeVar("T")


class Retrier:
    """Makes calls, and makes them again with exponential backoff and full jitter as long as that may help.

    Thread-safe: a client, its runs and its workers share one.

    Args:
        retry_seconds: how long to go on after the first failure of a call, or the first after a long attempt.
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
        limit = FIRST_DELAY_SECONDS
        is_said = False
        while True:
            if self._closed.is_set():
                raise KedgeError("CANCELLED", "the client was closed: make another with kedge.connect")
            began_at = self._clock()
            try:
                return attempt()
            except KedgeError as error:
                if error.entry.retry is not Retry.BACKOFF:
                    raise
                now = self._clock()
                if give_up_at is None or now - began_at > max(SILENCE_SECONDS, self._retry_seconds):
                    give_up_at, limit, is_said = now + self._retry_seconds, FIRST_DELAY_SECONDS, False
                if not is_said and error.retry_after_seconds != 0:  # what may be repeated at once is in good order
                    self._say(error)
                    is_said = True
                if now >= give_up_at:
                    raise
                _logger.debug("repeating a call after %s", error)
                limit = min(limit, AWAY_DELAY_SECONDS if error.reason in _AWAY else MAX_DELAY_SECONDS)
                self._wait(min(self._delay(limit, error), give_up_at - now))
                limit *= 2

    def close(self) -> None:
        """Ends all waiting, and refuses further calls."""
        self._closed.set()

    def _say(self, error: KedgeError) -> None:
        if self._retry_seconds > 0:
            _logger.warning("%s; trying again for %g s", error, self._retry_seconds)

    def _delay(self, limit: float, error: KedgeError) -> float:
        # At least a tenth, so that a server that refuses at once is not called without pause.
        return max(limit * max(self._jitter(), 0.1), error.retry_after_seconds or 0.0)
