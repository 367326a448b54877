"""Changing a run while it goes on, and sending workers away: what the SDK checks, passes on, repeats and keeps."""

import pytest
from faulty_transport import gone, grad

import kedge
from kedge.client import Client
from kedge.errors import KedgeError
from kedge.retry import Retrier

MEDIAN = kedge.Synchronous(quorum=3, combine="median", timeout_seconds=1.5)
STRICT = kedge.Admission(max_norm=10.0, outlier_factor=4.0, quarantine_after=3, quarantine_seconds=5.0)


class Repeating:
    """Notes the calls of some methods, and loses so many answers."""

    def __init__(self, transport, answers_lost=0):
        self._transport = transport
        self.answers_lost = answers_lost
        self.calls = []

    def __getattr__(self, name):
        return getattr(self._transport, name)

    def update_run(self, run, update, *, request_id):
        return self._noting(("update_run", request_id), self._transport.update_run, run, update, request_id=request_id)

    def evict(self, worker, cause, block_seconds, *, request_id):
        call = ("evict", worker, cause, block_seconds, request_id)
        return self._noting(call, self._transport.evict, worker, cause, block_seconds, request_id=request_id)

    def _noting(self, call, method, *arguments, **options):
        self.calls.append(call)
        answer = method(*arguments, **options)
        if self.answers_lost:
            self.answers_lost -= 1
            raise gone()
        return answer


@pytest.fixture
def repeating(transport):
    return Repeating(transport)


@pytest.fixture
def client(repeating):
    return Client(repeating, Retrier(10.0, wait=lambda _: None))


@pytest.fixture
def held(run, client):
    """The same run over the transport that repeats."""
    return client.get_run("r")


# ------------------------------------------------------------------------------------------- aggregation and admission


def test_run_is_created_with_an_admission_and_keeps_it(client, caplog):
    created = {"params": grad(), "optimizer": kedge.optim.SGD(), "aggregation": MEDIAN}
    assert client.create_run("plain", **created).admission == kedge.Admission()
    assert client.create_run("strict", **created, admission=STRICT).admission == STRICT
    assert client.get_run("strict").admission == STRICT
    assert client.get_run("strict").info().admission == STRICT

    assert client.get_or_create_run("strict", **created, admission=STRICT).admission == STRICT
    assert caplog.text == ""
    assert client.get_or_create_run("strict", **created).admission == STRICT
    assert caplog.text.count("runs/strict exists and keeps its admission: it has Admission(max_norm=10.0") == 1
    assert "its aggregation" not in caplog.text


def test_change_is_the_runs_and_this_objects_own(run, held, worker):
    assert held.set_aggregation(MEDIAN) == 1
    assert held.set_admission(STRICT) == 1
    assert (held.aggregation, held.admission) == (MEDIAN, STRICT)
    assert (run.info().aggregation, run.info().admission) == (MEDIAN, STRICT)
    assert run.aggregation == kedge.Asynchronous()  # as of its opening

    run.set_aggregation(kedge.Asynchronous())
    worker.step(grad())
    assert run.set_admission(kedge.Admission()) == 2  # one step was made: the next is the second


def test_change_whose_answer_is_lost_is_repeated_as_the_same_change(held, repeating):
    repeating.answers_lost = 2
    assert held.set_aggregation(MEDIAN) == 1
    first = repeating.calls[0]
    assert repeating.calls == [first] * 3
    assert first[1]

    held.set_aggregation(MEDIAN)
    assert repeating.calls[-1] != first


@pytest.mark.parametrize("value", ["synchronous", None, kedge.Synchronous, kedge.Admission()])
def test_what_is_no_aggregation_is_refused(run, client, value):
    created = {"params": grad(), "optimizer": kedge.optim.SGD()}
    for call in (
        lambda: run.set_aggregation(value),
        lambda: client.create_run("new", **created, aggregation=value),
        lambda: client.get_or_create_run("r", **created, aggregation=value),
    ):
        with pytest.raises(TypeError, match=r"^aggregation is .*kedge\.Buffered"):
            call()
    assert run.aggregation == run.info().aggregation == kedge.Asynchronous()


@pytest.mark.parametrize("value", [10.0, None, kedge.Admission, kedge.Asynchronous()])
def test_what_is_no_admission_is_refused(run, client, value):
    created = {"params": grad(), "optimizer": kedge.optim.SGD(), "aggregation": kedge.Asynchronous()}
    for call in (
        lambda: run.set_admission(value),
        lambda: client.create_run("new", **created, admission=value),
        lambda: client.get_or_create_run("r", **created, admission=value),
    ):
        with pytest.raises(TypeError, match=r"^admission is .*kedge\.Admission"):
            call()
    assert run.info().admission == kedge.Admission()


