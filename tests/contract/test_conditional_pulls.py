"""Pulls that move nothing when there is nothing new."""

import numpy as np
import pytest

import kedge
from kedge import optim
from kedge.errors import ConflictError, WaitTimeoutError
from kedge.transport import PullRequest, WeightsOfStep

SGD = optim.SGD(lr=1.0)
ALONE = kedge.Synchronous(quorum=1)


def grad(*values):
    return {"w": np.array(values, np.float32)}


@pytest.fixture
def looking(new_run):
    """A run with Lookahead at step 1, and a worker that has pulled."""
    run = new_run(optim.Lookahead(SGD, sync_period=2), ALONE)
    with run.join() as worker:
        worker.pull()
        worker.step(grad(1))
        yield run, worker


@pytest.mark.parametrize("weights", ["fast", "slow"])
def test_nothing_comes_unless_it_is_newer(looking, weights):
    run, worker = looking
    for puller in (run, worker):
        assert puller.pull(weights, if_newer_than=1) is None
        assert puller.pull(weights, if_newer_than=100) is None
        assert puller.pull(weights, if_newer_than=0)["w"] == [2.0 if weights == "fast" else 3.0]
    worker.push(grad(1))
    assert run.pull(weights, if_newer_than=1)["w"] == worker.pull(weights, if_newer_than=1)["w"] == [2.0]


def test_step_number_stays_when_nothing_comes(looking):
    _, worker = looking
    worker.push(grad(1))
    assert worker.pull(if_newer_than=2) is None
    assert worker.step_number == 1
    assert worker.pull(if_newer_than=1)["w"] == [2.0]
    assert worker.step_number == 2


def test_answer_without_weights_has_the_step(client, looking):
    run, _ = looking
    request = PullRequest("fast_and_slow", if_newer_than=5)

    assert client._transport.pull(run.name, run.manifest, request) == WeightsOfStep(1, None)


def test_pull_waits_for_its_step_first(looking, in_background):
    run, worker = looking
    waiting = [
        in_background(run.pull, min_step=2, if_newer_than=1),
        in_background(run.pull, min_step=2, if_newer_than=2),
    ]
    worker.push(grad(1))

    assert waiting[0].result(30)["w"] == [2.0]
    assert waiting[1].result(30) is None


def test_step_that_is_not_reached_is_an_error_all_the_same(looking):
    run, worker = looking
    for puller in (run, worker):
        with pytest.raises(WaitTimeoutError) as error:
            puller.pull(min_step=2, if_newer_than=1, timeout_seconds=0.05)
        assert error.value.reason == "STEP_NOT_REACHED"


def test_slow_weights_that_are_not_there_are_an_error_all_the_same(new_run):
    run = new_run(SGD, ALONE)
    with pytest.raises(ConflictError) as error:
        run.pull("slow", if_newer_than=5)
    assert error.value.reason == "NO_SLOW_WEIGHTS"


def test_worker_that_is_held_back_waits_first(new_run):
    run = new_run(SGD, kedge.BoundedStaleness(0))
    with run.join("a") as a, run.join("b") as b:
        a.pull()
        a.push(grad(1))
        with pytest.raises(WaitTimeoutError) as error:
            a.pull(if_newer_than=0, timeout_seconds=0.05)
        assert error.value.reason == "WAITING_FOR_SLOWEST"
        b.push(grad(1), base_step=0)
        assert a.pull(if_newer_than=2) is None
        assert a.pull(if_newer_than=1)["w"] == [1.0]
