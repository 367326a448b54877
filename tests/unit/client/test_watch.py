"""A watch whose connections break. Its streams are scripted: each a list of numbers of events, and how it ends."""

import threading
from datetime import UTC, datetime
from queue import SimpleQueue

import pytest
from faulty_transport import Time, gone

from kedge.errors import KedgeError
from kedge.retry import Retrier
from kedge.transport import Event, WatchStart
from kedge.watch import Watch

NOW = WatchStart()


def event(number):
    return Event(number=number, time=datetime(2026, 1, 1, tzinfo=UTC), kind="step", step=number)


class Stream:
    """Gives the events of these numbers, and raises what stands between them."""

    last_number = 0

    def __init__(self, *script, server_generation=7):
        self._script = list(script)
        self.server_generation = server_generation
        self.is_closed = False

    def __iter__(self):
        return self

    def __next__(self):
        if self.is_closed:
            raise gone("CANCELLED")
        item = self._script.pop(0)
        if isinstance(item, KedgeError):
            raise item
        return event(item)

    def close(self):
        self.is_closed = True


class Endless(Stream):
    """Waits for an event that does not come, until it is closed."""

    def __init__(self):
        super().__init__()
        self.waits = threading.Event()
        self._closed = SimpleQueue()

    def __next__(self):
        self.waits.set()
        self._closed.get(timeout=30)
        raise gone("CANCELLED")

    def close(self):
        super().close()
        self._closed.put(None)


class Server:
    """Opens the streams of a script, one after the other; an error there is that of an opening that fails."""

    def __init__(self, *streams):
        self._left = list(streams)
        self.streams = [stream for stream in streams if isinstance(stream, Stream)]
        self.starts = []

    def watch(self, run, start):
        assert run == "runs/r"
        self.starts.append(start)
        stream = self._left.pop(0)
        if isinstance(stream, KedgeError):
            raise stream
        return stream


@pytest.fixture
def time():
    return Time()


@pytest.fixture
def retrier(time):
    return Retrier(10.0, clock=time, wait=time.wait, jitter=lambda: 1.0)


def numbers(watch, count):
    return [next(watch).number for _ in range(count)]


def test_broken_connection_goes_on_after_the_last_event(retrier):
    server = Server(Stream(4, 5, gone()), gone(), Stream(6, gone("SERVER_DRAINING")), Stream(7))
    watch = Watch(server, retrier, "runs/r", WatchStart(from_step=2))

    assert numbers(watch, 4) == [4, 5, 6, 7]
    after = [WatchStart(after_number=number, server_generation=7) for number in (5, 5, 6)]
    assert server.starts == [WatchStart(from_step=2), *after]
    assert [stream.is_closed for stream in server.streams] == [True, True, False]


@pytest.mark.parametrize("start", [NOW, WatchStart(from_step=2), WatchStart(after_number=9)])
def test_connection_that_breaks_before_the_first_event_begins_once_more(retrier, start):
    first = Stream(gone())
    first.last_number = 11
    server = Server(first, Stream(12))

    assert numbers(Watch(server, retrier, "runs/r", start), 1) == [12]
    number = 11 if start == NOW else start.after_number
    again = start if number is None else WatchStart(after_number=number, server_generation=7)
    assert server.starts == [start, again]


def test_server_that_was_started_anew_is_told_of_which_one_the_last_event_was(retrier):
    first = Stream(4, 5, gone(), server_generation=1)
    second = Stream(1, gone(), server_generation=2)
    server = Server(first, second, Stream(2, server_generation=2))
    watch = Watch(server, retrier, "runs/r", NOW)

    assert numbers(watch, 4) == [4, 5, 1, 2]
    assert server.starts[1:] == [
        WatchStart(after_number=5, server_generation=1),
        WatchStart(after_number=1, server_generation=2),
    ]


def test_break_is_waited_after_as_the_server_asks(retrier, time):
    stalled = KedgeError("READER_STALLED", "read faster", retry_after_seconds=3.0)
    watch = Watch(Server(Stream(stalled), Stream(1)), retrier, "runs/r", NOW)

    assert numbers(watch, 1) == [1]
    assert time.now == 3.0


def test_breaks_far_apart_are_each_ridden_through(retrier, time):
    server = Server(*[Stream(number, gone()) for number in range(1, 6)], Stream(6))
    watch = Watch(server, retrier, "runs/r", NOW)
    for number in range(1, 7):
        assert next(watch).number == number
        time.now += 3600


def test_server_that_stays_away_ends_the_watch_with_its_error(retrier, time):
    watch = Watch(Server(Stream(1, gone()), *[gone()] * 1000), retrier, "runs/r", NOW)
    assert next(watch).number == 1

    with pytest.raises(KedgeError) as error:
        next(watch)
    assert error.value.reason == "SERVER_UNAVAILABLE"
    assert time.now == pytest.approx(10.0)


@pytest.mark.parametrize("reason", ["RUN_NOT_FOUND", "CANCELLED", "INTERNAL"])
def test_what_will_not_get_better_ends_the_watch_at_once(retrier, reason):
    server = Server(Stream(1, gone(reason)))
    watch = Watch(server, retrier, "runs/r", NOW)
    assert next(watch).number == 1

    with pytest.raises(KedgeError) as error:
        next(watch)
    assert error.value.reason == reason
    assert len(server.starts) == 1


def test_opening_that_fails_is_repeated_or_raised(retrier):
    full = KedgeError("TOO_MANY_STREAMS", "later", retry_after_seconds=0.5)
    assert numbers(Watch(Server(full, full, Stream(3)), retrier, "runs/r", NOW), 1) == [3]

    with pytest.raises(KedgeError) as error:
        Watch(Server(gone("RUN_NOT_FOUND")), retrier, "runs/r", NOW)
    assert error.value.reason == "RUN_NOT_FOUND"


def test_closing_ends_the_iteration_and_the_stream(retrier):
    server = Server(Stream(1, 2, 3))
    with Watch(server, retrier, "runs/r", NOW) as watch:
        assert next(watch).number == 1
    watch.close()

    assert list(watch) == []
    assert server.streams[0].is_closed


def test_closing_ends_an_iteration_that_waits(retrier, in_background):
    stream = Endless()
    watch = Watch(Server(stream), retrier, "runs/r", NOW)
    rest = in_background(list, watch)
    assert stream.waits.wait(30)
    watch.close()
    assert rest.result(30) == []


def test_closing_while_the_server_is_away_ends_the_iteration(time):
    server = Server(Stream(gone()), *[gone()] * 1000)

    def wait(_):
        if len(server.starts) == 3:
            watch.close()

    watch = Watch(server, Retrier(10.0, clock=time, wait=wait), "runs/r", NOW)
    assert list(watch) == []
    assert len(server.starts) == 3


def test_stream_that_opens_as_the_watch_is_closed_is_closed_too(retrier):
    late = Stream(2)

    class Closing(Server):
        def watch(self, run, start):
            stream = super().watch(run, start)
            if stream is late:
                watch.close()
            return stream

    watch = Watch(Closing(Stream(1, gone()), late), retrier, "runs/r", NOW)
    assert [event.number for event in watch] == [1]
    assert late.is_closed


def test_closed_client_ends_the_watch_with_an_error(time):
    retrier = Retrier(10.0, clock=time, wait=time.wait)
    watch = Watch(Server(Stream(gone())), retrier, "runs/r", NOW)
    retrier.close()

    with pytest.raises(KedgeError) as error:
        next(watch)
    assert error.value.reason == "CANCELLED"
