"""Workers that are sent away."""

import functools

import numpy as np
import pytest

import kedge
from kedge import optim
from kedge.errors import LeaseError

SGD = optim.SGD(lr=1.0)
ALONE = kedge.Synchronous(quorum=1)


def grad(*values):
    return {"w": np.array(values, np.float32)}


def assert_evicted(call, worker, cause):
    with pytest.raises(LeaseError) as error:
        call()
    assert error.value.reason == "WORKER_EVICTED"
    assert error.value.metadata == {"worker": worker, "cause": cause}
    assert cause in str(error.value)


def test_evicted_worker_learns_why_and_does_not_come_back_by_itself(new_run):
    run = new_run(SGD, ALONE)
    with run.join("a") as worker:
        worker.pull()
        worker.step(grad(1))
        run.evict("a", "its disk is full")

        for _ in range(2):
            assert_evicted(lambda: worker.push(grad(1), base_step=1), worker.name, "its disk is full")
        assert run.status().workers == ()
    assert run.pull()["w"] == [2.0]


@pytest.mark.parametrize("name", ["a", "{run}/workers/a"])
def test_worker_is_named_by_its_id_or_its_full_name(new_run, name):
    run = new_run(SGD, ALONE)
    with run.join("a"), run.join("b"):
        run.evict(name.format(run=run.name))
        assert [worker.name for worker in run.status().workers] == [f"{run.name}/workers/b"]


def test_old_epoch_stays_evicted_when_another_process_takes_the_name(new_run, numbered_worker):
    run = new_run(SGD, ALONE)
    old = numbered_worker(run, "a")
    run.evict("a", "for a test")
    new = numbered_worker(run, "a")

    assert new.lease.epoch > old.lease.epoch
    for call in (lambda: old.push(1, 1), old.heartbeat):
        assert_evicted(call, old.lease.worker, "for a test")
    assert new.push(1, 1).outcome == "applied"


@pytest.mark.parametrize("policy", [kedge.Synchronous(2), kedge.Buffered(2)], ids=["synchronous", "buffered"])
def test_what_it_contributed_stays_and_is_answered_for_once_it_is_known(new_run, numbered_worker, policy):
    run = new_run(SGD, policy)
    a, b = numbered_worker(run, "a"), numbered_worker(run, "b")
    assert a.push(1, 1).outcome == "deferred"
    run.evict("a", "its disk is full")

    assert run.status().round == kedge.RoundStatus(contribution_count=1, required_count=2)
    assert_evicted(lambda: a.push(1, 1, wait_seconds=60), a.lease.worker, "its disk is full")
    reason = b.push(1, 3).reason
    assert a.push(1, 1)[:3] == ("applied", reason, 1)
    assert run.pull()["w"] == [1.0]
    assert_evicted(lambda: a.push(2, 1), a.lease.worker, "its disk is full")


def test_who_waits_for_its_round_learns_of_it_at_once(pair, in_background, eventually):
    run, a, b = pair
    waiting = in_background(a.push, grad(1), wait_seconds=600)
    eventually(lambda: run.status().round is not None)
    run.evict("a", "its disk is full")

    assert_evicted(lambda: waiting.result(30), a.name, "its disk is full")
    assert b.push(grad(3))[:3] == ("applied", "QUORUM_REACHED", 1)
    assert run.pull()["w"] == [1.0]


def test_repeated_request_evicts_once(client, new_run, numbered_worker):
    run = new_run(SGD, ALONE)
    worker = numbered_worker(run, "a")
    evict = functools.partial(client._transport.evict, worker.lease.worker, "for a test", None)
    for _ in range(2):
        evict(request_id="one")
    again = numbered_worker(run, "a")
    evict(request_id="one")
    again.heartbeat()

    evict(request_id="two")
    assert_evicted(again.heartbeat, worker.lease.worker, "for a test")
    with pytest.raises(LeaseError) as error:
        evict(request_id="three")
    assert error.value.reason == "WORKER_NOT_FOUND"


def test_round_does_not_wait_for_it(pair, in_background, eventually):
    run, a, _ = pair
    waiting = in_background(a.step, grad(1))
    eventually(lambda: run.status().round is not None)
    run.evict("b")

    assert waiting.result(30)["w"] == [2.0]
    assert a.last_result.reason == "ALL_LIVE_CONTRIBUTED"


def test_leaving_afterwards_is_no_error(new_run, numbered_worker):
    run = new_run(SGD, ALONE)
    worker = numbered_worker(run, "a")
    run.evict("a")
    worker.leave()

    assert_evicted(worker.heartbeat, worker.lease.worker, "")


def test_who_holds_no_lease_cannot_be_evicted(new_run, numbered_worker):
    run = new_run(SGD, ALONE)
    numbered_worker(run, "left").leave()
    numbered_worker(run, "evicted")
    run.evict("evicted")

    for name in ("nobody", "left", "evicted"):
        with pytest.raises(LeaseError) as error:
            run.evict(name)
        assert error.value.reason == "WORKER_NOT_FOUND"
        assert error.value.metadata == {"worker": f"{run.name}/workers/{name}"}


def test_worker_of_no_run_cannot_be_evicted(new_run):
    run = new_run(SGD, ALONE)
    run.delete()
    with pytest.raises(kedge.errors.NotFoundError) as error:
        run.evict("a")
    assert error.value.reason == "RUN_NOT_FOUND"


def test_name_can_be_blocked(new_run, numbered_worker):
    run = new_run(SGD, ALONE)
    worker = numbered_worker(run, "a")
    run.evict("a", "go away", block_seconds=600)

    assert_evicted(lambda: run.join("a"), worker.lease.worker, "go away")
    assert_evicted(worker.heartbeat, worker.lease.worker, "go away")
    numbered_worker(run, "b")
    assert [w.name for w in run.status().workers] == [f"{run.name}/workers/b"]


def test_block_ends(new_run, numbered_worker, eventually):
    run = new_run(SGD, ALONE)
    numbered_worker(run, "a")
    run.evict("a", block_seconds=0.2)

    def may_join():
        try:
            return numbered_worker(run, "a")
        except LeaseError:
            return None

    eventually(may_join)
    assert len(run.status().workers) == 1


def test_cause_that_is_too_long_is_refused_and_nobody_evicted(client, new_run, numbered_worker):
    run = new_run(SGD, ALONE)
    worker = numbered_worker(run, "a")
    with pytest.raises(ValueError, match="256"):
        run.evict("a", "x" * 257)
    with pytest.raises(kedge.errors.InvalidInputError) as error:
        client._transport.evict(worker.lease.worker, "x" * 257, None, request_id="")

    assert error.value.reason == "INVALID_CONFIGURATION"
    worker.heartbeat()
    run.evict("a", "x" * 256)
    assert_evicted(worker.heartbeat, worker.lease.worker, "x" * 256)
