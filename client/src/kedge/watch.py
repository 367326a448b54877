"""Watching a run: its events in order, through connections that break."""

import threading
from types import TracebackType
from typing import Self

from kedge.retry import Retrier
from kedge.transport import Event, Transport, WatchStart
from kedge.transport import Watch as Stream
from kedge.wire.errors import KedgeError


class Watch:
    """The events of a run as they come. `Run.watch` makes it; iterate over it from one thread.

    A connection that breaks is made anew, as long and as often as the client's `retry_seconds` allow, and the events go
    on where they were.

    Raises:
        KedgeError: while iterating: RUN_NOT_FOUND once the run is deleted, SERVER_UNAVAILABLE, CANCELLED once the
            client is closed. After `close` the iteration just ends.
    """

    def __init__(self, transport: Transport, retrier: Retrier, run: str, start: WatchStart) -> None:
        self._transport = transport
        self._retrier = retrier
        self._run = run
        self._start = start
        self._lock = threading.Lock()
        self._is_closed = False
        self._stream: Stream = retrier.call(self._open)
        if start == WatchStart():
            self._go_on_after(self._stream.last_number)
        elif start.after_number is not None:
            self._go_on_after(start.after_number)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Event:
        try:
            event = self._next_event()
        except KedgeError:
            if self._is_closed:
                raise StopIteration from None
            raise
        self._go_on_after(event.number)
        return event

    def close(self) -> None:
        """Ends the iteration, also one that waits for an event. From any thread; may be called twice.

        An iteration that is just waiting for a lost server ends with its next attempt to reach it.
        """
        with self._lock:
            self._is_closed = True
            self._stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<kedge.Watch {self._run}>"

    def _go_on_after(self, number: int) -> None:
        """Has another stream begin after this event, or with the first one of a server that was started anew."""
        self._start = WatchStart(after_number=number, server_generation=self._stream.server_generation)

    def _next_event(self) -> Event:
        while True:
            self._check_open()
            try:
                return next(self._stream)
            except KedgeError as error:
                self._reopen_after(error)

    def _reopen_after(self, error: KedgeError) -> None:
        """Opens another stream, if what failed so may be repeated.

        Raises:
            KedgeError: `error`, if not; that of the last attempt; CANCELLED after `close`.
        """
        failures = [error]

        def attempt() -> None:
            self._check_open()
            if failures:
                raise failures.pop()  # so that the retrier judges it, and waits, as if it had made that call
            self._replace(self._open())

        self._retrier.call(attempt)

    def _open(self) -> Stream:
        return self._transport.watch(self._run, self._start)

    def _replace(self, stream: Stream) -> None:
        with self._lock:
            self._stream.close()
            self._stream = stream
            if self._is_closed:
                stream.close()

    def _check_open(self) -> None:
        if self._is_closed:
            raise KedgeError("CANCELLED", "the watch was closed: call Run.watch for another")
