"""What happens to a run, for those who watch it and for the log."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

import structlog

from kedge.wire.errors import KedgeError
from kedge_server.core.events import Event, EventKind, EventLog, Reader

_log = structlog.get_logger("kedge.run")

_LOGGED: dict[EventKind, tuple[str, str]] = {
    "joined": ("info", "worker joined"),
    "left": ("info", "worker left"),
    "evicted": ("warning", "lease ended"),
    "aggregation_changed": ("info", "aggregation changed"),
    "waiting": ("info", "waiting for workers"),
    "checkpoint": ("info", "checkpoint complete"),
    "recovered": ("info", "run recovered"),
    "restored": ("warning", "run goes on from a checkpoint"),
}
"""The events that go to the log, too, with level and text: those of membership, which are few."""

_EVENTS_AT_ONCE = 256


class Feed:
    """The events of a run. Belongs to one loop.

    Args:
        run: its name, for the log.
        kept_count: how many of the last ones are kept.
        applied_step: tells the step of the run's weights.
    """

    def __init__(self, run: str, kept_count: int, applied_step: Callable[[], int]) -> None:
        self._run = run
        self._applied_step = applied_step
        self._log = EventLog(kept_count)
        self._happened = asyncio.Event()
        self._end: KedgeError | None = None

    def tell(self, kind: EventKind, **about: Any) -> None:
        """Takes what happened now."""
        number = self._log.last_number + 1
        self._log.record(Event(number, time.time(), kind, self._applied_step(), **about))
        happened, self._happened = self._happened, asyncio.Event()
        happened.set()
        if kind in _LOGGED:
            level, text = _LOGGED[kind]
            getattr(_log, level)(text, run=self._run, **{name: str(value) for name, value in about.items() if value})

    def reader(self, *, from_step: int | None = None, after_number: int | None = None) -> Reader:
        """A place in the events; without a start that of now."""
        if after_number is not None:
            return self._log.read_after(after_number)
        return self._log.read_from_now() if from_step is None else self._log.read_from_step(from_step)

    async def next(self, reader: Reader) -> list[Event]:
        """The next events of a reader, once there are any.

        Raises:
            KedgeError: what `end` was called with.
        """
        while not (events := reader.take(_EVENTS_AT_ONCE)):
            if self._end is not None:
                raise self._end.with_traceback(None)
            await self._happened.wait()
        return events

    def end(self, error: KedgeError) -> None:
        """Ends all watching."""
        self._end = error
        self._happened.set()