def test_refused_change_leaves_what_is_known_of_the_run(run, transport):
    transport.delete_run("runs/r")
    with pytest.raises(KedgeError) as error:
        run.set_aggregation(MEDIAN)
    assert error.value.reason == "RUN_NOT_FOUND"
    assert run.aggregation == kedge.Asynchronous()


# ------------------------------------------------------------------------------------------------------------- eviction


@pytest.mark.parametrize("name", ["a", "runs/r/workers/a"])
def test_worker_is_evicted_by_id_or_name(held, repeating, worker, name):
    held.evict(name, "why", block_seconds=3)

    assert [call[:-1] for call in repeating.calls] == [("evict", "runs/r/workers/a", "why", 3)]
    assert held.status().workers == ()


def test_eviction_whose_answer_is_lost_is_repeated_as_the_same_eviction(run, held, repeating, worker):
    repeating.answers_lost = 2
    held.evict("a")
    first = repeating.calls[0]
    assert repeating.calls == [first] * 3
    assert first[-1]
    assert held.status().workers == ()

    with run.join("a"):
        held.evict("a")
    assert repeating.calls[-1] != first


def test_eviction_whose_answer_is_lost_spares_who_has_joined_since(run, repeating, worker):
    joined = []
    client = Client(repeating, Retrier(10.0, wait=lambda _: joined.append(run.join("a"))))
    repeating.answers_lost = 1
    client.get_run("r").evict("a")

    assert len(repeating.calls) == 2
    with joined[0] as successor:
        assert [status.epoch for status in run.status().workers] == [successor.epoch]


def test_worker_that_holds_no_lease_cannot_be_evicted(held, worker):
    worker.close()
    with pytest.raises(KedgeError) as error:
        held.evict("a")
    assert error.value.reason == "WORKER_NOT_FOUND"


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (("runs/other/workers/a",), {}, ValueError, "^worker is 'runs/other/workers/a': it is none of runs/r"),
        (("runs/r",), {}, KedgeError, "not the name of a worker"),
        (("",), {}, KedgeError, "cannot name a worker"),
        (("a b",), {}, KedgeError, "cannot name a worker"),
        ((7,), {}, TypeError, "^worker is 7"),
        (("a", "x" * 257), {}, ValueError, "^cause has 257 characters: it may have 256"),
        (("a", None), {}, TypeError, "^cause is None"),
        (("a",), {"block_seconds": 0}, ValueError, "^block_seconds is 0"),
        (("a",), {"block_seconds": -1.0}, ValueError, "^block_seconds is -1.0"),
        (("a",), {"block_seconds": float("nan")}, ValueError, "^block_seconds is nan"),
    ],
)
def test_eviction_that_makes_no_sense_is_refused_here(held, repeating, worker, arguments, options, error, message):
    with pytest.raises(error, match=message):
        held.evict(*arguments, **options)
    assert repeating.calls == []
    assert [status.name for status in held.status().workers] == [worker.name]


# ------------------------------------------------------------------------------------------------------------- watching


def test_watch_tells_what_happens_from_the_call_on(run, worker):
    with run.watch() as events:
        worker.step(grad(), loss=0.5)
        run.set_aggregation(kedge.Buffered(size=2))
        run.evict("a", "why")
        seen = [next(events) for _ in range(3)]
    assert [(event.kind, event.step) for event in seen] == [("step", 1), ("aggregation_changed", 1), ("evicted", 1)]
    assert (seen[0].loss, seen[0].contribution_count) == (0.5, 1)
    assert seen[1].aggregation == kedge.Buffered(size=2)
    assert (seen[2].worker, seen[2].epoch, seen[2].reason) == (worker.name, worker.epoch, "WORKER_EVICTED")


def test_watch_begins_where_it_is_told_to(run, worker):
    for _ in range(3):
        worker.step(grad())
    with run.watch(from_step=2) as events:
        first, second = next(events), next(events)
    assert [(event.kind, event.step) for event in (first, second)] == [("step", 2), ("step", 3)]
    with run.watch(after_number=first.number) as events:
        assert next(events) == second


@pytest.mark.parametrize("name", ["from_step", "after_number"])
def test_beginning_that_is_no_number_is_refused(run, name):
    for value in (-1, 1 << 63):
        with pytest.raises(ValueError, match=f"^{name} is {value}"):
            run.watch(**{name: value})
    with pytest.raises(TypeError, match=f"^{name} is 1.5"):
        run.watch(**{name: 1.5})


def test_two_beginnings_are_refused(run):
    with pytest.raises(ValueError, match="both given"):
        run.watch(from_step=0, after_number=0)
