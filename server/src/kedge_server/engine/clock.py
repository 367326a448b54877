"""Time, injected: the engine reads it and is woken by it only through here."""

import asyncio
import math
import time
from collections.abc import Callable
from typing import Protocol


class Clock(Protocol):
    """A monotonic clock that can call back."""

    def now(self) -> float:
        """Seconds since some fixed moment."""
        ...

    def call_at(self, at_seconds: float, callback: Callable[[], None]) -> Callable[[], None]:
        """Calls back at a moment; returns what cancels it."""
        ...


class LoopClock:
    """The machine's monotonic clock and the running loop's timers."""

    def now(self) -> float:
        """Seconds since some fixed moment."""
        return time.monotonic()

    def call_at(self, at_seconds: float, callback: Callable[[], None]) -> Callable[[], None]:
        """Calls back on the loop at a moment; returns what cancels it."""
        delay = max(0.0, at_seconds - self.now())
        return asyncio.get_running_loop().call_later(delay, callback).cancel


class Alarm:
    """Calls back at a moment that may be moved. Moving it on costs nothing: it looks again when it would have called.

    Args:
        clock: the time.
        callback: what it calls.
    """

    def __init__(self, clock: Clock, callback: Callable[[], None]) -> None:
        self._clock = clock
        self._callback = callback
        self._at_seconds: float | None = None
        self._looks_at_seconds = math.inf
        self._cancel: Callable[[], None] = lambda: None

    def set(self, at_seconds: float | None) -> None:
        """Moves it; None: it does not call."""
        self._at_seconds = at_seconds
        if at_seconds is None:
            self._look_at(math.inf)
        elif at_seconds < self._looks_at_seconds:
            self._look_at(at_seconds)

    def _look_at(self, at_seconds: float) -> None:
        self._cancel()
        self._looks_at_seconds, self._cancel = at_seconds, lambda: None
        if at_seconds < math.inf:
            self._cancel = self._clock.call_at(at_seconds, self._look)

    def _look(self) -> None:
        looked_at, self._looks_at_seconds = self._looks_at_seconds, math.inf
        if self._at_seconds is not None and self._at_seconds > looked_at:
            self._look_at(self._at_seconds)
        else:
            self._at_seconds = None
            self._callback()
