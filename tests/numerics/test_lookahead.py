"""Lookahead's two sets of weights: when they are one, when they part, and what cannot reach the slow ones."""

from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np
import pytest

from kedge import optim
from kedge_server.core import update

from . import harness

SIZES = (13, 1, 19)
COUNT = sum(SIZES)

Blocks = tuple[update.Block, ...]

OPTIMIZERS = [
    optim.Lookahead(optim.AdaBelief(lr=0.01), sync_period=5, alpha=0.5),
    optim.Lookahead(optim.SGD(lr=0.02, momentum=0.9), sync_period=3, alpha=0.3),
    optim.Lookahead(optim.AdamW(lr=0.01, grad_clip_norm=1.0), sync_period=7, alpha=0.9),
    optim.Lookahead(optim.Adam(lr=optim.StepLR(0.01, 10, 0.5)), sync_period=2, alpha=0.1),
]
each_optimizer = pytest.mark.parametrize(
    "optimizer", OPTIMIZERS, ids=["adabelief", "momentum", "adamw_clip_norm", "adam_step_lr"]
)


def initial(optimizer: optim.Optimizer) -> Blocks:
    weights = np.random.default_rng(3).normal(size=COUNT)
    return harness.state_of(optimizer, weights, SIZES)


def gradient_of(step: int) -> np.ndarray:
    return np.random.default_rng(step).normal(size=COUNT).astype(np.float32)


def advance(optimizer: optim.Optimizer, blocks: Blocks, step: int) -> Blocks:
    return harness.advance(optimizer, blocks, gradient_of(step), step)


def walk(optimizer: optim.Lookahead, periods: int) -> Iterator[tuple[int, harness.Weights, harness.Weights]]:
    """Step number, the weights before it and the weights after it."""
    blocks = initial(optimizer)
    for step in range(1, periods * optimizer.sync_period + 1):
        before = harness.joined(blocks)
        blocks = advance(optimizer, blocks, step)
        yield step, before, harness.joined(blocks)


@each_optimizer
def test_fast_and_slow_begin_as_the_initial_weights(optimizer: optim.Lookahead) -> None:
    weights = harness.joined(initial(optimizer))
    assert harness.same_bits(weights.fast, weights.slow)
    assert harness.same_bits(weights.fast, np.random.default_rng(3).normal(size=COUNT).astype(np.float32))


@each_optimizer
def test_fast_and_slow_are_the_same_bits_after_each_lookahead_sync_and_at_no_other_step(
    optimizer: optim.Lookahead,
) -> None:
    for step, _, after in walk(optimizer, periods=12):
        assert harness.same_bits(after.fast, after.slow) == (step % optimizer.sync_period == 0)


@each_optimizer
def test_fast_and_slow_share_their_memory_after_a_lookahead_sync(optimizer: optim.Lookahead) -> None:
    blocks = initial(optimizer)
    for step in range(1, optimizer.sync_period + 1):
        blocks = advance(optimizer, blocks, step)
    assert all(block.weights is block.slow for block in blocks)


@each_optimizer
def test_slow_weights_change_at_a_lookahead_sync_and_keep_their_bits_between(optimizer: optim.Lookahead) -> None:
    for step, before, after in walk(optimizer, periods=12):
        assert harness.same_bits(before.slow, after.slow) == (step % optimizer.sync_period != 0)
        assert not np.array_equal(before.fast, after.fast)


@each_optimizer
def test_the_lookahead_sync_goes_alpha_of_the_way(optimizer: optim.Lookahead) -> None:
    period, alpha = optimizer.sync_period, optimizer.alpha
    unsynced = optim.Lookahead(optimizer.base_optimizer, sync_period=10**6, alpha=alpha)
    blocks, free = initial(optimizer), initial(unsynced)
    for step in range(1, period + 1):
        blocks, free = advance(optimizer, blocks, step), advance(unsynced, free, step)
    ahead = harness.joined(free)
    assert ahead.slow is not None
    slow = ahead.slow.astype(np.float64)
    want = slow + alpha * (ahead.fast - slow)
    np.testing.assert_allclose(harness.joined(blocks).fast, want, rtol=0, atol=4 * 2.0**-24 * np.abs(want).max())


