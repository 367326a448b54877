"""What a worker does when the way to the server fails, with the fake server at its other end."""

import gc
import itertools
import threading
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from faulty_transport import FaultyExchange, Time, gone, grad

import kedge
from kedge import testing
from kedge.client import Client
from kedge.errors import KedgeError
from kedge.heartbeat import Waiting, _beat, start_heartbeats
from kedge.retry import Retrier
from kedge.transport import Lease, PushResult
from kedge.wire.policies import admission_from_wire, admission_to_wire, policy_from_wire, policy_to_wire


@pytest.mark.parametrize("fault", ["lost", "unanswered"])
@pytest.mark.parametrize("times", [1, 5])
def test_push_through_a_failing_way_is_applied_once(transport, run, worker, fault, times):
    transport.faults = iter([(fault, gone())] * times)

    assert worker.push(grad()).outcome == "applied"
    assert run.pull()["w"] == [2.0]
    assert set(transport.pushes) == {(worker.epoch, 1)}
    assert len(transport.pushes) == times + 1


def test_step_through_a_failing_way_is_as_if_nothing_had_happened(transport, run, worker):
    transport.faults = itertools.cycle([("unanswered", gone()), ("lost", gone()), (None, None)])

    assert [worker.step(grad())["w"].item() for _ in range(3)] == [2.0, 1.0, 0.0]
    assert run.status().applied_count == 3


def test_stream_that_failed_is_closed_and_another_is_opened(transport, worker):
    transport.faults = iter([("lost", gone())])
    worker.push(grad())

    assert [exchange.is_closed for exchange in transport.exchanges] == [True, False]


def test_error_of_the_server_keeps_the_sequence(transport, worker):
    transport.faults = iter([("lost", gone("BASE_STEP_AHEAD"))])
    with pytest.raises(KedgeError):
        worker.push(grad())

    epoch = worker.epoch
    worker.push(grad())
    assert transport.pushes == [(epoch, 1), (epoch, 1)]


@pytest.mark.parametrize("reason", ["SERVER_UNAVAILABLE", "INTERNAL", "CANCELLED", "FROM_A_NEWER_SERVER"])
@pytest.mark.parametrize("fault", ["lost", "unanswered"])
def test_push_after_one_of_unknown_fate_is_never_taken_for_it(transport, run, worker, fault, reason):
    transport.faults = iter([(fault, gone(reason))] * 1000)
    with pytest.raises(KedgeError):
        worker.push(grad(1))
    transport.faults = iter(())
    lost = 0 if fault == "unanswered" else 1
    epoch = worker.epoch

    assert worker.push(grad(10)).outcome == "applied"
    assert worker.epoch > epoch
    assert run.pull()["w"] == [3 - 1 - 10 + lost]


def test_interrupted_push_is_of_unknown_fate(transport, run, worker):
    transport.faults = iter([("unanswered", KeyboardInterrupt())])
    with pytest.raises(KeyboardInterrupt):
        worker.push(grad(1))

    assert worker.push(grad(10)).outcome == "applied"
    assert run.pull()["w"] == [3 - 1 - 10]


def test_interrupt_after_joining_again_is_of_unknown_fate(transport, run, worker, server_time):
    server_time.now += 1000  # the lease is lost: the first attempt is refused, the second is interrupted
    transport.faults = iter([(None, None), ("unanswered", KeyboardInterrupt())])
    with pytest.raises(KeyboardInterrupt):
        worker.push(grad(1))

    assert worker.push(grad(10)).outcome == "applied"
    assert run.pull()["w"] == [3 - 1 - 10]


def test_step_goes_on_asking_while_its_push_is_deferred(transport, worker, monkeypatch):
    push, answers = FaultyExchange.push, iter(["deferred", "deferred"])

    def deferred_twice(exchange, contribution):
        result, data = push(exchange, contribution)
        return result._replace(outcome=next(answers, result.outcome)), data

    monkeypatch.setattr(FaultyExchange, "push", deferred_twice)
    assert worker.step(grad())["w"] == [2.0]
    assert worker.last_result.outcome == "applied"
    assert transport.pushes == [(worker.epoch, 1)] * 3


def test_heartbeats_go_on_after_one_that_failed():
    beats, came_again = itertools.count(), threading.Event()

    class Flaky:
        def heartbeat(self, lease):
            if next(beats) == 0:
                raise gone()
            came_again.set()

    stop = start_heartbeats(Flaky(), Lease("runs/r/workers/a", 1, 0.15), Waiting())
    assert came_again.wait(10)
    stop()


