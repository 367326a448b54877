"""Lookahead's two sets of weights, by hand and by what they are equal to. Source: arXiv:1907.08610, algorithm 1."""

from collections.abc import Callable, Iterator

import numpy as np

from kedge.optim import SGD, AdaBelief, Lookahead, Optimizer
from kedge.verify.bench import ROUNDING, Bench, Row, row, walk

_COUNT = 10_000
_STEPS = 12
_SEED = 1


def by_hand(bench: Bench) -> Iterator[Row]:
    """From 3 by steps of 1, with a lookahead sync halfway back at every second one."""
    optimizer = Lookahead(SGD(lr=1.0), sync_period=2, alpha=0.5)
    fast, slow = [], []
    with bench.run("by-hand", [3.0], optimizer) as run:
        for _, weights in walk(run, np.ones_like, [1, 2, 3, 4]):
            fast.append(weights[0])
            slow.append(run.pull("slow")[0])
    yield row("Lookahead from 3, k = 2, fast weights", expected=[2, 2, 1, 1], got=fast)
    yield row("Lookahead from 3, k = 2, slow weights", expected=[3, 2, 2, 1], got=slow)


def parting_and_meeting(bench: Bench) -> Iterator[Row]:
    """Elements that moved: the slow weights stand still until the lookahead sync, and are the fast ones' bits then."""
    start = _random_weights()
    with bench.run("parting", start, Lookahead(AdaBelief(lr=1e-2), sync_period=5, alpha=0.5)) as run:
        before, after = [run.snapshot() for _ in walk(run, _gradients(), [4, 5])]
    moved = _differing(before.fast, start), _differing(before.slow, start)
    yield row("Lookahead before a sync: fast, slow have moved", expected=(_COUNT, 0), got=moved)
    moved = _differing(after.slow, start), _differing(after.fast, after.slow)
    yield row("Lookahead after a sync: slow moved, fast apart", expected=(_COUNT, 0), got=moved)


def equivalences(bench: Bench) -> Iterator[Row]:
    """Two runs with the same gradients that are to go the same way."""
    # The weights stay below 6. In a step each run rounds them twice, by 6 ROUNDING at most.
    tolerance = 4 * _STEPS * 6 * ROUNDING
    base = AdaBelief(lr=1e-2)
    apart = _largest_difference(bench, "alpha-1", (base, Lookahead(base, sync_period=5, alpha=1.0)))
    yield row("Lookahead(AdaBelief, alpha = 1) - AdaBelief", expected=0, got=apart, tolerance=tolerance)
    pair = SGD(lr=0.05), Lookahead(SGD(lr=0.1), sync_period=1, alpha=0.5)
    apart = _largest_difference(bench, "k-1", pair)
    yield row("Lookahead(SGD, k = 1) - SGD of alpha lr", expected=0, got=apart, tolerance=tolerance)


def _largest_difference(bench: Bench, name: str, optimizers: tuple[Optimizer, Optimizer]) -> float:
    """Between the fast weights of two runs, at any step; NaN if one of them does not go on."""
    stops = range(1, _STEPS + 1)
    with (
        bench.run(f"{name}-one", _random_weights(), optimizers[0]) as one,
        bench.run(f"{name}-other", _random_weights(), optimizers[1]) as other,
    ):
        pairs = zip(walk(one, _gradients(), stops), walk(other, _gradients(), stops), strict=True)
        return float(np.max([np.abs(a - b) for (_, a), (_, b) in pairs]))


def _differing(one: np.ndarray, other: np.ndarray) -> int:
    """How many elements do not have the same bits."""
    return int(np.count_nonzero(one.view(np.uint32) != other.view(np.uint32)))


def _random_weights() -> np.ndarray:
    return np.random.default_rng(_SEED).standard_normal(_COUNT, np.float32)


def _gradients() -> Callable[[np.ndarray], np.ndarray]:
    """Random gradients, the same in every walk."""
    rng = np.random.default_rng(_SEED + 1)
    return lambda _: rng.standard_normal(_COUNT, np.float32)
