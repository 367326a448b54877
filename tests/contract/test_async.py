"""Exchanges in the background, against each server: what the policies make of gradients that are one step old."""

from fractions import Fraction

import numpy as np
import pytest

import kedge
from kedge import optim

SGD = optim.SGD(lr=1.0)


def grad(*values):
    return {"w": np.array(values, np.float32)}


def train_ahead(worker, rate, steps):
    """Descends w ** 2 / 2, computing each gradient while the exchange of the one before is under way.

    Returns:
        The weights that were worked with, and what became of the gradients.
    """
    pending = worker.pull_async()
    weights, seen, results = pending.result(), [], []
    for _ in range(steps):
        seen.append(weights["w"].item())
        sent = worker.step_async({"w": rate * weights["w"]})
        weights = pending.result()
        results.append(worker.last_result)
        pending = sent
    pending.result()
    return seen, [*results[1:], worker.last_result]


def delayed_descent(start, rates):
    """x[n + 1] = x[n] - rate[n] x[n - 1], exactly; x[-1] is x[0]: what is worked with is x[n - 1]."""
    x = [Fraction(start), Fraction(start)]
    for rate in rates:
        x.append(x[-1] - rate * x[-2])
    return [float(value) for value in x[:-2]]


RATE = Fraction(1, 4)
STALENESS = [0, 1, 1, 1, 1, 1, 1, 1]
FULL = [1, 1]  # what a gradient counts, by its staleness
INVERSE = [1, Fraction(1, 2)]


@pytest.mark.parametrize(
    ("policy", "scale"),
    [
        (kedge.Asynchronous(), FULL),
        (kedge.Asynchronous(max_staleness=1), FULL),
        (kedge.Asynchronous(scaling="inverse"), INVERSE),
        (kedge.Buffered(1), INVERSE),
        (kedge.Buffered(1, scaling="none"), FULL),
        (kedge.BoundedStaleness(0), FULL),
        (kedge.BoundedStaleness(1), FULL),
    ],
    ids=str,
)
def test_gradients_computed_meanwhile_are_one_step_old_and_descend_as_delayed_ones(new_run, policy, scale):
    run = new_run(SGD, policy)
    with run.join() as worker:
        seen, results = train_ahead(worker, float(RATE), len(STALENESS))

    assert seen == delayed_descent(3, [RATE * scale[age] for age in STALENESS])
    assert [(result.outcome, result.staleness) for result in results] == [("applied", age) for age in STALENESS]
    assert run.status().applied_count == len(STALENESS)


@pytest.mark.parametrize("policy", [kedge.Synchronous(1), kedge.Asynchronous(max_staleness=0)], ids=repr)
def test_every_second_gradient_is_stale_where_only_fresh_ones_are_taken(new_run, policy):
    run = new_run(SGD, policy)
    with run.join() as worker:
        _, results = train_ahead(worker, 0.25, 6)

    assert [result.reason == "STALE_GRADIENT" for result in results] == [False, True] * 3
    assert run.status().rejected_counts == {"STALE_GRADIENT": 3}
    assert run.pull()["w"] == [3 * 0.75**3]


def test_fresh_gradients_travel_while_something_else_is_done(new_run):
    run = new_run(SGD, kedge.Synchronous(1))
    with run.join() as worker:
        weights = worker.pull()
        for _ in range(3):
            pending = worker.step_async({"w": 0.25 * weights["w"]})
            weights = pending.result()
    assert weights["w"] == [3 * 0.75**3]
    assert run.status().rejected_counts == {}


def test_two_workers_in_lockstep_are_held_to_their_bound(new_run, in_background):
    """With bound 0 each tick of the clocks is both workers' gradients: one delayed descent at twice the rate."""
    run = new_run(SGD, kedge.BoundedStaleness(0))
    with run.join("a") as a, run.join("b") as b:
        futures = [in_background(train_ahead, worker, float(RATE), 8) for worker in (a, b)]
        descents = [future.result(60) for future in futures]

    for seen, results in descents:
        assert seen == delayed_descent(3, [2 * RATE] * 8)
        assert {result.outcome for result in results} == {"applied"}
    assert run.status().rejected_counts == {}


def test_pushes_that_never_pull_run_ahead_of_the_bound(new_run):
    run = new_run(SGD, kedge.BoundedStaleness(1))
    with run.join("a") as a, run.join("b"):
        pending = [a.push_async(grad(1), base_step=0) for _ in range(3)]
        results = [one.result() for one in pending]
    assert [result.reason == "AHEAD_OF_BOUND" for result in results] == [False, False, True]


def test_operations_are_done_in_the_order_of_the_calls(new_run):
    run = new_run(SGD, kedge.Asynchronous())
    with run.join() as worker:
        pulls, pushes = [worker.pull_async()], []
        for value in (1, 2, 4, 8):
            pushes.append(worker.push_async(grad(value), base_step=0))
            pulls.append(worker.pull_async(if_newer_than=0))
        worker.pull()
        weights = worker.step(grad(16))

    assert [pull.result()["w"].item() for pull in pulls] == [3, 2, 0, -4, -12]
    assert [push.result().step for push in pushes] == [1, 2, 3, 4]
    assert weights["w"] == [-28]


def test_weights_are_fetched_as_soon_as_they_are_there(new_run):
    run = new_run(SGD, kedge.Asynchronous())
    with run.join("a") as a, run.join("b") as b:
        next_weights = a.pull_async(min_step=2)
        b.push(grad(1), base_step=0)
        assert not next_weights.is_done  # another step is to be made
        b.push(grad(1), base_step=0)
        assert next_weights.result(30)["w"] == [1.0]
        assert a.step_number == 2


def test_closing_while_a_round_is_waited_for_cancels_it_and_leaves_the_contribution(pair, eventually):
    run, a, b = pair
    pending = [a.step_async(grad(1)), a.step_async(grad(10))]
    eventually(lambda: run.status().round is not None)
    a.close()

    for one in pending:
        with pytest.raises(kedge.KedgeError) as error:
            one.result(0)
        assert error.value.reason == "CANCELLED"
    eventually(lambda: [worker.name for worker in run.status().workers] == [b.name])
    assert b.step(grad(3))["w"] == [3 - (1 + 3) / 2]


def test_evicted_worker_hears_of_it_where_it_takes_the_result(new_run, eventually):
    run = new_run(SGD, kedge.Synchronous(2))
    with run.join("a") as a:
        a.pull()
        pending = a.step_async(grad(1))
        eventually(lambda: run.status().round is not None)
        run.evict("a", "it is needed elsewhere")
        with pytest.raises(kedge.errors.LeaseError, match="it is needed elsewhere"):
            pending.result(30)


def test_large_gradients_may_be_overwritten_at_once(new_run):
    count = 700_000  # several chunks
    run = new_run(SGD, kedge.Asynchronous(), params={"w": np.zeros(count, np.float32)})
    with run.join() as worker:
        worker.pull()
        gradient, pending = np.empty(count, np.float32), []
        for value in range(1, 6):
            gradient[:] = value
            pending.append(worker.step_async({"w": gradient}))
            gradient[:] = np.nan
        for value, one in zip(range(1, 6), pending, strict=True):
            np.testing.assert_array_equal(one.result()["w"], np.full(count, -value * (value + 1) / 2, np.float32))
