"""What happened to a run, in order: the last events as they were, of the older ones how many of each kind."""

from bisect import bisect_left
from collections import Counter
from datetime import UTC, datetime
from typing import Any

from kedge.transport import Event
from kedge.transport.values import EventKind

EVENTS_KEPT = 4096
"""Older events are only counted."""


class EventLog:
    """The events of one run."""

    def __init__(self) -> None:
        self._kept: list[Event] = []
        self._gone: list[EventKind] = []
        self._last_gone_step = -1

    @property
    def last_number(self) -> int:
        """The number of the last event; 0 before the first."""
        return len(self._gone) + len(self._kept)

    def add(self, kind: EventKind, step: int, **fields: Any) -> None:
        """Takes the next event."""
        number = self.last_number + 1
        self._kept.append(Event(number=number, time=datetime.now(UTC), kind=kind, step=step, **fields))
        if len(self._kept) > EVENTS_KEPT:
            gone = self._kept.pop(0)
            self._gone.append(gone.kind)
            self._last_gone_step = gone.step

    def next_after(self, number: int, from_step: int) -> Event | None:
        """The next event for who has seen those up to a number, and wants those of a step and later ones.

        Returns:
            The event; a summary, if wanted ones are no longer kept; None, if there is nothing to tell yet.
        """
        gone = len(self._gone)
        if number < gone and self._last_gone_step >= from_step:
            counts: Counter[str] = Counter(self._gone[number:])
            now = datetime.now(UTC)
            return Event(number=gone, time=now, kind="summary", step=self._last_gone_step, skipped_counts=counts)
        index = max(number - gone, bisect_left(self._kept, from_step, key=lambda event: event.step))
        return self._kept[index] if index < len(self._kept) else None
