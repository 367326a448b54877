"""What happens to a run, in order: the last events are kept, and whoever reads them has a place of its own.

Nothing grows with the number of readers or with how slowly they read: a reader who falls behind gets a summary.
"""

from collections import Counter, deque
from collections.abc import Mapping
from itertools import islice
from types import MappingProxyType
from typing import Literal, NamedTuple, Protocol

from kedge.policies import Policy

EventKind = Literal[
    "step",
    "lookahead_sync",
    "joined",
    "left",
    "evicted",
    "rejected",
    "aggregation_changed",
    "waiting",
    "summary",
    "checkpoint",
    "recovered",
    "restored",
]


class Event(NamedTuple):
    """Something that happened."""

    number: int
    """1 for the first, then one more each time."""
    time_seconds: float
    """Seconds since 1970."""
    kind: EventKind
    step: int
    """The applied step then."""
    worker_id: str = ""
    epoch: int = 0
    reason: str = ""
    message: str = ""
    contribution_count: int = 0
    loss: float | None = None
    policy: Policy | None = None
    skipped_counts: Mapping[str, int] = MappingProxyType({})
    checkpoint: str = ""
    """Its name."""


class Tell(Protocol):
    """Who hears of what happens."""

    def __call__(
        self,
        kind: EventKind,
        *,
        worker_id: str = "",
        epoch: int = 0,
        reason: str = "",
        message: str = "",
        contribution_count: int = 0,
        loss: float | None = None,
        policy: Policy | None = None,
    ) -> None:
        """Something happened."""


class EventLog:
    """The events of one run.

    Args:
        kept_count: how many of the last ones are kept.
    """

    def __init__(self, kept_count: int) -> None:
        self._kept: deque[Event] = deque()
        self._kept_count = kept_count
        self._gone_counts: Counter[str] = Counter()
        self.gone_step = -1
        """The step of the last event that is no longer kept."""
        self.last_number = 0

    def record(self, event: Event) -> None:
        """Takes the next event; the oldest beyond what is kept is only counted from then on."""
        assert event.number == self.last_number + 1, "events are numbered without a gap"
        self.last_number = event.number
        self._kept.append(event)
        if len(self._kept) > self._kept_count:
            gone = self._kept.popleft()
            self._gone_counts[gone.kind] += 1
            self.gone_step = gone.step

    def read_from_now(self) -> "Reader":
        """A reader of what happens from now on."""
        return self.read_after(self.last_number)

    def read_from_step(self, step: int) -> "Reader":
        """A reader of the events of this step, which may be yet to come, and of those that follow."""
        if step <= self.gone_step:
            return Reader(self, 1, Counter())
        number = next((event.number for event in self._kept if event.step >= step), self.last_number + 1)
        return self.read_after(number - 1, from_step=step)

    def read_after(self, number: int, *, from_step: int = 0) -> "Reader":
        """A reader of the events after that of a number, and not before those of a step."""
        following = min(number, self.last_number) + 1
        seen_count = following - self.first_number
        if seen_count < 0:
            return Reader(self, following, Counter() if number == 0 else None)
        seen = self.gone_counts
        seen.update(event.kind for event in islice(self._kept, seen_count))
        return Reader(self, following, seen, from_step=from_step)

    @property
    def first_number(self) -> int:
        """The number of the oldest event that is kept."""
        return self.last_number - len(self._kept) + 1

    @property
    def gone_counts(self) -> Counter[str]:
        """The events that are no longer kept, by kind."""
        return self._gone_counts.copy()

    def kept_from(self, number: int, limit: int) -> list[Event]:
        """At most so many events, from this number on."""
        begin = number - self.first_number
        return list(islice(self._kept, begin, begin + limit))


class Reader:
    """A place in a log.

    Args:
        log: the events.
        next_number: the first one that is wanted.
        seen_counts: the events before it, by kind; None if that is no longer known.
        from_step: events of an earlier step are passed over.
    """

    def __init__(
        self, log: EventLog, next_number: int, seen_counts: Counter[str] | None, *, from_step: int = 0
    ) -> None:
        self._log = log
        self._next_number = next_number
        self._seen_counts = seen_counts
        self._from_step = from_step

    @property
    def last_number(self) -> int:
        """The number of the event before the next one."""
        return self._next_number - 1

    def take(self, limit: int) -> list[Event]:
        """The next events, at most so many; none if there are none yet. A summary stands for those that are gone."""
        events = self._skip_gone() if self._next_number < self._log.first_number else []
        while len(events) < limit and (kept := self._take_kept(limit - len(events))):
            events += [event for event in kept if event.step >= self._from_step]
        return events

    def _take_kept(self, limit: int) -> list[Event]:
        kept = self._log.kept_from(self._next_number, limit)
        self._next_number += len(kept)
        if self._seen_counts is not None:
            self._seen_counts.update(event.kind for event in kept)
        return kept

    def _skip_gone(self) -> list[Event]:
        first = self._log.kept_from(self._log.first_number, 1)[0]
        gone, seen = self._log.gone_counts, self._seen_counts
        skipped_count = first.number - self._next_number
        self._next_number, self._seen_counts = first.number, gone
        if self._log.gone_step < self._from_step:
            return []
        summary = Event(
            number=first.number - 1,
            time_seconds=first.time_seconds,
            kind="summary",
            step=first.step,
            message=f"{skipped_count} events were left out",
            skipped_counts={"unspecified": skipped_count} if seen is None else dict(gone - seen),
        )
        return [summary]
