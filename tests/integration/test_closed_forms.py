"""What theory says of noisy and of delayed gradients, against a real server.

On a/2 x^2 with learning rate lr, q = lr a: a gradient that is tau steps old makes x+ = x - q x_(t-tau). Each element of
the model is a chain of its own, so that the variance over the elements is a stationary one after few steps.
"""

import math
from collections.abc import Callable
from contextlib import ExitStack

import numpy as np
import pytest

import kedge
from kedge import optim
from kedge.client import Client
from kedge.policies import Policy

CHAIN_COUNT = 20_000
SNAPSHOT_COUNT = 12
# The variance of n independent normal values has a relative standard error of sqrt(2 / n): 0.29 % here, of which five
# are allowed. The snapshots are so far apart that the chains have forgotten the one before.
TOLERANCE = 5 * math.sqrt(2 / (CHAIN_COUNT * SNAPSHOT_COUNT))

CreateRun = Callable[..., kedge.Run]


@pytest.fixture
def create_run(client: Client, run_id: str) -> CreateRun:
    def create(weights: np.ndarray, rate: float, aggregation: Policy) -> kedge.Run:
        params = {"x": weights.astype(np.float32)}
        return client.create_run(run_id, params=params, optimizer=optim.SGD(lr=rate), aggregation=aggregation)

    return create


def delayed_descent(
    run: kedge.Run, tau: int, gradient: Callable[[np.ndarray], np.ndarray], step_count: int
) -> list[np.ndarray]:
    """The weights of every step, where each gradient is of the weights of tau steps before (at first, of step 0)."""
    with run.join() as worker:
        weights = [worker.pull()["x"]]
        for step in range(step_count):
            base_step = max(0, step - tau)
            result = worker.push({"x": gradient(weights[base_step])}, base_step=base_step, wait_seconds=30)
            assert (result.outcome, result.step, result.staleness) == ("applied", step + 1, step - base_step)
            weights.append(worker.pull()["x"])
    return weights


def growth(q: float, tau: int) -> float:
    """By what the slowest mode grows in a step: the largest root of z^(tau+1) - z^tau + q."""
    return np.abs(np.roots([1, -1, *[0] * (tau - 1), q])).max()


@pytest.mark.parametrize(("tau", "step_count"), [(1, 200), (2, 300), (4, 500)])
def test_delayed_gradients_are_stable_up_to_the_border_and_no_further(
    create_run: CreateRun, tau: int, step_count: int
) -> None:
    border = 2 * math.sin(math.pi / (2 * (2 * tau + 1)))
    rate = 0.25
    factors = np.array([0.98, 1.02])
    curvatures = factors * border / rate
    run = create_run(np.ones(2), rate, kedge.Asynchronous())
    weights = np.array(delayed_descent(run, tau, lambda old: (curvatures * old).astype(np.float32), step_count))
    period = 2 * (2 * tau + 1)  # of the oscillation at the border
    energy = [np.sum(weights[at : at + period] ** 2, axis=0) for at in (5 * period, len(weights) - period)]
    below, above = np.sqrt(energy[1] / energy[0])
    assert below < 0.7, "just below the border it decays"
    assert above > 1 / 0.7, "just above it grows"
    steps = len(weights) - 6 * period
    expected = [steps * math.log(growth(factor * border, tau)) for factor in factors]
    np.testing.assert_allclose(np.log([below, above]), expected, rtol=0.03)


def variance_at_rest(weights: list[np.ndarray], settled: int, apart: int) -> float:
    """The mean square over all chains and snapshots. The mean of x is zero."""
    snapshots = weights[settled::apart][:SNAPSHOT_COUNT]
    assert len(snapshots) == SNAPSHOT_COUNT
    return float(np.mean(np.square(snapshots, dtype=np.float64)))


def test_gradients_one_step_late_settle_at_the_variance_of_the_closed_form(create_run: CreateRun) -> None:
    q, sigma = 0.5, 1.0
    rng = np.random.default_rng(20_261_122)
    run = create_run(np.zeros(CHAIN_COUNT), q, kedge.Asynchronous())

    def gradient(old: np.ndarray) -> np.ndarray:
        return old - np.float32(sigma) * rng.standard_normal(CHAIN_COUNT, np.float32)

    # A chain keeps sqrt(q) of what it was in a step: 4e-6 of its variance in 36, and in 8 so little that the squares
    # of two snapshots are correlated by less than 0.01.
    weights = delayed_descent(run, 1, gradient, 36 + 8 * (SNAPSHOT_COUNT - 1))
    expected = q**2 * sigma**2 * (1 + q) / ((1 - q) * ((1 + q) ** 2 - 1))
    assert variance_at_rest(weights, 36, 8) == pytest.approx(expected, rel=TOLERANCE)


@pytest.mark.parametrize("worker_count", [1, 2, 5])
def test_synchronous_workers_settle_at_the_variance_of_one_over_their_number(
    create_run: CreateRun, worker_count: int
) -> None:
    rate, sigma, apart = 0.5, 1.0, 5  # a chain keeps half of what it was in a step
    rng = np.random.default_rng(worker_count)
    run = create_run(np.zeros(CHAIN_COUNT), rate, kedge.Synchronous(worker_count))
    weights = [run.pull()["x"]]
    with ExitStack() as leases:
        workers = [leases.enter_context(run.join()) for _ in range(worker_count)]
        for step in range(12 + apart * (SNAPSHOT_COUNT - 1)):
            for worker in workers:
                noise = np.float32(sigma) * rng.standard_normal(CHAIN_COUNT, np.float32)
                worker.push({"x": weights[-1] - noise}, base_step=step)
            weights.append(run.pull(min_step=step + 1)["x"])
    of_one = rate**2 * sigma**2 / (1 - (1 - rate) ** 2)
    assert variance_at_rest(weights, 12, apart) == pytest.approx(of_one / worker_count, rel=TOLERANCE)
