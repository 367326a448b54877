"""The update: from the gradients of a round and the state of one step to the state of the next.

The state is a run's flat parameters cut into blocks; each block is updated by its own call of one compiled function, so
that nothing of the model's size is built beside the state. Invariants: a rule's state is donated and exists once;
weights are never donated, because snapshots for readers share them; after a lookahead sync fast and slow are the same
array.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kedge import optim
from kedge.optim.controls import StepValues
from kedge_server.core.plan import BlockPlan, Plan, Shape
from kedge_server.core.rules import State, StepScalars, Tensors, rule_of

HostBlocks = Sequence[np.ndarray]
"""A flat float32 range cut at the same places as the state."""


class Block(NamedTuple):
    """A range of the state."""

    weights: jax.Array
    """float32, flat."""
    state: State
    """The rule's; None where the weights are frozen."""
    slow: jax.Array | None
    """The slow weights, float32, flat; None without Lookahead."""


class Scalars(NamedTuple):
    """What a step needs beyond the arrays, each a float32 scalar."""

    weight_decay: np.float32
    grad_clip_value: np.float32
    """Infinite where it does nothing."""
    grad_scale: np.float32 | jax.Array
    """The factor of clipping by norm: 1 where it does nothing."""
    rule: StepScalars


class _Kind(NamedTuple):
    """What the compiled functions depend on. All else is a scalar argument, so that changing it compiles nothing."""

    rule: optim.Rule
    shapes: tuple[Shape, ...] | None
    alpha: float


class _Kernels(NamedTuple):
    """The compiled functions of one kind of block."""

    init: Callable[..., State]
    """(weights, learning rate) -> state"""
    fast: Callable[..., tuple[jax.Array, State]]
    """(weights, state, gradients, factors, scalars) -> (weights, state)"""
    sync: Callable[..., tuple[jax.Array, State]]
    """(slow, weights, state, gradients, factors, scalars) -> (weights and slow weights in one, state)"""


def init_blocks(plan: Plan, weights: HostBlocks, values: Sequence[StepValues]) -> tuple[Block, ...]:
    """The state of step 0: the initial weights, the rule's first state, slow weights equal to the fast ones.

    Args:
        plan: how the state is cut.
        weights: the initial weights, cut so. Copied.
        values: the hyperparameters of the first step, for each parameter group.
    """
    return tuple(
        _init_block(plan.spec, block, flat, values[block.group])
        for block, flat in zip(plan.blocks, weights, strict=True)
    )


def _init_block(spec: optim.UpdateSpec, block: BlockPlan, flat: np.ndarray, values: StepValues) -> Block:
    weights = jnp.array(flat, dtype=jnp.float32, copy=True)
    slow = weights if spec.sync_period is not None else None
    return Block(weights, None if block.is_frozen else _first_state(spec, block, weights, values), slow)


def _first_state(spec: optim.UpdateSpec, block: BlockPlan, weights: jax.Array, values: StepValues) -> State:
    return _kernels(_kind(spec, block)).init(weights, np.float32(values.lr))


def apply_round(
    plan: Plan,
    blocks: tuple[Block, ...],
    gradients: Sequence[HostBlocks],
    *,
    mean_weights: Sequence[float],
    step: int,
    values: Sequence[StepValues],
) -> tuple[Block, ...]:
    """Applies one round. The rule's state in `blocks` is consumed: after an error it is lost.

    Args:
        plan: how the state is cut.
        blocks: the state after step - 1.
        gradients: one for each contribution, each cut as the state is.
        mean_weights: the factor of each contribution in the sum.
        step: the number of the step that this makes, from 1.
        values: the hyperparameters of this step, for each parameter group.

    Returns:
        The state after the step. The arrays may still be computing.
    """
    factors = tuple(np.float32(weight) for weight in mean_weights)
    parts = [_Parts(of_block, factors) for of_block in zip(*gradients, strict=True)]
    parts, scales = _clipped_by_norm(plan, parts, values)
    of_rule = tuple(np.float32(value) for value in rule_of(plan.spec.rule).scalars(plan.spec.rule_step(step)))
    scalars = [_scalars(group, scales.get(group.norm_scope, np.float32(1)), of_rule) for group in values]
    return tuple(
        state
        if block.is_frozen
        else _advance(plan.spec, block, state, (*part, scalars[block.group]), step=step, values=values[block.group])
        for block, state, part in zip(plan.blocks, blocks, parts, strict=True)
    )


class _Parts(NamedTuple):
    """What a block's gradient is summed from."""

    gradients: Sequence[np.ndarray | jax.Array]
    factors: tuple[np.float32, ...]