@each_optimizer
def test_moments_are_kept_across_a_lookahead_sync(optimizer: optim.Lookahead) -> None:
    unsynced = optim.Lookahead(optimizer.base_optimizer, sync_period=10**6, alpha=optimizer.alpha)
    blocks, free = initial(optimizer), initial(unsynced)
    for step in range(1, optimizer.sync_period + 1):
        blocks, free = advance(optimizer, blocks, step), advance(unsynced, free, step)
    for synced, going_on in zip(blocks, free, strict=True):
        for kept, reference in zip(synced.state, going_on.state, strict=True):
            assert harness.same_bits(np.asarray(kept), np.asarray(reference))


@each_optimizer
@pytest.mark.parametrize("taken_at", [1, 4, 6])
def test_a_state_copied_mid_period_goes_on_bit_for_bit_with_its_phase(
    optimizer: optim.Lookahead, taken_at: int
) -> None:
    blocks = initial(optimizer)
    for step in range(1, taken_at + 1):
        blocks = advance(optimizer, blocks, step)
    restored = tuple(copied(block) for block in blocks)
    for step in range(taken_at + 1, taken_at + 16):
        blocks, restored = advance(optimizer, blocks, step), advance(optimizer, restored, step)
        want, got = harness.joined(blocks), harness.joined(restored)
        assert harness.same_bits(want.fast, got.fast)
        assert harness.same_bits(want.slow, got.slow)


def copied(block: update.Block) -> update.Block:
    """As storage gives it back: every array its own."""
    fresh = [jnp.array(np.array(array), copy=True) for array in (block.weights, *block.state, block.slow)]
    return update.Block(fresh[0], tuple(fresh[1:-1]), fresh[-1])


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@each_optimizer
def test_non_finite_fast_weights_do_not_reach_the_slow_ones_between_lookahead_syncs(
    optimizer: optim.Lookahead, poison: float
) -> None:
    blocks = initial(optimizer)
    want = harness.joined(blocks).slow
    poisoned = blocks[0].weights.at[5].set(poison)
    blocks = (blocks[0]._replace(weights=poisoned), *blocks[1:])
    for step in range(1, optimizer.sync_period):
        blocks = advance(optimizer, blocks, step)
        got = harness.joined(blocks)
        assert not np.isfinite(got.fast[5])
        assert harness.same_bits(got.slow, want)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_a_non_finite_fast_weight_reaches_no_other_element_at_a_lookahead_sync(alpha: float) -> None:
    optimizer = optim.Lookahead(optim.AdaBelief(lr=0.01), sync_period=1, alpha=alpha)
    clean, blocks = initial(optimizer), initial(optimizer)
    poisoned = blocks[0].weights.at[5].set(np.nan)
    blocks = (blocks[0]._replace(weights=poisoned), *blocks[1:])
    want, got = harness.joined(advance(optimizer, clean, 1)), harness.joined(advance(optimizer, blocks, 1))
    others = np.arange(COUNT) != 5
    assert harness.same_bits(got.fast, got.slow)
    assert harness.same_bits(got.fast[others], want.fast[others])
    # With alpha 0 even the poisoned element comes back to its slow weight: 0 * NaN is not computed.
    assert np.isfinite(got.fast[5]) == (alpha == 0)


def test_a_snapshot_keeps_its_bits_while_later_steps_are_applied() -> None:
    optimizer = OPTIMIZERS[0]
    blocks = initial(optimizer)
    snapshots, copies = [], []
    for step in range(1, 12):
        blocks = advance(optimizer, blocks, step)
        snapshots.append([(np.asarray(block.weights), np.asarray(block.slow)) for block in blocks])
        copies.append(harness.joined(blocks))
    for snapshot, want in zip(snapshots, copies, strict=True):
        assert harness.same_bits(np.concatenate([fast for fast, _ in snapshot]), want.fast)
        assert harness.same_bits(np.concatenate([slow for _, slow in snapshot]), want.slow)


def test_the_initial_weights_are_copied_and_the_callers_array_may_change() -> None:
    mine = aligned_ones(4096)
    blocks = harness.state_of(OPTIMIZERS[0], mine)
    mine[:] = 7
    fast, slow = harness.joined(blocks)
    assert slow is not None
    assert fast.max() == slow.max() == 1


def aligned_ones(count: int) -> np.ndarray:
    """At a multiple of 64 bytes, which is what JAX on the CPU takes without a copy if it may."""
    room = np.zeros(4 * count + 64, np.uint8)
    start = -room.ctypes.data % 64
    ones = room[start : start + 4 * count].view(np.float32)
    ones[:] = 1
    return ones
