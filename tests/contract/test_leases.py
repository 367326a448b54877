import numpy as np
import pytest

import kedge
from kedge import optim
from kedge.errors import LeaseError

SGD = optim.SGD(lr=1.0)
ALONE = kedge.Synchronous(quorum=1)
PAIR = kedge.Synchronous(quorum=2)


def grad(*values):
    return {"w": np.array(values, np.float32)}


def stop_heartbeats(worker):
    worker._session._stop_heartbeats()


def test_worker_is_listed_as_long_as_it_is_joined(new_run):
    run = new_run(SGD, ALONE)
    with run.join("a", lease_seconds=60) as worker:
        (listed,) = run.status().workers
        assert (listed.name, listed.epoch) == (worker.name, worker.epoch) == (f"{run.name}/workers/a", worker.epoch)
        assert 0 < listed.lease_remaining_seconds <= 60
    worker.close()

    assert run.status().workers == ()


def test_unnamed_workers_have_names_of_their_own(new_run):
    run = new_run(SGD, ALONE)
    with run.join() as a, run.join() as b:
        assert a.name != b.name


def test_heartbeats_renew_the_lease(new_run, eventually):
    run = new_run(SGD, ALONE)
    with run.join(lease_seconds=1.5):
        seen = []

        def has_grown():
            seen.append(run.status().workers[0].lease_remaining_seconds)
            return len(seen) > 1 and seen[-1] > seen[-2]

        eventually(has_grown)


def test_lease_that_is_not_renewed_ends_and_the_next_push_joins_again(new_run, eventually):
    run = new_run(SGD, ALONE)
    with run.join("a", lease_seconds=0.5) as worker:
        worker.pull()
        worker.step(grad(1))
        epoch = worker.epoch
        stop_heartbeats(worker)
        eventually(lambda: not run.status().workers)

        assert worker.step(grad(1))["w"] == [1.0]
        assert worker.epoch > epoch
        (listed,) = run.status().workers
        assert (listed.epoch, listed.last_sequence, listed.applied_count) == (worker.epoch, 1, 1)


def test_lost_worker_holds_a_round_up_no_longer_than_its_lease(pair, new_run, eventually, in_background):
    run, a, _ = pair
    with run.join("b", lease_seconds=0.5) as lost:  # in the place of the other one
        stop_heartbeats(lost)
        waiting = in_background(a.step, grad(1))

        assert waiting.result(30)["w"] == [2.0]
        assert a.last_result.reason == "ALL_LIVE_CONTRIBUTED"


def test_leaving_worker_lets_the_others_go_on(pair, in_background, eventually):
    run, a, b = pair
    waiting = in_background(a.step, grad(1))
    eventually(lambda: run.status().round is not None)
    b.close()

    assert waiting.result(30)["w"] == [2.0]
    assert a.last_result.reason == "ALL_LIVE_CONTRIBUTED"


def test_round_waits_for_every_live_worker_also_after_one_that_contributed_has_left(new_run):
    run = new_run(SGD, kedge.Synchronous(quorum=3))
    a, b, c = (run.join(name) for name in "abc")
    with b, c:
        with a:
            a.push(grad(1), base_step=0)
        assert b.push(grad(2), base_step=0).outcome == "deferred"
        assert run.status().round == kedge.RoundStatus(contribution_count=2, required_count=3)
        assert c.push(grad(6), base_step=0)[:3] == ("applied", "QUORUM_REACHED", 1)
    assert run.pull()["w"] == [0.0]


def test_quorum_that_never_was_is_waited_for(new_run):
    run = new_run(SGD, PAIR)
    with run.join() as worker:
        worker.pull()
        assert worker.push(grad(1), wait_seconds=0.1).outcome == "deferred"
    assert run.status().round == kedge.RoundStatus(contribution_count=1, required_count=2)


def test_round_that_everyone_has_left_keeps_nobody_waiting(new_run):
    run = new_run(SGD, PAIR)
    with run.join() as worker:
        worker.push(grad(1), base_step=0)
        assert run.status().waiting_for

    assert run.status().round == kedge.RoundStatus(contribution_count=1, required_count=2)
    assert run.status().waiting_for == ""


@pytest.mark.parametrize("how", ["leave", "are evicted", "lose their leases"])
def test_round_of_a_run_that_had_its_quorum_ends_when_all_have_gone(new_run, eventually, how):
    run = new_run(SGD, PAIR)
    with run.join("a") as a, run.join("b", lease_seconds=0.5 if how == "lose their leases" else None) as b:
        a.pull()
        a.push(grad(1))
        if how == "lose their leases":
            with run.join("a", lease_seconds=0.5) as again:  # in the place of the other one
                for worker in (again, b):
                    stop_heartbeats(worker)
                eventually(lambda: not run.status().workers)
        for worker in (a, b):
            if how == "leave":
                worker.close()
            elif how == "are evicted":
                run.evict(worker.name)
        assert run.pull(min_step=1)["w"] == [2.0]
        status = run.status()
        assert (status.step, status.applied_count, status.round) == (1, 1, None)


@pytest.fixture
def diminished(new_run, numbered_worker):
    """A run that had its quorum of three, and the two workers that are left."""
    run = new_run(SGD, kedge.Synchronous(quorum=3))
    a, b, c = (numbered_worker(run, name) for name in "abc")
    c.leave()
    return run, a, b