def test_long_wait_is_said_after_ten_seconds_and_then_once_a_minute():
    time = Time()
    waiting = Waiting(time)
    said = []
    for time.now in range(100):
        if time.now == 5:
            waiting.__enter__()
        if waiting.overdue_seconds() is not None:
            said.append(time.now)
    assert said == [15, 75]
    waiting.__exit__()
    time.now = 1000
    assert waiting.overdue_seconds() is None


def test_heartbeat_says_what_a_worker_waits_for(transport, worker, caplog):
    reminded = threading.Event()

    class Overdue(Waiting):
        def overdue_seconds(self):
            reminded.set()
            return 12.0

    lease = transport.join("runs/r", "b", 0.15)
    info = transport.get_run("runs/r")
    status = info.status._replace(waiting_for="spring") if hasattr(info.status, "_replace") else None
    status = status or replace(info.status, waiting_for="spring")
    transport.get_run = lambda *_, **__: replace(info, status=status)
    stop = start_heartbeats(transport, lease, Overdue())
    assert reminded.wait(10)
    wait_for(lambda: "runs/r/workers/b has waited for 12 s: for spring" in caplog.text)
    stop()


def wait_for(holds):
    pause = threading.Event()
    for _ in range(1000):
        if holds():
            return
        pause.wait(0.01)
    raise AssertionError("it did not come to hold")


@pytest.mark.parametrize("count", [9, 10, 11, 99, 100, 101])
def test_gradients_that_come_too_late_are_reported_now_and_then(worker, caplog, monkeypatch, count):
    stale = PushResult("rejected", "STALE_GRADIENT", 1, 1, "too old")
    for _ in range(count):
        worker._session._report_rejection(stale)
    assert caplog.text.count("came too late") == (count >= 10) + (count >= 100)


def test_loss_of_a_graph_is_detached_and_no_number_is_refused(run, worker):
    class OfAGraph:
        def detach(self):
            return np.float32(0.5)

    worker.push(grad(), loss=OfAGraph())
    assert run.status().loss == 0.5
    for argument in ({"loss": np.zeros(3)}, {"loss": "low"}, {"example_count": 2.0}):
        with pytest.raises(TypeError, match=f"^{next(iter(argument))} is"):
            worker.push(grad(), **argument)


def test_other_aggregation_than_the_runs_own_is_warned_of(transport, caplog):
    client = Client(transport, Retrier(1.0))
    for quorum in (1, 4):
        client.get_or_create_run(
            "s",
            params={"w": np.zeros(1, np.float32)},
            optimizer=kedge.optim.SGD(),
            aggregation=kedge.Synchronous(quorum),
        )
    assert caplog.text.count("keeps its aggregation") == 1
    assert "quorum=4" in caplog.text


def test_what_differs_by_the_rounding_of_the_wire_alone_is_no_other_setting(transport, run, caplog):
    asked = {
        "aggregation": kedge.Synchronous(2, timeout_seconds=1 / 3),
        "admission": kedge.Admission(quarantine_seconds=1 / 3),
    }
    held = {
        "aggregation": policy_from_wire(policy_to_wire(asked["aggregation"])),
        "admission": admission_from_wire(admission_to_wire(asked["admission"])),
    }
    assert held["aggregation"].timeout_seconds == held["admission"].quarantine_seconds == 0.333333333
    info = replace(transport.get_run("runs/r"), **held)
    transport.get_run = lambda *_, **__: info
    client = Client(transport, Retrier(1.0))
    model = {"params": grad(), "optimizer": run.optimizer}

    assert client.get_or_create_run("r", **model, **asked).aggregation == held["aggregation"]
    assert caplog.text == ""
    later = kedge.Synchronous(2, timeout_seconds=0.333333334)
    client.get_or_create_run("r", **model, **(asked | {"aggregation": later}))
    assert caplog.text.count("keeps its") == caplog.text.count("keeps its aggregation") == 1


@pytest.mark.parametrize(
    "address", ["localhost", "http://localhost:50051", "localhost:abc", "localhost:99999", "localhost:0", ":50051"]
)
def test_address_that_cannot_be_one_is_refused_at_once(address):
    with pytest.raises(ValueError, match="write HOST:PORT"):
        kedge.connect(address)


def test_worker_that_was_replaced_after_a_push_of_unknown_fate_does_not_push_out_the_other(transport, run, worker):
    transport.faults = iter([("lost", gone("INTERNAL"))])
    with pytest.raises(KedgeError):
        worker.push(grad())

    with run.join("a") as clone:
        clone.pull()
        with pytest.raises(KedgeError) as error:
            worker.push(grad())
        assert error.value.reason == "WORKER_SUPERSEDED"
        assert clone.push(grad()).outcome == "applied"


