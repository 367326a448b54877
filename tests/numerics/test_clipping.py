"""The clips by themselves: the global norm over millions of elements and many blocks, and what counts as too large."""

import numpy as np
import pytest

from kedge import optim

from . import harness

MILLION = 1 << 20


def normal(rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal(MILLION, np.float32)


def positive(rng: np.random.Generator) -> np.ndarray:
    """All squares alike: a running float32 sum would be 3e-3 off here."""
    return 0.1 + 1e-3 * rng.random(MILLION, np.float32)


def six_decades(_rng: np.random.Generator) -> np.ndarray:
    return (10.0 ** -np.linspace(0, 6, MILLION)).astype(np.float32)


def one_among_many(_rng: np.random.Generator) -> np.ndarray:
    """One element whose square is as large as all others' together; a running float32 sum would be 2.6e-2 off."""
    gradient = np.full(MILLION, 1e-2, np.float32)
    gradient[0] = 10.24
    return gradient


CUTS = {
    "one block": (MILLION,),
    "16 blocks": (MILLION // 16,) * 16,
    "uneven blocks": (1, MILLION // 2, 999, MILLION // 2 - 1000),
}


def clipped(gradient: np.ndarray, sizes: tuple[int, ...], limit: float) -> np.ndarray:
    """The gradient after the clip: what SGD at rate 1 takes from weights of zero."""
    optimizer = optim.SGD(lr=1.0, grad_clip_norm=limit)
    zeros = np.zeros_like(gradient)
    (weights,) = harness.trajectory(optimizer, zeros, [(gradient,)], sizes=sizes)
    return -weights.fast


@pytest.mark.parametrize("sizes", CUTS.values(), ids=CUTS.keys())
@pytest.mark.parametrize("make", [normal, positive, six_decades, one_among_many])
def test_a_million_elements_are_clipped_to_the_norm_that_float64_finds(make, sizes: tuple[int, ...]) -> None:
    gradient = make(np.random.default_rng(5))
    exact = np.linalg.norm(gradient.astype(np.float64))
    limit = float(np.float32(exact / 3))
    got = clipped(gradient, sizes, limit)
    # Found: at most 1.3e-7, which is two roundings: the compiled sum is a tree.
    assert np.linalg.norm(got.astype(np.float64)) == pytest.approx(limit, rel=1e-6)
    np.testing.assert_allclose(got, gradient * (limit / exact), rtol=1e-6)


@pytest.mark.parametrize("sizes", CUTS.values(), ids=CUTS.keys())
def test_a_norm_below_the_limit_changes_no_bit(sizes: tuple[int, ...]) -> None:
    gradient = normal(np.random.default_rng(6))
    limit = float(np.linalg.norm(gradient.astype(np.float64))) * 1.00001
    assert harness.same_bits(clipped(gradient, sizes, limit), gradient)


def test_the_norm_is_that_of_the_mean_not_of_the_contributions() -> None:
    # Two opposite gradients of norm 50 whose mean, (0.6, 0.8), has norm 1.
    first, second = np.array([30.6, 40.8], np.float32), np.array([-29.4, -39.2], np.float32)
    optimizer = optim.SGD(lr=1.0, grad_clip_norm=0.5)
    (weights,) = harness.trajectory(optimizer, np.zeros(2, np.float32), [(first, second)], factors=[0.5, 0.5])
    np.testing.assert_allclose(weights.fast, [-0.3, -0.4], rtol=1e-5)


def test_the_norm_is_clipped_before_the_elements() -> None:
    # (3, 4) to norm 1 is (.6, .8), to .7 is (.6, .7); the other way round it would be (.7, .7) and stay.
    optimizer = optim.SGD(lr=1.0, grad_clip_norm=1.0, grad_clip_value=0.7)
    (weights,) = harness.trajectory(optimizer, np.zeros(2, np.float32), [(np.array([3, -4], np.float32),)])
    np.testing.assert_allclose(weights.fast, [-0.6, 0.7], rtol=1e-6)


def test_coupled_decay_comes_after_the_clips() -> None:
    # Were it clipped too, the step would be 1 and not 1 + 0.5 * 10.
    optimizer = optim.SGD(lr=1.0, grad_clip_norm=1.0, grad_clip_value=1.0, weight_decay=0.5)
    (weights,) = harness.trajectory(optimizer, np.array([10.0], np.float32), [(np.array([100.0], np.float32),)])
    assert weights.fast[0] == pytest.approx(4.0, rel=1e-6)


def test_a_gradient_of_zeros_has_nothing_to_clip() -> None:
    zeros = np.zeros(7, np.float32)
    assert harness.same_bits(-clipped(zeros, (3, 4), 1.0), zeros)


def test_the_callers_gradients_are_only_read() -> None:
    gradient = np.linspace(-1, 1, 64, dtype=np.float32)
    gradient.flags.writeable = False
    before = gradient.copy()
    optimizer = optim.AdaBelief(grad_clip_norm=0.5, grad_clip_value=0.1, weight_decay=0.1)
    blocks = harness.state_of(optimizer, np.ones(64, np.float32))
    harness.advance_round(optimizer, blocks, [gradient, gradient], 1, factors=[0.5, 0.5])
    assert harness.same_bits(gradient, before)
