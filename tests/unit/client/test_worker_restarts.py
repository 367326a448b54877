"""A worker whose server is started anew: with all that it knew, or with an earlier state of the run."""

import contextlib
import itertools
import logging

import numpy as np
import pytest
from faulty_transport import gone, grad

import kedge
from kedge import testing
from kedge.errors import KedgeError
from kedge.heartbeat import Waiting, start_heartbeats
from kedge.optim import SGD
from kedge.transport import Lease, in_process

AWAY = ["SERVER_UNAVAILABLE", "SERVER_DRAINING", "STORAGE_FULL", "STORAGE_UNAVAILABLE"]


@pytest.fixture
def went_back(transport):
    """Puts another server in the place of the one that there is, whose run has made other steps since its creation."""
    with contextlib.ExitStack() as exits:

        def put(*gradients, worker="other"):
            earlier = exits.enter_context(testing.FakeServer())
            client = exits.enter_context(earlier.connect())
            run = client.create_run(
                "r",
                params={"w": np.array([3.0], np.float32)},
                optimizer=SGD(lr=1.0),
                aggregation=kedge.Asynchronous(),
            )
            made = exits.enter_context(run.join(worker, lease_seconds=600))
            made.pull()
            for gradient in gradients:
                made.step(grad(gradient))
            lost, transport._transport = transport._transport, in_process.transport_to(earlier.address)
            lost.shut_down()
            return run

        yield put


@pytest.mark.parametrize("reason", AWAY)
@pytest.mark.parametrize("fault", ["lost", "unanswered"])
def test_push_is_repeated_under_its_lease_until_the_server_takes_it(transport, run, worker, fault, reason):
    transport.faults = iter([(fault, gone(reason))] * 5)

    assert worker.push(grad()).outcome == "applied"
    assert transport.pushes == [(1, 1)] * 6
    assert run.pull()["w"] == [2.0]
    assert worker.epoch == 1


def test_step_returns_the_weights_that_the_run_went_back_to(transport, worker, went_back, caplog):
    for value in (1, 1, 1):  # 3, 2, 1, 0
        worker.step(grad(value))
    went_back(0.5)  # 3, 2.5
    caplog.clear()

    assert worker.step(grad())["w"] == [2.5]
    assert worker.step_number == 1
    result = worker.last_result
    assert (result.outcome, result.reason, result.step) == ("rejected", "BASE_STEP_AHEAD", 1)
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert [text for text in warnings if "went back" in text] == [
        "runs/r/workers/a: the run went back from step 3 to step 1: a gradient was left out"
    ]


def test_training_goes_on_from_the_step_that_the_run_went_back_to(transport, worker, went_back):
    worker.step(grad())
    worker.step(grad())
    run = went_back(0.5)
    worker.step(grad())

    assert [worker.step(grad())["w"].item() for _ in range(2)] == [1.5, 0.5]
    assert worker.last_result.outcome == "applied"
    assert run.status().applied_count == 3
    assert run.status().rejected_counts == {}


def test_push_of_weights_that_the_run_went_back_behind_is_an_error_as_ever(transport, worker, went_back):
    worker.step(grad())
    worker.step(grad())
    run = went_back(0.5)

    with pytest.raises(KedgeError) as error:
        worker.push(grad())
    assert error.value.reason == "BASE_STEP_AHEAD"
    assert worker.pull()["w"] == [2.5]
    assert worker.push(grad()).outcome == "applied"
    assert run.pull()["w"] == [1.5]


def test_server_that_forgot_contributions_of_the_lease_is_joined_again(transport, run, worker, went_back):
    worker.push(grad(), base_step=0)
    worker.push(grad(), base_step=0)
    restored = went_back(1, worker="a")  # sequence 1 of epoch 1, and not sequence 2

    assert worker.push(grad(), base_step=1).outcome == "applied"
    assert transport.pushes[2:] == [(1, 3), (1, 3), (2, 1)]  # to the lost one, refused, taken
    assert restored.pull()["w"] == [1.0]


def test_sequence_that_the_server_has_long_passed_is_an_error_as_ever(transport, worker):
    gap = KedgeError("SEQUENCE_GAP", "as the test wants it", expected=5, got=1)
    transport.faults = iter([("lost", gap)])
    with pytest.raises(KedgeError) as error:
        worker.push(grad())
    assert error.value.reason == "SEQUENCE_GAP"
    assert worker.epoch == 1


def test_step_that_waits_for_its_round_goes_on_where_the_run_went_back(
    run, worker, went_back, in_background, eventually
):
    worker.step(grad())
    worker.step(grad())
    run.set_aggregation(kedge.Synchronous(quorum=2))
    waiting = in_background(worker.step, grad())
    eventually(lambda: run.status().round)
    restored = went_back(0.5)

    assert waiting.result(30)["w"] == [2.5]
    assert worker.last_result.reason == "BASE_STEP_AHEAD"
    assert worker.step(grad())["w"] == [1.5]
    assert restored.status().applied_count == 2


def test_lease_that_is_lost_again_with_another_restart_is_taken_again(transport, run, worker):
    transport.faults = iter(
        [("lost", gone("WORKER_NOT_FOUND")), ("lost", gone()), ("lost", gone("WORKER_NOT_FOUND")), ("lost", gone())]
    )
    assert worker.push(grad()).outcome == "applied"
    assert transport.pushes == [(1, 1), (2, 1), (2, 1), (3, 1), (3, 1)]
    assert run.pull()["w"] == [2.0]


def test_pull_after_the_run_went_back_brings_the_older_weights(worker, went_back):
    worker.step(grad())
    worker.step(grad())
    went_back(0.5)

    assert worker.pull()["w"] == [2.5]
    assert worker.step_number == 1


def test_local_steps_begin_anew_at_the_weights_that_the_run_went_back_to(worker, went_back):
    local = worker.local_steps(SGD(lr=1.0), sync_period=2)
    local.pull()
    for value in (1, 1, 1):  # 3, 2, 1 at the server, and one local step
        local.step(grad(value))
    went_back()

    assert local.step(grad())["w"] == [3.0]
    assert (local.pending_count, worker.step_number) == (0, 0)
    assert worker.last_result.reason == "BASE_STEP_AHEAD"
    assert [local.step(grad())["w"].item() for _ in range(2)] == [2.0, 1.0]
    assert worker.last_result.outcome == "applied"


@pytest.mark.parametrize("reason", [*AWAY, "INTERNAL"])
def test_heartbeats_go_on_through_what_may_pass(reason, eventually):
    beats = itertools.count()
    answered = []

    class Away:
        def heartbeat(self, lease):
            if next(beats) < 3:
                raise gone(reason)
            answered.append(lease)

    stop = start_heartbeats(Away(), Lease("runs/r/workers/a", 1, 0.15), Waiting())
    eventually(lambda: answered)
    stop()
