"""The update: from the gradients of a round and the state of one step to the state of the next.

The state is a run's flat parameters cut into blocks; each block is updated by its own call of one compiled function, so
that nothing of the model's size is built beside the state. Invariants: moments are donated and exist once; weights are
never donated, because snapshots for readers share them; after a lookahead sync fast and slow are the same array.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kedge import optim
from kedge_server.core.optimizers import Moments, Rule, rule_of

HostBlocks = Sequence[np.ndarray]
"""A flat float32 range cut at the same places as the state."""


class Block(NamedTuple):
    """A range of the state: float32 arrays of one length."""

    weights: jax.Array
    moments: Moments
    slow: jax.Array | None
    """The slow weights; None without Lookahead."""


class Scalars(NamedTuple):
    """What a step needs beyond the arrays, each a float32 scalar."""

    lr: np.float32
    weight_decay: np.float32
    grad_clip_value: np.float32
    grad_scale: np.float32 | jax.Array
    """The factor of clipping by global norm: 1 where it does nothing."""
    rule: tuple[np.float32, ...]


class _Kernels(NamedTuple):
    """The compiled functions of one kind of optimizer."""

    fast: Callable[..., tuple[jax.Array, Moments]]
    """(weights, moments, gradients, factors, scalars) -> (weights, moments)"""
    sync: Callable[..., tuple[jax.Array, Moments]]
    """(slow, weights, moments, gradients, factors, scalars) -> (weights and slow weights in one, moments)"""
    aggregate: Callable[..., tuple[jax.Array, jax.Array]]
    """(gradients, factors) -> (mean, its sum of squares)"""


def init_blocks(spec: optim.UpdateSpec, weights: HostBlocks) -> tuple[Block, ...]:
    """The state of step 0: the initial weights, zero moments, slow weights equal to the fast ones."""
    rule = rule_of(spec.base)
    return tuple(_init_block(rule, values, has_slow=spec.sync_period is not None) for values in weights)


def _init_block(rule: Rule, values: np.ndarray, *, has_slow: bool) -> Block:
    weights = jnp.array(values, dtype=jnp.float32, copy=True)
    moments = tuple(jnp.zeros_like(weights) for _ in range(rule.moment_count))
    return Block(weights, moments, weights if has_slow else None)


def apply_round(
    spec: optim.UpdateSpec,
    blocks: tuple[Block, ...],
    gradients: Sequence[HostBlocks],
    *,
    mean_weights: Sequence[float],
    step: int,
) -> tuple[Block, ...]:
    """Applies one round. The moments of `blocks` are consumed: after an error the state is lost.

    Args:
        spec: the optimizer.
        blocks: the state after step - 1.
        gradients: one for each contribution, each cut as the state is.
        mean_weights: the factor of each contribution in the sum.
        step: the number of the step that this makes, from 1.

    Returns:
        The state after the step. The arrays may still be computing.
    """
    kernels = _kernels(_kind(spec))
    factors = tuple(np.float32(weight) for weight in mean_weights)
    scalars = _scalars(spec, step)
    per_block: Sequence[Sequence[np.ndarray | jax.Array]] = list(zip(*gradients, strict=True))
    if spec.grad_clip_norm is not None:
        means, squares = zip(*(kernels.aggregate(parts, factors) for parts in per_block), strict=True)
        scalars = scalars._replace(grad_scale=_clip_scale(squares, np.float32(spec.grad_clip_norm)))
        per_block, factors = [(mean,) for mean in means], (np.float32(1),)
    ends_sync_period = spec.ends_sync_period(step)
    return tuple(
        _advance_block(kernels, block, (parts, factors, scalars), ends_sync_period=ends_sync_period)
        for block, parts in zip(blocks, per_block, strict=True)
    )


def _advance_block(kernels: _Kernels, block: Block, inputs: tuple[Any, ...], *, ends_sync_period: bool) -> Block:
    if ends_sync_period:
        weights, moments = kernels.sync(block.slow, block.weights, block.moments, *inputs)
        return Block(weights, moments, weights)
    weights, moments = kernels.fast(block.weights, block.moments, *inputs)
    return Block(weights, moments, block.slow)


def _scalars(spec: optim.UpdateSpec, step: int) -> Scalars:
    return Scalars(
        lr=np.float32(spec.rate(step - 1)),
        weight_decay=np.float32(spec.weight_decay),
        grad_clip_value=np.float32(spec.grad_clip_value or 0),
        grad_scale=np.float32(1),
        rule=tuple(np.float32(value) for value in rule_of(spec.base).scalars(step)),
    )


class _Kind(NamedTuple):
    """What the compiled functions depend on; everything else is a scalar argument."""

    base: optim.BaseOptimizer
    """Without the options that `optim.UpdateSpec` has itself."""
    decays: bool
    clips_value: bool
    clips_norm: bool
    alpha: float


def _kind(spec: optim.UpdateSpec) -> _Kind:
    bare: dict[str, Any] = {"lr": 0.0, "grad_clip_norm": None, "grad_clip_value": None}
    if not isinstance(spec.base, optim.AdamW):  # whose decay is part of its rule
        bare["weight_decay"] = 0.0
    return _Kind(
        replace(spec.base, **bare),
        decays=spec.weight_decay != 0,
        clips_value=spec.grad_clip_value is not None,
        clips_norm=spec.grad_clip_norm is not None,
        alpha=spec.alpha,
    )


@lru_cache(maxsize=64)
def _kernels(kind: _Kind) -> _Kernels:
    return _Kernels(
        fast=jax.jit(partial(_fast_step, kind), donate_argnums=1),
        sync=jax.jit(partial(_sync_step, kind), donate_argnums=2),
        aggregate=jax.jit(_aggregate),
    )


def _fast_step(
    kind: _Kind,
    weights: jax.Array,
    moments: Moments,
    gradients: Sequence[jax.Array],
    factors: Sequence[jax.Array],
    scalars: Scalars,
) -> tuple[jax.Array, Moments]:
    g = _mean(gradients, factors)
    if kind.clips_norm:
        g = g * scalars.grad_scale
    if kind.clips_value:
        g = jnp.clip(g, -scalars.grad_clip_value, scalars.grad_clip_value)
    if kind.decays:
        g = g + scalars.weight_decay * weights
    direction, moments = rule_of(kind.base).direction(g, weights, moments, scalars.rule)
    return weights - scalars.lr * direction, moments


def _sync_step(kind: _Kind, slow: jax.Array, *arguments: Any) -> tuple[jax.Array, Moments]:
    fast, moments = _fast_step(kind, *arguments)
    return _toward(slow, fast, kind.alpha), moments


def _toward(slow: jax.Array, fast: jax.Array, alpha: float) -> jax.Array:
    """The lookahead sync. At the ends of [0, 1] it must be exact, which the formula is not in floating point."""
    if alpha in (0, 1):
        return fast if alpha else slow
    return slow + alpha * (fast - slow)


def _mean(gradients: Sequence[jax.Array], factors: Sequence[jax.Array]) -> jax.Array:
    total = gradients[0] * factors[0]
    for gradient, factor in zip(gradients[1:], factors[1:], strict=True):
        total = total + gradient * factor
    return total


def _aggregate(gradients: Sequence[jax.Array], factors: Sequence[jax.Array]) -> tuple[jax.Array, jax.Array]:
    mean = _mean(gradients, factors)
    return mean, jnp.sum(jnp.square(mean))


@jax.jit
def _clip_scale(squares: Sequence[jax.Array], max_norm: jax.Array) -> jax.Array:
    norm = jnp.sqrt(jnp.sum(jnp.stack(squares)))
    return jnp.where(norm > max_norm, max_norm / norm, 1.0)