@pytest.mark.parametrize("reason", ["LEASE_EXPIRED", "WORKER_NOT_FOUND", "EPOCH_FORGOTTEN"])
def test_lost_lease_is_taken_again_once(transport, run, worker, reason):
    epoch = worker.epoch
    transport.faults = iter([("lost", gone(reason))])
    assert worker.push(grad()).outcome == "applied"
    assert transport.pushes == [(epoch, 1), (worker.epoch, 1)]

    transport.faults = iter([("lost", gone(reason))] * 2)
    with pytest.raises(KedgeError) as error:
        worker.push(grad())
    assert error.value.reason == reason


def test_repetition_under_a_forgotten_epoch_is_not_sent_under_another(transport, run, worker):
    transport.faults = iter([("unanswered", gone()), ("lost", gone("EPOCH_FORGOTTEN"))])
    with pytest.raises(KedgeError) as error:
        worker.push(grad(1))
    assert error.value.reason == "EPOCH_FORGOTTEN"
    assert run.pull()["w"] == [3 - 1]

    epoch = worker.epoch
    assert worker.push(grad(10)).outcome == "applied"
    assert worker.epoch > epoch
    assert run.pull()["w"] == [3 - 1 - 10]


def test_push_after_one_of_unknown_fate_joins_again_where_the_epoch_is_forgotten(transport, run, worker):
    def forgotten(lease):
        raise gone("EPOCH_FORGOTTEN")

    transport.faults = iter([("unanswered", gone("INTERNAL"))])
    with pytest.raises(KedgeError):
        worker.push(grad(1))
    transport.heartbeat, epoch = forgotten, worker.epoch

    assert worker.push(grad(10)).outcome == "applied"
    assert worker.epoch > epoch
    assert run.pull()["w"] == [3 - 1 - 10]


@pytest.mark.parametrize("reason", ["EPOCH_FORGOTTEN", "LEASE_EXPIRED", "WORKER_EVICTED", "WORKER_SUPERSEDED"])
def test_no_heartbeat_follows_the_end_of_a_lease(reason, caplog):
    answers = iter([None, gone(reason)])

    def heartbeat(lease):
        if error := next(answers):
            raise error

    never = SimpleNamespace(wait=lambda _: False, is_set=lambda: False)
    _beat(SimpleNamespace(heartbeat=heartbeat), Lease("runs/r/workers/a", 1, 60.0), Waiting(), never)
    assert caplog.text.count("runs/r/workers/a: no more heartbeats") == 1


def test_lease_that_ran_out_is_taken_again(run, worker, server_time):
    worker.step(grad())
    epoch = worker.epoch
    server_time.now += 61.0
    assert run.status().workers == ()

    assert worker.step(grad())["w"] == [1.0]
    assert worker.epoch > epoch


def test_pull_through_a_failing_way_is_repeated(transport, worker):
    transport.faults = iter([("lost", gone()), ("unanswered", gone())])

    assert worker.pull()["w"] == [3.0]


def test_retries_end(transport, worker):
    transport.faults = itertools.repeat(("lost", gone()))

    with pytest.raises(KedgeError) as error:
        worker.pull()
    assert error.value.reason == "SERVER_UNAVAILABLE"


def test_closing_never_fails_and_gives_the_lease_back(run):
    with run.join("a") as worker:
        worker.close()
        worker.close()
    assert run.status().workers == ()


def test_closing_without_a_server_is_silent():
    with testing.FakeServer() as server:
        client = server.connect()
        run = client.create_run(
            "r", params=np.zeros(1, np.float32), optimizer=kedge.optim.SGD(), aggregation=kedge.Asynchronous()
        )
        worker = run.join()
    worker.close()


def heartbeat_threads(worker_name):
    return [thread for thread in threading.enumerate() if thread.name.endswith(worker_name)]


def test_heartbeats_end_with_the_worker(run):
    with run.join("closed") as worker:
        (closed,) = heartbeat_threads(worker.name)
    closed.join(30)
    assert not closed.is_alive()

    worker = run.join("forgotten")
    (forgotten,) = heartbeat_threads(worker.name)
    del worker
    gc.collect()
    forgotten.join(30)
    assert not forgotten.is_alive()


def test_heartbeats_end_when_another_takes_the_name(run, caplog):
    with run.join("a", lease_seconds=0.05) as old:
        (beating,) = heartbeat_threads(old.name)
        with run.join("a", lease_seconds=60.0):
            beating.join(30)
            assert not beating.is_alive()
    assert "WORKER_SUPERSEDED" in caplog.text
