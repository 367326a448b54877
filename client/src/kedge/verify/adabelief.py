"""AdaBelief against what its recursion adds up to. Source: arXiv:2010.07468, algorithm 2, with the new m in (g - m)."""

import math
from collections.abc import Iterator

import numpy as np

from kedge.optim import AdaBelief
from kedge.verify.bench import AT_ONCE, ROUNDING, Bench, Row, pulled, row, walk

# The defaults, written out: what is expected must not move with what is asked for.
_B1, _B2, _EPS = 0.9, 0.999, 1e-16
_BETAS = (_B1, _B2)

_FIRST_GRADIENTS = (1.0, -0.01, 1000.0, -3e4, 1e-7)
_CONSTANT_GRADIENTS = np.array([1.0, -0.01, 1000.0, -3e4], np.float32)
_TIMES = (2, 10, 100, 1000)
_LATE_TIMES = (5000,)

_BEALE_START = (-2.5, -2.5)
_BEALE_STOPS = {2000: (-0.40362, -1.15996)}
_LATE_BEALE_STOPS = {5000: (0.86699, -1.03216), 10_000: (2.63682, 0.39015), 20_000: (3.0, 0.5)}


def first_step(bench: Bench) -> Iterator[Row]:
    """The first step over the rate: 1/b1 whatever the gradient, until eps counts."""
    gradients = np.array(_FIRST_GRADIENTS, np.float32)
    with bench.run("first-step", np.zeros_like(gradients), _adabelief(lr=1.0)) as run:
        ((_, weights),) = walk(run, lambda _: gradients, [1])
    for gradient, weight in zip(_FIRST_GRADIENTS, weights, strict=True):
        expected = step_over_rate(gradient, 1)
        check = f"AdaBelief, first step / lr, g = {gradient:g}"
        yield row(check, expected=expected, got=-weight, tolerance=16 * ROUNDING * abs(expected))


def constant_gradient(bench: Bench) -> Iterator[Row]:
    """The step t over the rate where every gradient is the same: of all magnitudes the one that is farthest off."""
    gradients = _CONSTANT_GRADIENTS
    times = _TIMES + (_LATE_TIMES if bench.full else ())
    with bench.run("constant", np.zeros_like(gradients), _adabelief(lr=1.0), AT_ONCE) as run, run.join() as worker:
        pushed_count = 0
        for time in times:
            for _ in range(pushed_count, time - 1):
                worker.push(gradients, base_step=0)
            before = pulled(run, time - 1)
            worker.push(gradients, base_step=0)
            steps = (before - pulled(run, time)) * np.sign(gradients)
            pushed_count = time
            expected = step_over_rate(1.0, time)
            farthest = steps[np.argmax(np.abs(steps - expected))]
            check = f"AdaBelief, constant gradient, step {time} / lr"
            yield row(check, expected=expected, got=farthest, tolerance=_constant_tolerance(time))


def beale(bench: Bench) -> Iterator[Row]:
    """Where AdaBelief is on the Beale function, whose minimum is at (3, 0.5)."""
    stops = _BEALE_STOPS | (_LATE_BEALE_STOPS if bench.full else {})
    with bench.run("beale", _BEALE_START, _adabelief(lr=1e-3)) as run:
        for step, weights in walk(run, _beale_gradient, list(stops)):
            # Half a digit of what is published, and the rounding of the weights, at most 1.2e-7 a step, most of which
            # the descent forgets: 1.3e-6 is left of it after 2000 steps, 2.3e-5 at most later.
            tolerance = 1e-5 if step <= 2000 else 5e-5
            yield row(f"AdaBelief on Beale, step {step}", expected=stops[step], got=weights, tolerance=tolerance)


def step_over_rate(gradient: float, time: int) -> float:
    """The step `time` over the rate where every gradient has been `gradient`: the geometric sums, summed.

    mhat is g. g - m is g b1^i at step i, so shat is the sum of (1-b2) b2^(t-i) g^2 b1^(2i) and of b2^(t-i) eps, over
    1 - b2^t.
    """
    decayed = _B1**2 * (_B2**time - _B1 ** (2 * time)) / (_B2 - _B1**2)
    second = (1 - _B2) * gradient**2 * decayed / (1 - _B2**time) + _EPS / (1 - _B2)
    return gradient / (math.sqrt(second) + _EPS)


def _constant_tolerance(time: int) -> float:
    """Once the deviation has gone s only shrinks by b2, and each product rounds: t roundings of s are t/2 of its root.

    The step is read off as a difference of weights, which have rounded too: they are the sum of all steps.
    """
    weight = sum(step_over_rate(1.0, t) for t in range(1, time + 1))
    return ROUNDING * ((16 + time / 2) * step_over_rate(1.0, time) + 2 * weight)


def _adabelief(lr: float) -> AdaBelief:
    return AdaBelief(lr=lr, betas=_BETAS, eps=_EPS)


def _beale_gradient(point: np.ndarray) -> np.ndarray:
    """Of (1.5 - x + xy)^2 + (2.25 - x + xy^2)^2 + (2.625 - x + xy^3)^2, in float64."""
    x, y = (float(value) for value in point)
    by_x = by_y = 0.0
    for power, constant in enumerate((1.5, 2.25, 2.625), start=1):
        residual = constant - x + x * y**power
        by_x += 2 * residual * (y**power - 1)
        by_y += 2 * residual * power * x * y ** (power - 1)
    return np.array([by_x, by_y])