def test_worker_that_joins_while_a_round_is_open_is_not_awaited(diminished, numbered_worker):
    run, a, b = diminished
    assert a.push(1, 1).outcome == "deferred"
    numbered_worker(run, "late")
    assert run.status().round == kedge.RoundStatus(contribution_count=1, required_count=2)

    assert b.push(1, 5)[:3] == ("applied", "ALL_LIVE_CONTRIBUTED", 1)
    assert run.pull()["w"] == [0.0]


def test_worker_that_joins_while_a_round_is_open_may_contribute(diminished, numbered_worker):
    run, a, b = diminished
    a.push(1, 1)
    assert numbered_worker(run, "late").push(1, 6).outcome == "deferred"
    assert run.status().round == kedge.RoundStatus(contribution_count=2, required_count=3)

    assert b.push(1, 2)[:3] == ("applied", "QUORUM_REACHED", 1)
    assert run.pull()["w"] == [0.0]


def test_worker_that_joined_before_the_round_was_opened_is_awaited(diminished, numbered_worker):
    run, a, b = diminished
    late = numbered_worker(run, "late")
    a.push(1, 1)
    assert b.push(1, 2).outcome == "deferred"
    assert run.status().round == kedge.RoundStatus(contribution_count=2, required_count=3)

    assert late.push(1, 6)[:3] == ("applied", "QUORUM_REACHED", 1)


def test_worker_that_takes_its_lease_over_while_a_round_is_open_is_not_awaited(diminished, numbered_worker):
    run, a, _ = diminished
    assert a.push(1, 1).outcome == "deferred"
    numbered_worker(run, "b")

    assert a.push(1, 1)[:3] == ("applied", "ALL_LIVE_CONTRIBUTED", 1)
    assert run.pull()["w"] == [2.0]


def test_workers_that_made_up_the_quorum_are_awaited_though_the_round_was_open_before(new_run, numbered_worker):
    run = new_run(SGD, kedge.Synchronous(quorum=3))
    a = numbered_worker(run, "a")
    a.push(1, 1)
    b, c = numbered_worker(run, "b"), numbered_worker(run, "c")
    c.leave()
    assert run.status().round == kedge.RoundStatus(contribution_count=1, required_count=2)

    assert b.push(1, 3)[:3] == ("applied", "ALL_LIVE_CONTRIBUTED", 1)


def test_timeout_closes_a_round_with_what_it_has(new_run):
    with new_run(SGD, kedge.Synchronous(quorum=2, timeout_seconds=0.1)).join() as worker:
        worker.pull()
        assert worker.step(grad(1))["w"] == [2.0]
        assert worker.last_result.reason == "TIMEOUT"


def test_worker_that_was_superseded_cannot_write(new_run):
    run = new_run(SGD, ALONE)
    with run.join("a") as old, run.join("a") as new:
        old.pull()
        new.pull()
        for _ in range(2):
            with pytest.raises(LeaseError) as error:
                old.push(grad(1))
            assert error.value.reason == "WORKER_SUPERSEDED"
        old.close()

        assert new.epoch > old.epoch
        assert new.push(grad(1)).outcome == "applied"
        assert [worker.epoch for worker in run.status().workers] == [new.epoch]


def test_deleting_a_run_ends_what_waits_in_it(pair, in_background, eventually):
    run, a, b = pair
    waiting = [in_background(a.step, grad(1)), in_background(b.pull, min_step=5)]
    eventually(lambda: run.status().round is not None)
    run.delete()

    for future in waiting:
        with pytest.raises(kedge.errors.NotFoundError):
            future.result(30)


def test_closed_worker_refuses(new_run):
    worker = new_run(SGD, ALONE).join()
    worker.pull()
    worker.close()
    for use in (worker.pull, lambda: worker.push(grad(1))):
        with pytest.raises(kedge.KedgeError) as error:
            use()
        assert error.value.reason == "CANCELLED"


@pytest.mark.parametrize(
    "arguments", [{"wire_dtype": "float64"}, {"transport": "carrier pigeon"}, {"lease_seconds": 0}, {"name": "a/b"}]
)
def test_misuse_of_join_is_refused(new_run, arguments):
    run = new_run(SGD, ALONE)
    with pytest.raises(ValueError, match=r"must be|cannot name"):
        run.join(**arguments)
    assert run.status().workers == ()


def test_shared_memory_that_is_insisted_on_is_there_or_said_to_be_missing(new_run, has_shared_memory):
    with new_run(SGD, ALONE).join(transport="shared_memory") as worker:
        if has_shared_memory:
            assert worker.pull()["w"].tolist() == [3.0]
            return
        with pytest.raises(kedge.KedgeError) as error:
            worker.pull()
    assert error.value.reason == "SHARED_MEMORY_UNAVAILABLE"


@pytest.mark.parametrize("dtypes", [{"wire_dtype": "bfloat16"}, {"weights_dtype": "float16"}], ids=str)
def test_shared_memory_is_float32(new_run, dtypes):
    run = new_run(SGD, ALONE)
    with pytest.raises(ValueError, match="shared memory"):
        run.join(transport="shared_memory", **dtypes)
    assert run.status().workers == ()
