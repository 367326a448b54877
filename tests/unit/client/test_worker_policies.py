"""What a worker makes of the answers that an aggregation or an admission may give it."""

import itertools
import threading

import pytest
from faulty_transport import FaultyExchange, gone, grad

import kedge
from kedge.errors import KedgeError
from kedge.transport import PushResult
from kedge.weights import MAX_WAIT_SECONDS

NAN = float("nan")


def result_with(outcome, reason):
    return PushResult(outcome, reason, 0, 0, "as the test wants it")


@pytest.fixture
def requests(monkeypatch):
    """The pulls that go to the server, those that follow a push too."""
    seen = []
    push, pull = FaultyExchange.push, FaultyExchange.pull

    def noting_push(exchange, contribution):
        seen.append(contribution.pull)
        return push(exchange, contribution)

    def noting_pull(exchange, worker, request):
        seen.append(request)
        return pull(exchange, worker, request)

    monkeypatch.setattr(FaultyExchange, "push", noting_push)
    monkeypatch.setattr(FaultyExchange, "pull", noting_pull)
    return seen


@pytest.fixture
def answers(monkeypatch):
    """What the next pushes are answered with, after they were made; None as it comes."""
    scripted = []
    push = FaultyExchange.push

    def answer(exchange, contribution):
        result, data = push(exchange, contribution)
        return (scripted.pop(0) if scripted else None) or result, data

    monkeypatch.setattr(FaultyExchange, "push", answer)
    return scripted


# --------------------------------------------------------------------------------------------- waiting for the slowest


def test_step_that_waited_for_the_slowest_in_vain_asks_with_the_same_push(transport, run, worker, requests):
    transport.faults = iter([("unanswered", gone("WAITING_FOR_SLOWEST"))] * 3)

    assert worker.step(grad())["w"] == [2.0]
    assert transport.pushes == [(worker.epoch, 1)] * 4
    assert [request.wait_seconds for request in requests] == [MAX_WAIT_SECONDS] * 4
    assert run.status().applied_count == 1


def test_push_after_a_step_that_was_given_up_while_it_waited_is_not_taken_for_it(transport, run, worker):
    transport.faults = iter([("unanswered", gone("WAITING_FOR_SLOWEST")), ("unanswered", gone("RUN_FAILED"))])
    with pytest.raises(KedgeError):
        worker.step(grad(1))

    assert worker.push(grad(10)).outcome == "applied"
    assert run.pull()["w"] == [3 - 1 - 10]


def test_push_after_one_that_was_deferred_and_then_failed_is_not_taken_for_it(transport, run, worker, answers):
    answers.append(result_with("deferred", "WAITING_FOR_QUORUM"))
    transport.faults = iter([(None, None), ("lost", gone("MANIFEST_MISMATCH"))])
    with pytest.raises(KedgeError):
        worker.step(grad(1))

    assert worker.push(grad(10)).outcome == "applied"
    assert run.pull()["w"] == [3 - 1 - 10]


def test_pull_asks_again_while_the_slowest_is_waited_for(transport, worker, requests):
    transport.faults = iter([("lost", gone("WAITING_FOR_SLOWEST"))] * 2)

    assert worker.pull()["w"] == [3.0]
    assert [request.wait_seconds for request in requests] == [MAX_WAIT_SECONDS] * 3


def test_pull_with_a_timeout_gives_up_on_the_slowest(transport, worker):
    transport.faults = itertools.repeat(("lost", gone("WAITING_FOR_SLOWEST")))

    with pytest.raises(KedgeError) as error:
        worker.pull(timeout_seconds=0)
    assert error.value.reason == "WAITING_FOR_SLOWEST"


