"""The noisy quadratic: the stationary variance of optimizers on a/2 (x - c)^2, with c normal and new at each gradient.

Each element of one long tensor is a chain of its own, so that the variance over the elements is the one looked for,
with a known standard error. The seeds are fixed: the same server gives the same numbers.

Source: arXiv:1907.08610, its analysis of the noisy quadratic.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import NamedTuple

import numpy as np

from kedge.optim import SGD, Lookahead
from kedge.policies import Synchronous
from kedge.verify.bench import Bench, Row, pulled, row, walk

CHAIN_COUNT = 200_000
_SEED = 20_261_122
_WORKER_COUNT = 4

# The variance of n independent normal values is found with a relative standard error of sqrt(2 / n).
_TOLERANCE = 5 * math.sqrt(2 / CHAIN_COUNT)


class Setting(NamedTuple):
    """A quadratic, and Lookahead around SGD on it."""

    curvature: float
    sigma: float
    """The standard deviation of c."""
    rate: float
    sync_period: int
    alpha: float


SETTINGS = (Setting(1.0, 1.0, 0.5, 5, 0.5), Setting(1.0, 1.0, 0.1, 5, 0.5), Setting(2.0, 1.0, 0.3, 10, 0.5))


def noisy_quadratic(bench: Bench) -> Iterator[Row]:
    """Lookahead's slow weights settle at a share of SGD's variance."""
    for index, setting in enumerate(SETTINGS):
        curvature, sigma, rate, sync_period, alpha = setting
        optimizer = Lookahead(SGD(lr=rate), sync_period=sync_period, alpha=alpha)
        gradient = _gradient(curvature, _noise(sigma, seed=_SEED + index))
        with bench.run(f"quadratic-{index}", np.zeros(CHAIN_COUNT), optimizer) as run:
            last_step = sync_period * _settling_periods(setting)
            ((_, weights),) = walk(run, gradient, [last_step])
        expected = lookahead_variance(setting)
        check = f"Lookahead's variance, a = {curvature:g}, lr = {rate:g}, k = {sync_period}"
        yield row(check, expected=expected, got=np.var(weights, dtype=float), tolerance=_TOLERANCE * expected)


def mean_of_workers(bench: Bench) -> Iterator[Row]:
    """Averaged over N workers' gradients, SGD settles at the variance of noise of sigma^2 / N."""
    sigma, rate, step_count = 1.0, 0.5, 20  # of the start, 0.5^20 is left
    noise = _noise(sigma, seed=_SEED)
    everyone = Synchronous(quorum=_WORKER_COUNT)
    with bench.run("workers", np.zeros(CHAIN_COUNT), SGD(lr=rate), everyone) as run, ExitStack() as leases:
        workers = [leases.enter_context(run.join()) for _ in range(_WORKER_COUNT)]
        weights = run.pull()
        for step in range(step_count):
            if np.isnan(weights).any():
                break
            for worker in workers:
                worker.push(weights - noise(), base_step=step)
            weights = pulled(run, step + 1)
    expected = sgd_variance(1.0, sigma / math.sqrt(_WORKER_COUNT), rate)
    check = f"SGD's variance, mean of {_WORKER_COUNT} workers"
    yield row(check, expected=expected, got=np.var(weights, dtype=float), tolerance=_TOLERANCE * expected)


def sgd_variance(curvature: float, sigma: float, rate: float) -> float:
    """SGD's stationary variance."""
    kept = 1 - rate * curvature
    return (rate * curvature * sigma) ** 2 / (1 - kept**2)


def lookahead_variance(setting: Setting) -> float:
    """The stationary variance of Lookahead's slow weights, which after a lookahead sync the fast ones are too."""
    curvature, sigma, rate, sync_period, alpha = setting
    kept = (1 - rate * curvature) ** sync_period
    share = alpha * (1 + kept) / (2 - alpha * (1 - kept))
    return share * sgd_variance(curvature, sigma, rate)


def _settling_periods(setting: Setting) -> int:
    """The sync periods until all but a ten thousandth of the variance is there, starting from none."""
    kept = 1 - setting.alpha * (1 - (1 - setting.rate * setting.curvature) ** setting.sync_period)
    return math.ceil(math.log(1e-4) / (2 * math.log(kept)))


def _gradient(curvature: float, noise: Callable[[], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    return lambda weights: np.float32(curvature) * (weights - noise())


def _noise(sigma: float, *, seed: int) -> Callable[[], np.ndarray]:
    """Draws c for all chains."""
    rng = np.random.default_rng(seed)
    return lambda: np.float32(sigma) * rng.standard_normal(CHAIN_COUNT, np.float32)
