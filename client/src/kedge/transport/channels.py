"""The connections to a server: one for most calls, and one for heartbeats, by which lost connections are noticed.

A middlebox may forget a connection without a word, and gRPC waits for a minute before it gives such a one up. It cannot
wait less long, since on a slow link its pings queue behind the data. Heartbeats on a connection of their own queue
behind nothing: one that is not answered while the next one is says that connections were lost, and the main one may be
among them. A connection that is lost stays silent for ever; so one that is given up is replaced, not mended.
"""

import logging
import threading
import time
import weakref
from collections.abc import Callable

import grpc

from kedge.transport.credentials import Credentials, Metadata
from kedge.wire.errors import KedgeError

QUIET_SECONDS = 5.0
"""How long nothing has moved on a main connection that is replaced. Chunks of 1 MiB at 200 kB/s are 5 s apart."""

LONGEST_QUIET_SECONDS = 60.0
"""The same where one replacement after the other brought nothing. gRPC itself gives a silent connection up by then."""

FRESH_SECONDS = 6.0
"""How long a new connection for heartbeats has for its first answer. A far server needs three round trips for it."""

_logger = logging.getLogger("kedge")


class Connection:
    """A channel, and when something last moved on it. `sent` and `heard` may be called from any thread.

    Args:
        channel: shares its connection with no other.
        clock: seconds that only grow.
        metadata: what goes along with each call.

    Attributes:
        channel: as given.
        metadata: as given.
        is_retired: whether credentials have changed since it was made. What is under way on it goes on.
        made_at: the clock's time.
        moved_at: when a message was last sent or received; `made_at` before the first.
        heard_at: when one was last received; None before the first.
    """

    def __init__(self, channel: grpc.Channel, clock: Callable[[], float], metadata: Metadata = None) -> None:
        self._clock = clock
        self.channel = channel
        self.metadata = metadata
        self.is_retired = False
        self.made_at = self.moved_at = clock()
        self.heard_at: float | None = None

    def sent(self) -> None:
        """A message is on its way, as far as gRPC knows: the connection may live."""
        self.moved_at = self._clock()

    def heard(self) -> None:
        """A message came: the connection lives."""
        self.moved_at = self.heard_at = self._clock()


class Channels:
    """Makes the connections to a server, and replaces those that were lost. Thread-safe: a client's workers share it.

    A heartbeat that is not answered begins a doubt. It ends when something is heard on the main connection, or when
    that is replaced: once, as soon as a heartbeat is answered and nothing has moved for a while. So a server that is
    away for long costs no main connection, and neither does a slow link whose upload goes on.

    When credentials have changed there are other connections for what comes. The ones of before end with the last of
    their calls.

    Args:
        make: makes a channel, with the credentials of now, that shares its connection with no other.
        credentials: of the calls.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        make: Callable[[], grpc.Channel],
        *,
        credentials: Credentials | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._make = make
        self._credentials = credentials or Credentials()
        self._clock = clock
        self._changing = threading.Lock()
        self._retired: weakref.WeakSet[Connection] = weakref.WeakSet()
        self._main = self._connect()
        self._beats: Connection | None = None
        self._doubted_at: float | None = None
        self._patience_seconds = QUIET_SECONDS
        self._is_closed = False

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return self._is_closed

    @property
    def main(self) -> Connection:
        """The connection of all calls but heartbeats, as of now: ask for it at each call."""
        self._look()
        return self._main

    @property
    def unhindered(self) -> Connection:
        """One where a small call waits behind no upload, if there is one: `for_beats` makes it."""
        return self._beats or self._main

    def for_beats(self) -> Connection:
        """The connection for heartbeats. Joining makes it: only one that was there can tell that it was lost."""
        self._look()
        with self._changing:
            if self._beats is None:
                if self._is_closed:
                    return self._main  # which is closed, and says so
                self._beats = self._connect()
            return self._beats

    def is_outdated(self, connection: Connection, *, at_once: bool = False) -> bool:
        """Whether credentials have changed since a connection was made.

        Args:
            connection: one of these.
            at_once: look now, however lately it was looked.
        """
        self._look(at_once=at_once)
        return connection.is_retired

    def beat(self, call: Callable[[Connection], object]) -> None:
        """Makes one call on the connection for heartbeats, and draws its conclusions.

        Args:
            call: sends a heartbeat; it says SERVER_UNAVAILABLE where that is not answered in time.

        Raises:
            KedgeError: what `call` raises.
        """
        beats = self.for_beats()
        try:
            call(beats)
        except KedgeError as error:
            if error.reason in ("SERVER_UNAVAILABLE", "TLS_FAILED"):
                self._doubt(beats)
            else:
                self._settle(beats, is_last=True)
            raise
        self._settle(beats, is_last=False)

    def close(self) -> None:
        """Ends every call and the connections. May be called twice."""
        with self._changing:
            self._is_closed = True
            ended = [self._main, *([self._beats] if self._beats else []), *self._retired]
        for connection in ended:
            connection.channel.close()

    def _connect(self) -> Connection:
        return Connection(self._make(), self._clock, self._credentials.metadata)

    def _look(self, *, at_once: bool = False) -> None:
        """Makes other connections if credentials have changed."""
        with self._changing:
            if self._is_closed or not self._credentials.have_changed(at_once=at_once):
                return
            for connection in filter(None, (self._main, self._beats)):
                connection.is_retired = True
                self._retired.add(connection)
            self._main = self._connect()
            if self._beats is not None:
                self._beats = self._connect()
            self._doubted_at = None

    def _doubt(self, beats: Connection) -> None:
        """Notes that a heartbeat on this connection was not answered, and replaces it."""
        with self._changing:
            if self._is_closed or beats is not self._beats:
                return  # another worker's heartbeat has ended this connection, and this one with it
            now = self._doubted_at = self._clock()
            if beats.heard_at is None and now - beats.made_at < FRESH_SECONDS:
                return
            self._beats = self._connect()
        beats.channel.close()

    def _settle(self, beats: Connection, *, is_last: bool) -> None:
        """Replaces the main connection if it is in doubt and silent; called when a heartbeat was answered.

        Args:
            beats: where it was.
            is_last: the heartbeat was refused. There may be none after it to ask again, and who is no longer a worker
                has no upload to lose.
        """
        beats.heard()
        with self._changing:
            main = self._main
            if self._was_heard_in_doubt(main):
                self._doubted_at = None
            if self._is_closed or self._doubted_at is None:
                return
            patience = QUIET_SECONDS if main.heard_at is not None else self._patience_seconds
            if not is_last and self._clock() - main.moved_at < patience:
                return
            self._doubted_at = None
            self._patience_seconds = min(2 * patience, LONGEST_QUIET_SECONDS)
            self._main = self._connect()
        _logger.info("a heartbeat was lost, and nothing moves on the connection to the server: making another")
        main.channel.close()

    def _was_heard_in_doubt(self, main: Connection) -> bool:
        return self._doubted_at is not None and main.heard_at is not None and main.heard_at > self._doubted_at
