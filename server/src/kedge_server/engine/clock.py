"""Time, injected: the engine reads it and is woken by it only through here."""

import asyncio
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