def _clipped_by_norm(
    plan: Plan, parts: list[_Parts], values: Sequence[StepValues]
) -> tuple[list[_Parts], dict[int, jax.Array]]:
    """For what is clipped by norm, the gradient summed up already, and the factor of each norm's scope."""
    limits = {group.norm_scope: group.grad_clip_norm for group in values if group.grad_clip_norm is not None}
    squares: dict[int, list[jax.Array]] = {scope: [] for scope in limits}
    summed = list(parts)
    for at, (block, part) in enumerate(zip(plan.blocks, parts, strict=True)):
        scope = values[block.group].norm_scope
        if scope in limits and not block.is_frozen:
            mean, square = _aggregate(*part)
            squares[scope].append(square)
            summed[at] = _Parts((mean,), (np.float32(1),))
    scales = {scope: _clip_scale(squares[scope], np.float32(limits[scope])) for scope in limits if squares[scope]}
    return summed, scales


def _scalars(values: StepValues, grad_scale: np.float32 | jax.Array, of_rule: tuple[np.float32, ...]) -> Scalars:
    return Scalars(
        weight_decay=np.float32(values.weight_decay),
        grad_clip_value=np.float32(math.inf if values.grad_clip_value is None else values.grad_clip_value),
        grad_scale=grad_scale,
        rule=StepScalars(np.float32(values.lr), np.float32(values.decoupled_weight_decay), of_rule),
    )


def _advance(
    spec: optim.UpdateSpec, block: BlockPlan, state: Block, inputs: tuple[Any, ...], *, step: int, values: StepValues
) -> Block:
    kernels = _kernels(_kind(spec, block))
    if not spec.ends_sync_period(step):
        weights, of_rule = kernels.fast(state.weights, state.state, *inputs)
        return Block(weights, of_rule, state.slow)
    weights, of_rule = kernels.sync(state.slow, state.weights, state.state, *inputs)
    if spec.reset_state:
        of_rule = _first_state(spec, block, weights, values)
    return Block(weights, of_rule, weights)


def _kind(spec: optim.UpdateSpec, block: BlockPlan) -> _Kind:
    return _Kind(spec.rule, block.shapes, spec.alpha)


@lru_cache(maxsize=1024)  # one for each rule, and for each layout of a block where whole tensors matter
def _kernels(kind: _Kind) -> _Kernels:
    return _Kernels(
        init=jax.jit(partial(_init, kind)),
        fast=jax.jit(partial(_fast_step, kind), donate_argnums=1),
        sync=jax.jit(partial(_sync_step, kind), donate_argnums=2),
    )


def _init(kind: _Kind, weights: jax.Array, lr: jax.Array) -> State:
    return rule_of(kind.rule).init(_tensors(weights, kind.shapes), lr)


def _fast_step(
    kind: _Kind,
    weights: jax.Array,
    state: State,
    gradients: Sequence[jax.Array],
    factors: Sequence[jax.Array],
    scalars: Scalars,
) -> tuple[jax.Array, State]:
    g = _mean(gradients, factors) * scalars.grad_scale
    g = jnp.clip(g, -scalars.grad_clip_value, scalars.grad_clip_value)
    g = g + scalars.weight_decay * weights
    moved, state = rule_of(kind.rule).update(
        _tensors(g, kind.shapes), _tensors(weights, kind.shapes), state, scalars.rule
    )
    return _flat(moved), state


def _sync_step(kind: _Kind, slow: jax.Array, *arguments: Any) -> tuple[jax.Array, State]:
    fast, state = _fast_step(kind, *arguments)
    return _toward(slow, fast, kind.alpha), state


def _toward(slow: jax.Array, fast: jax.Array, alpha: float) -> jax.Array:
    """The lookahead sync. At the ends of [0, 1] it must be exact, which the formula is not in floating point."""
    if alpha in (0, 1):
        return fast if alpha else slow
    return slow + alpha * (fast - slow)


def _tensors(flat: jax.Array, shapes: tuple[Shape, ...] | None) -> Tensors:
    """The tensors that lie one after the other in `flat`; itself where the rule does not look at them."""
    if shapes is None:
        return flat
    ends = np.cumsum([math.prod(shape) for shape in shapes])[:-1]
    return tuple(part.reshape(shape) for part, shape in zip(jnp.split(flat, ends), shapes, strict=True))


def _flat(tensors: Tensors) -> jax.Array:
    return jnp.concatenate([tensor.reshape(-1) for tensor in tensors]) if isinstance(tensors, tuple) else tensors


def _mean(gradients: Sequence[jax.Array], factors: Sequence[jax.Array]) -> jax.Array:
    total = gradients[0] * factors[0]
    for gradient, factor in zip(gradients[1:], factors[1:], strict=True):
        total = total + gradient * factor
    return total


@jax.jit
def _aggregate(gradients: Sequence[jax.Array], factors: Sequence[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """The mean, and its sum of squares."""
    mean = _mean(gradients, factors)
    return mean, jnp.sum(jnp.square(mean))


@jax.jit
def _clip_scale(squares: Sequence[jax.Array], max_norm: jax.Array) -> jax.Array:
    norm = jnp.sqrt(jnp.sum(jnp.stack(squares)))
    return jnp.where(norm > max_norm, max_norm / norm, 1.0)
