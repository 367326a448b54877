"""Watching a run of the fake server."""

from typing import Protocol

from kedge.testing.run import FakeRun
from kedge.transport import Event

SERVER_GENERATION = 1
"""A fake server is started once."""


class Source(Protocol):
    """Where a watch has its events from."""

    def next_event(self, watch: "FakeWatch") -> Event:
        """What it is to be told next; blocks until there is something."""
        ...


class FakeWatch:
    """A `kedge.transport.Watch`. It keeps no events, only how far it has got.

    Attributes:
        run: what is watched.
        last_number: that of the last event before those that it tells.
        seen_number: that of the last event told.
        from_step: events of earlier steps are not told.
        is_closed: whether it has ended.
        server_generation: that of the server.
    """

    server_generation = SERVER_GENERATION

    def __init__(self, source: Source, run: FakeRun, seen_number: int, from_step: int) -> None:
        self._source = source
        self.run = run
        self.last_number = seen_number
        self.seen_number = seen_number
        self.from_step = from_step
        self.is_closed = False

    def __iter__(self) -> "FakeWatch":
        return self

    def __next__(self) -> Event:
        """The next event; blocks until there is one.

        Raises:
            KedgeError: CANCELLED after `close`, RUN_NOT_FOUND, SERVER_UNAVAILABLE.
        """
        event = self._source.next_event(self)
        self.seen_number = event.number
        return event

    def close(self) -> None:
        """Ends it; may be called twice."""
        self.is_closed = True  # a call that waits sees it at its next look
