"""What a round's gradients become: trimmed means, medians, sums whose bits do not depend on who came first."""

import contextlib
import itertools

import numpy as np
import pytest

import kedge
from kedge import optim

SGD = optim.SGD(lr=1.0)

GIVEN = {
    "a": (1, 10, -4),
    "b": (2, -50, 0),
    "c": (6, 20, 7),
    "d": (100, 45, 2),
    "e": (-7, 60, 1000),
}
"""Sorted: -7 1 2 6 100; -50 10 20 45 60; -4 0 2 7 1000."""


def grad(*values):
    return {"w": np.array(values, np.float32)}


def zeros(count):
    return {"w": np.zeros(count, np.float32)}


@pytest.mark.parametrize(
    ("combine", "expected"),
    [
        ({"combine": "trimmed_mean"}, [3, 25, 3]),  # (1 + 2 + 6) / 3, (10 + 20 + 45) / 3, (0 + 2 + 7) / 3
        ({"combine": "trimmed_mean", "trim_count": 2}, [2, 20, 2]),
        ({"combine": "median"}, [2, 20, 2]),
    ],
)
@pytest.mark.parametrize("policy", [kedge.Synchronous, kedge.Buffered])
def test_each_element_is_combined_by_itself_whatever_the_example_counts(
    new_run, numbered_worker, policy, combine, expected
):
    run = new_run(SGD, policy(5, **combine), zeros(3))
    workers = {name: numbered_worker(run, name) for name in GIVEN}
    for count, (name, values) in enumerate(GIVEN.items(), 1):
        workers[name].push(1, *values, example_count=count)

    assert run.pull()["w"].tolist() == pytest.approx([-value for value in expected])


def test_median_of_an_even_number_is_the_mean_of_the_two_in_the_middle(new_run, numbered_worker):
    run = new_run(SGD, kedge.Synchronous(4, combine="median"), zeros(1))
    for name, value in zip("abcd", (9, 1, 4, 2), strict=True):
        numbered_worker(run, name).push(1, value)

    assert run.pull()["w"] == [-3.0]


def test_loss_of_a_median_is_still_the_mean_weighted_by_example_count(new_run, numbered_worker):
    run = new_run(SGD, kedge.Synchronous(3, combine="median"), zeros(1))
    for name, loss, count in (("a", 1.0, 1), ("b", None, 5), ("c", 4.0, 3)):
        numbered_worker(run, name).push(1, 0, loss=loss, example_count=count)

    assert run.status().loss == (1 * 1 + 3 * 4) / 4


@pytest.mark.parametrize("combine", ["median", "trimmed_mean"])
def test_round_that_times_out_with_too_few_is_refused(new_run, combine):
    run = new_run(SGD, kedge.Synchronous(3, combine=combine, timeout_seconds=0.1))
    with run.join("a") as a, run.join("b") as b, run.join("c") as c:
        assert a.push(grad(1), base_step=0, wait_seconds=60)[:4] == ("rejected", "COHORT_TOO_SMALL", 0, 0)
        assert run.pull()["w"] == [3.0]
        status = run.status()
        assert (status.step, status.applied_count, status.round) == (0, 0, None)
        assert status.rejected_counts == {"COHORT_TOO_SMALL": 1}
        assert [(w.last_sequence, w.rejected_count) for w in status.workers] == [(1, 1), (0, 0), (0, 0)]

        run.set_aggregation(kedge.Synchronous(3, combine=combine))
        for worker in (a, b, c):
            result = worker.push(grad(1), base_step=0)
        assert result[:3] == ("applied", "QUORUM_REACHED", 1)
    assert run.pull()["w"] == [2.0]


def test_step_in_a_refused_round_warns_and_goes_on_with_the_weights_there_are(new_run, caplog):
    run = new_run(SGD, kedge.Synchronous(3, combine="median", timeout_seconds=0.1))
    with run.join() as worker:
        worker.pull()
        assert worker.step(grad(1))["w"] == [3.0]
        assert worker.last_result.reason == "COHORT_TOO_SMALL"
    assert "COHORT_TOO_SMALL" in caplog.text


SIZE = 33


def disparate(seed):
    """Gradients whose sum depends on its order: in the first element on every bit, elsewhere on the last ones."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((3, SIZE)) * 10.0 ** rng.integers(-6, 6, (3, SIZE))
    values[:, 0] = 1e17, -1e17, 1.0
    return values.astype(np.float32)


def weights_after(client, name, policy, pushes):
    """The bytes of the weights after pushes of (worker, gradient) in that order."""
    run = client.create_run(name, params=zeros(SIZE), optimizer=SGD, aggregation=policy)
    with contextlib.ExitStack() as stack:
        workers = {who: stack.enter_context(run.join(who)) for who in "abc"}
        for who, gradient in pushes:
            workers[who].push({"w": gradient}, base_step=0)
    return run.pull()["w"].tobytes()


def test_sum_is_the_same_to_the_last_bit_whoever_came_first(client, run_name):
    pushes = list(zip("abc", disparate(1), strict=True))
    results = {
        weights_after(client, f"{run_name}-{number}", kedge.Synchronous(3), order)
        for number, order in enumerate(itertools.permutations(pushes))
    }

    (result,) = results
    naive = -np.mean([gradient for _, gradient in pushes], axis=0, dtype=np.float64)
    np.testing.assert_allclose(np.frombuffer(result, np.float32)[1:], naive[1:], rtol=1e-5, atol=1e-5)


def test_sum_of_a_buffer_is_in_the_order_of_workers_and_their_sequences(client, run_name):
    first, second, other = disparate(2)
    orders = [
        [("a", first), ("a", second), ("b", other)],
        [("a", first), ("b", other), ("a", second)],
        [("b", other), ("a", first), ("a", second)],
    ]
    results = {
        weights_after(client, f"{run_name}-{number}", kedge.Buffered(3), order) for number, order in enumerate(orders)
    }

    assert len(results) == 1


def test_sum_in_the_order_of_arrival_is_the_same_mean(new_run, numbered_worker):
    run = new_run(SGD, kedge.Synchronous(2, deterministic=False), zeros(1))
    numbered_worker(run, "b").push(1, 1, example_count=1)
    numbered_worker(run, "a").push(1, 4, example_count=3)

    assert run.pull()["w"] == [-(1 * 1 + 3 * 4) / 4]
