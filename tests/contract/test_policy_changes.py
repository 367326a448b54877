"""set_aggregation on a live run, with contributions in flight."""

import itertools

import numpy as np
import pytest

import kedge
from kedge import optim

SGD = optim.SGD(lr=1.0)

POLICIES = {
    "synchronous": kedge.Synchronous(3),
    "asynchronous": kedge.Asynchronous(),
    "bounded_staleness": kedge.BoundedStaleness(1),
    "buffered": kedge.Buffered(4),
}

IN_FLIGHT = {
    "synchronous": ("deferred", "WAITING_FOR_QUORUM"),
    "asynchronous": ("applied", "EACH_CONTRIBUTION"),
    "bounded_staleness": ("applied", "EACH_CONTRIBUTION"),
    "buffered": ("deferred", "BUFFERED"),
}
"""What a first contribution is answered with."""


def grad(*values):
    return {"w": np.array(values, np.float32)}


@pytest.mark.parametrize(("old", "new"), list(itertools.permutations(POLICIES, 2)))
def test_what_is_held_becomes_one_step_and_what_comes_is_under_the_new_policy(new_run, numbered_worker, old, new):
    run = new_run(SGD, POLICIES[old])
    a, b = numbered_worker(run, "a"), numbered_worker(run, "b")
    results = [a.push(1, 1, example_count=1), b.push(1, 4, example_count=3)]
    assert [result[:2] for result in results] == [IN_FLIGHT[old]] * 2
    following = run.set_aggregation(POLICIES[new])

    if results[0].outcome == "deferred":
        step, weights = 1, 3 - (1 * 1 + 3 * 4) / 4
        assert [a.push(1, 1)[:4], b.push(1, 4)[:4]] == [("applied", "POLICY_CHANGED", 1, 0)] * 2
    else:
        step, weights = 2, 3 - 1 - 4
        assert [a.push(1, 1), b.push(1, 4)] == results
    assert following == step + 1
    assert run.pull()["w"] == [weights]
    assert run.aggregation == run.info().aggregation == POLICIES[new]
    status = run.status()
    assert (status.step, status.applied_count, status.round) == (step, 2, None)

    assert a.push(2, 1, base_step=step)[:2] == IN_FLIGHT[new]
    ticked = new == "bounded_staleness"
    assert [worker.clock for worker in run.status().workers] == [int(ticked), 0]


def test_step_that_waits_in_a_round_returns_when_the_policy_changes(pair, in_background, eventually):
    run, a, _ = pair
    waiting = in_background(a.step, grad(1))
    eventually(lambda: run.status().round is not None)

    assert run.set_aggregation(kedge.Asynchronous()) == 2
    assert waiting.result(30)["w"] == [2.0]
    assert a.last_result[:3] == ("applied", "POLICY_CHANGED", 1)
    assert a.step(grad(1))["w"] == [1.0]


def test_old_policy_says_how_the_held_ones_are_combined(new_run, numbered_worker):
    run = new_run(SGD, kedge.Synchronous(4, combine="median"))
    for name, value in zip("abc", (1, 100, 2), strict=True):
        numbered_worker(run, name).push(1, value)
    following = run.set_aggregation(kedge.Synchronous(4))

    assert run.pull(min_step=following - 1)["w"] == [1.0]


@pytest.mark.parametrize("policy", [kedge.Synchronous, kedge.Buffered])
def test_too_few_for_the_old_combination_are_refused(new_run, numbered_worker, policy):
    run = new_run(SGD, policy(3, combine="median"))
    a, b = numbered_worker(run, "a"), numbered_worker(run, "b")
    a.push(1, 1)
    b.push(1, 1)

    assert run.set_aggregation(kedge.Asynchronous()) == 1
    assert [a.push(1, 1)[:4], b.push(1, 1)[:4]] == [("rejected", "COHORT_TOO_SMALL", 0, 0)] * 2
    assert run.pull()["w"] == [3.0]
    assert a.push(2, 1)[:3] == ("applied", "EACH_CONTRIBUTION", 1)


def test_policy_that_the_run_has_already_changes_nothing(pair):
    run, a, b = pair
    a.push(grad(1))

    assert run.set_aggregation(kedge.Synchronous(2)) == 1
    assert run.status().round == kedge.RoundStatus(contribution_count=1, required_count=2)
    assert b.push(grad(3))[:3] == ("applied", "QUORUM_REACHED", 1)
    assert run.set_aggregation(kedge.Synchronous(2)) == 2
    assert run.pull()["w"] == [1.0]


def test_change_without_anything_held_makes_no_step(new_run):
    run = new_run(SGD, kedge.Synchronous(2))

    assert run.set_aggregation(kedge.Buffered(2)) == 1
    assert run.status().step == 0


def test_contribution_of_an_older_step_is_stale_under_a_synchronous_policy(new_run, numbered_worker):
    run = new_run(SGD, kedge.Asynchronous())
    worker = numbered_worker(run, "a")
    worker.push(1, 1)
    run.set_aggregation(kedge.Synchronous(1))

    assert worker.push(2, 1, base_step=0)[:4] == ("rejected", "STALE_GRADIENT", 1, 1)
    assert worker.push(3, 1, base_step=1)[:3] == ("applied", "QUORUM_REACHED", 2)


def test_larger_quorum_is_gathered_anew(pair):
    run, a, b = pair
    run.set_aggregation(kedge.Synchronous(3))
    assert "1 more worker" in run.status().waiting_for

    a.push(grad(1))
    assert b.push(grad(1)).outcome == "deferred"
    with run.join("c") as c:
        assert c.push(grad(4), base_step=0)[:3] == ("applied", "QUORUM_REACHED", 1)


def test_quorum_that_is_there_already_is_gathered(new_run):
    run = new_run(SGD, kedge.Synchronous(3))
    with run.join("a") as a, run.join("b") as b:
        run.set_aggregation(kedge.Synchronous(2))
        a.push(grad(1), base_step=0)
        b.close()
        assert run.pull(min_step=1)["w"] == [2.0]


def test_clocks_begin_at_zero_when_the_policy_is_chosen(new_run):
    run = new_run(SGD, kedge.BoundedStaleness(0))
    with run.join("a") as a, run.join("b") as b:
        a.push(grad(1), base_step=0)
        run.set_aggregation(kedge.Asynchronous())
        run.set_aggregation(kedge.BoundedStaleness(0))

        assert [worker.clock for worker in run.status().workers] == [0, 0]
        assert a.pull()["w"] == b.pull()["w"] == [2.0]