def test_two_workers_in_lockstep_get_the_weights_of_a_synchronous_run(run, in_background):
    """With bound 0 a clock's tick is what a round is with two workers: w falls by the sum of both gradients."""
    run.set_aggregation(kedge.BoundedStaleness(bound=0))
    together = threading.Barrier(2)

    def train(value):
        with run.join() as worker:
            together.wait(30)
            worker.pull()
            seen = [worker.step(grad(value))["w"].item() for _ in range(5)]
            together.wait(30)
        return seen

    futures = [in_background(train, value) for value in (0.25, 0.5)]
    assert [future.result(30) for future in futures] == [[3 - 0.75 * n for n in range(1, 6)]] * 2


def test_step_too_far_ahead_is_left_out_and_waits_for_the_slowest(run, worker, in_background, eventually):
    run.set_aggregation(kedge.BoundedStaleness(bound=0))
    with run.join("slow") as slow:
        slow.pull()
        assert worker.push(grad()).outcome == "applied"
        assert worker.push(grad()).reason == "AHEAD_OF_BOUND"
        step = in_background(worker.step, grad())
        eventually(lambda: run.status().rejected_counts == {"AHEAD_OF_BOUND": 2})
        slow.push(grad())
        assert step.result(30)["w"] == [3 - 1 - 1]
    assert worker.last_result.reason == "AHEAD_OF_BOUND"


def test_gradients_ahead_of_the_bound_are_reported_now_and_then(worker, answers, caplog):
    answers.extend([result_with("rejected", "AHEAD_OF_BOUND")] * 10)
    for _ in range(10):
        worker.step(grad())
    assert caplog.text.count("came too late or too early") == 1


def test_step_too_far_ahead_of_nobody_goes_on_with_the_weights_it_has(
    run, worker, in_background, eventually, requests, monkeypatch
):
    """The slowest one left: no other will make the step that there would be to wait for."""
    monkeypatch.setattr("kedge.session._NEXT_ROUND_SECONDS", 0.0)
    run.set_aggregation(kedge.BoundedStaleness(bound=0))
    with run.join("slow"):
        worker.push(grad(NAN))
        step = in_background(worker.step, grad())
        eventually(lambda: "AHEAD_OF_BOUND" in run.status().rejected_counts)
    assert step.result(30)["w"] == [3.0]
    assert [request.min_step for request in requests if request] == [0]  # that of the step alone
    assert worker.step(grad())["w"] == [2.0]


# -------------------------------------------------------------------------------------------------- buffers and cohorts


def test_step_into_a_buffer_goes_on_with_the_weights_there_are(transport, run, worker):
    run.set_aggregation(kedge.Buffered(size=2))

    assert worker.step(grad(1))["w"] == [3.0]
    assert worker.last_result[:2] == ("deferred", "BUFFERED")
    assert worker.step(grad(2))["w"] == [3 - (1 + 2) / 2]
    assert worker.last_result[:2] == ("applied", "BUFFER_FULL")
    assert transport.pushes == [(worker.epoch, 1), (worker.epoch, 2)]


def test_refused_cohort_is_a_warning_each_time(worker, answers, caplog):
    answers.extend([result_with("rejected", "COHORT_TOO_SMALL")] * 2)
    for _ in range(2):
        worker.step(grad(0))
    assert caplog.text.count("a gradient was left out: as the test wants it [COHORT_TOO_SMALL]") == 2


def test_step_that_came_too_late_goes_on_where_no_other_round_ends(run, worker, monkeypatch):
    """It may have been refused: then whoever waits for it alone might be the one that the next one lacks."""
    monkeypatch.setattr("kedge.session._NEXT_ROUND_SECONDS", 0.0)
    run.set_aggregation(kedge.Synchronous(quorum=2))
    with run.join("b"):
        assert worker.push(grad()).outcome == "deferred"
        assert worker.step(grad())["w"] == [3.0]
    assert worker.last_result.reason == "ALREADY_CONTRIBUTED"
    assert worker.step_number == 0


# ------------------------------------------------------------------------------------------------------------- eviction


def test_evicted_worker_fails_and_does_not_join_again(transport, run, worker):
    run.evict("a", "it sends nonsense")
    epoch = worker.epoch

    for _ in range(2):
        with pytest.raises(kedge.errors.LeaseError, match="it sends nonsense") as error:
            worker.step(grad())
        assert error.value.reason == "WORKER_EVICTED"
        assert error.value.metadata == {"worker": "runs/r/workers/a", "cause": "it sends nonsense"}
    assert worker.epoch == epoch
    assert run.status().workers == ()
    assert run.pull()["w"] == [3.0]


def test_worker_that_was_evicted_after_a_push_of_unknown_fate_does_not_join_again(transport, run, worker):
    transport.faults = iter([("unanswered", gone("INTERNAL"))])
    with pytest.raises(KedgeError):
        worker.push(grad())

    run.evict("a")
    with pytest.raises(KedgeError) as error:
        worker.push(grad())
    assert error.value.reason == "WORKER_EVICTED"
    assert run.status().workers == ()
    assert run.pull()["w"] == [2.0]


def test_name_that_is_blocked_cannot_be_taken(run, worker, server_time):
    run.evict("a", block_seconds=60)
    with pytest.raises(KedgeError) as error:
        run.join("a")
    assert error.value.reason == "WORKER_EVICTED"

    server_time.now += 61
    with run.join("a") as again:
        assert again.epoch > worker.epoch


def test_heartbeats_end_with_the_eviction(run, caplog):
    with run.join("b", lease_seconds=0.05) as evicted:
        (beating,) = [thread for thread in threading.enumerate() if thread.name.endswith(evicted.name)]
        run.evict("b", "maintenance")
        beating.join(30)
        assert not beating.is_alive()
    assert caplog.text.count("no more heartbeats") == 1
    assert "WORKER_EVICTED" in caplog.text


def test_quarantined_worker_hears_of_its_last_gradient_and_then_of_the_eviction(run, worker):
    run.set_admission(kedge.Admission(max_norm=1.0, quarantine_after=2))

    assert [worker.push(grad(value)).reason for value in (NAN, 5.0)] == ["NON_FINITE_GRADIENT", "NORM_ABOVE_LIMIT"]
    with pytest.raises(KedgeError, match="quarantined: 2 ") as error:
        worker.push(grad(1.0))
    assert error.value.reason == "WORKER_EVICTED"
    assert run.pull()["w"] == [3.0]


# ---------------------------------------------------------------------------------------------------- conditional pulls


@pytest.mark.parametrize("who", ["run", "worker"])
def test_pull_of_nothing_newer_is_none(request, worker, who):
    puller = request.getfixturevalue(who)
    worker.push(grad())

    assert puller.pull(if_newer_than=0)["w"] == [2.0]
    assert puller.pull(if_newer_than=1) is None
    assert puller.pull(if_newer_than=2) is None


def test_pull_of_nothing_newer_keeps_the_step_number(worker):
    worker.push(grad())

    assert worker.pull(if_newer_than=7) is None
    assert worker.step_number == 0
    assert worker.pull(if_newer_than=0)["w"] == [2.0]
    assert worker.step_number == 1


@pytest.mark.parametrize("who", ["run", "worker"])
def test_condition_that_is_no_step_is_refused(request, worker, who):
    for value in (-1, 1 << 63):
        with pytest.raises(ValueError, match=f"^if_newer_than is {value}: it must be None, or 0 to"):
            request.getfixturevalue(who).pull(if_newer_than=value)


# -------------------------------------------------------------------------------------------------------- back-pressure


@pytest.mark.parametrize("reason", ["STAGING_FULL", "QUEUE_FULL", "TOO_MANY_STREAMS", "READER_STALLED"])
@pytest.mark.parametrize("fault", ["lost", "unanswered"])
def test_push_that_the_server_has_no_room_for_waits_as_it_is_told_to(transport, run, worker, fault, reason):
    full = KedgeError(reason, "come back", retry_after_seconds=2.0)
    transport.faults = iter([(fault, full)] * 3)

    assert worker.step(grad())["w"] == [2.0]
    assert set(transport.pushes) == {(worker.epoch, 1)}
    assert run._retrier._clock.now == 6.0
    assert run.status().applied_count == 1
