"""The update: from the gradients of a round and the state of one step to the state of the next.

The state is a run's flat parameters cut into blocks; each block is updated by its own call of one compiled function, so
that nothing of the model's size is built beside the state. Invariants: a rule's state is donated and exists once;
weights are not, because snapshots for readers share them, but an array that a step has left behind is what a later one
writes its weights to, once nobody reads it; after a lookahead sync fast and slow are the same array.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kedge import optim
from kedge.optim.controls import StepValues
from kedge_server.core.combine import combined
from kedge_server.core.placement import HostOrDevice, Placement
from kedge_server.core.plan import BlockPlan, Plan, Shape
from kedge_server.core.rules import State, StepScalars, rule_of
from kedge_server.core.values import MEAN, Combine
from kedge_server.core.views import Views

_KEPT_KERNELS = 16
"""Kinds of compiled code that are kept for a next run when no run has them. Each takes some megabytes."""

_ONE_THREAD_ELEMENTS = 1 << 18
"""Blocks of up to so many are updated by one thread: waking another takes as long as the half that it would do.

Measured on two CPU cores, AdaBelief: 120 us by one and 170 by two with 128 Ki elements, 204 and 278 with 256 Ki, 441
and 336 with 512 Ki.
"""

_ONE_THREAD = {"xla_disable_hlo_passes": "cpu-parallel-task-assigner"}
"""Of the compiler's options. On a GPU there is no such pass."""

_SPARE_COUNT = 2
"""Arrays of former weights that a block keeps: a lookahead sync leaves two behind, and the steps after it need both."""


class Block(NamedTuple):
    """A range of the state. Its arrays have the block's length, with zeros beyond its size."""

    weights: jax.Array
    """float32, flat."""
    state: State
    """The rule's; None where the weights are frozen."""
    slow: jax.Array | None
    """The slow weights, float32, flat; None without Lookahead."""
    spares: tuple[jax.Array, ...] = ()
    """Weights of former steps, whose memory the next ones are written to when nobody reads them any more."""


Blocks = tuple[Block, ...]


class Scalars(NamedTuple):
    """What a step needs beyond the arrays."""

    size: np.int32
    """The block's: what is beyond it stays zero."""
    grad_scale: np.float32 | jax.Array
    """The factor of clipping by norm: 1 where it does nothing."""
    grad_clip_value: np.float32
    """Infinite where it does nothing."""
    weight_decay: np.float32
    rule: StepScalars


class Parts(NamedTuple):
    """What one block's gradient is summed from. What the arrays have beyond the block's size is not for use."""

    gradients: tuple[HostOrDevice, ...]
    factors: tuple[np.float32, ...]


class _Kind(NamedTuple):
    """What the compiled functions depend on. All else is a scalar argument, so that changing it compiles nothing."""

    rule: optim.Rule
    shape: Shape | None
    is_padded: bool
    alpha: float
    has_one_thread: bool


class _Kernels(NamedTuple):
    """The compiled functions of one kind of block."""

    init: Callable[..., State]
    """(weights, learning rate) -> state"""
    fast: Callable[..., tuple[jax.Array, State]]
    """(array to write to, weights, state, gradients, factors, scalars) -> (weights, state)"""
    sync: Callable[..., tuple[jax.Array, State]]
    """(array to write to, slow, weights, state, gradients, factors, scalars) -> (weights and slow in one, state)"""


class Program:
    """A plan with its compiled functions, which live as long as it does.

    Args:
        plan: how the state is cut, and updated.
        placement: where it lives; None for the platform's default.
    """

    def __init__(self, plan: Plan, placement: Placement | None = None) -> None:
        self.plan = plan
        self._spec = plan.spec
        self._placement = placement or Placement.of()
        self._dealt = self._placement.deal(plan.blocks)
        self._views = Views(self._placement.transfer.to_host)
        self._kernels = [
            _kernels(
                _Kind(
                    plan.spec.rule,
                    block.shape,
                    block.is_padded,
                    plan.spec.alpha,
                    has_one_thread=block.length <= _ONE_THREAD_ELEMENTS,
                )
            )
            for block in plan.blocks
        ]

    def init(self, weights: np.ndarray, values: Sequence[StepValues]) -> Blocks:
        """The state of step 0: the initial weights, the rule's first state, slow weights equal to the fast ones.

        Args:
            weights: the initial weights, flat. Copied.
            values: the hyperparameters of the first step, for each parameter group.
        """
        return tuple(
            self._init_block(number, weights, values[block.group]) for number, block in enumerate(self.plan.blocks)
        )

    def apply(
        self,
        blocks: Blocks,
        gradients: Sequence[np.ndarray],
        *,
        factors: Sequence[float],
        step: int,
        values: Sequence[StepValues],
        combine: Combine = MEAN,
    ) -> Blocks:
        """Applies one round: `parts`, and then `apply_parts`.

        A combination other than the mean takes the memory of one block beside the state, and with a clip by norm, which
        needs it twice, that of all blocks that are not frozen: 4 bytes a parameter. Where gradients are staged, a clip
        by norm keeps those of all contributions on the devices.

        Args:
            blocks: the state after step - 1.
            gradients: one for each contribution, float32, flat.
            factors: what each contribution is multiplied with: for the mean its share too, else its scale alone.
            step: the number of the step that this makes, from 1.
            values: the hyperparameters of this step, for each parameter group.
            combine: what is done with the products. The round has its `required_count` at least.

        Returns:
            The state after the step. The arrays may still be computing.
        """
        return self.apply_parts(blocks, self.parts(gradients, factors, combine), step=step, values=values)

    def parts(self, gradients: Sequence[np.ndarray], factors: Sequence[float], combine: Combine) -> Iterator[Parts]:
        """What each block's gradient is summed from, one by one: no combination is held longer than it is needed."""
        assert len(gradients) == len(factors) >= combine.required_count
        return self._parts(gradients, tuple(np.float32(factor) for factor in factors), combine)

    def combined(
        self, gradients: Sequence[np.ndarray], factors: Sequence[float], combine: Combine
    ) -> tuple[list[Parts], list[np.ndarray]]:
        """The gradient of a round as one, for `apply_parts`, and the same on the host, for the journal.

        The latter ends with the blocks' sizes, and gives the same bits as a single contribution of factor 1.
        """
        sums = [
            part if len(part.gradients) == 1 and part.factors[0] == 1 else Parts((_summed(*part),), (np.float32(1),))
            for part in self.parts(gradients, factors, combine)
        ]
        host = jax.device_get([part.gradients[0] for part in sums])
        return sums, [array[: block.size] for array, block in zip(host, self.plan.blocks, strict=True)]

    def apply_parts(self, blocks: Blocks, parts: Iterable[Parts], *, step: int, values: Sequence[StepValues]) -> Blocks:
        """Applies one round. The rule's state and the spares in `blocks` are consumed: after an error they are lost.

        Args:
            blocks: the state after step - 1.
            parts: see `parts` and `combined`.
            step: the number of the step that this makes, from 1.
            values: the hyperparameters of this step, for each parameter group.

        Returns:
            The state after the step. The arrays may still be computing.
        """
        if any(group.grad_clip_norm is not None for group in values):
            parts = list(parts)
        scales = self._norm_scales(parts, values)
        of_rule = tuple(np.float32(value) for value in rule_of(self._spec.rule).scalars(self._spec.rule_step(step)))
        scalars = [[_scalars(group, on.get(group.norm_scope), of_rule) for group in values] for on in scales]
        return tuple(
            state if block.is_frozen else self._advance(number, state, part, scalars[device][block.group], step)
            for number, (block, device, state, part) in enumerate(
                zip(self.plan.blocks, self._dealt, blocks, parts, strict=True)
            )
        )

    def state_arrays(self, blocks: Blocks) -> dict[str, np.ndarray]:
        """The state on the host: `fast.B`, `slow.B` unless they are the fast ones, `state.B.N`, for each block B.

        What later steps overwrite is copied.
        """
        arrays: dict[str, np.ndarray] = {}
        for number, block in enumerate(blocks):
            arrays[f"fast.{number:05}"] = self._views.of(block.weights)
            if block.slow is not None and block.slow is not block.weights:
                arrays[f"slow.{number:05}"] = self._views.of(block.slow)
            for leaf_number, leaf in enumerate(jax.tree.leaves(block.state)):
                arrays[f"state.{number:05}.{leaf_number}"] = self._placement.transfer.to_host(leaf).copy()
        return arrays

    def resume(self, arrays: Mapping[str, np.ndarray], values: Sequence[StepValues]) -> Blocks:
        """The state that `state_arrays` gave.

        Args:
            arrays: that state. Copied.
            values: any hyperparameters, for each parameter group.

        Raises:
            ValueError: for arrays that are not of this plan.
        """
        blocks = tuple(
            self._resume_block(number, arrays, values[block.group]) for number, block in enumerate(self.plan.blocks)
        )
        if len(self.state_arrays(blocks)) != len(arrays):
            raise ValueError("the arrays are not those of this run's state")
        return blocks

    def _resume_block(self, number: int, arrays: Mapping[str, np.ndarray], values: StepValues) -> Block:
        block, kernels, device = self.plan.blocks[number], self._kernels[number], self._device(number)
        weights = _taken(
            arrays, f"fast.{number:05}", jax.eval_shape(lambda: jnp.zeros(block.length, np.float32)), device
        )
        slow = None
        if self._spec.sync_period is not None:
            slow = _taken(arrays, f"slow.{number:05}", weights, device) if f"slow.{number:05}" in arrays else weights
        if block.is_frozen:
            return Block(weights, None, slow)
        leaves, tree = jax.tree.flatten(jax.eval_shape(kernels.init, weights, np.float32(values.lr)))
        taken = [_taken(arrays, f"state.{number:05}.{at}", leaf, device) for at, leaf in enumerate(leaves)]
        return Block(weights, jax.tree.unflatten(tree, taken), slow)

    def host_weights(self, arrays: Iterable[jax.Array]) -> tuple[np.ndarray, ...]:
        """The weights of all blocks on the host, without what is beyond their sizes. On the CPU nothing is copied.

        For as long as anyone has one of them, or a view of it, no step writes to its memory.
        """
        return tuple(self._views.of(array)[: block.size] for array, block in zip(arrays, self.plan.blocks, strict=True))

    def _device(self, number: int) -> jax.Device:
        return self._placement.devices[self._dealt[number]]

    def _init_block(self, number: int, flat: np.ndarray, values: StepValues) -> Block:
        block = self.plan.blocks[number]
        initial = flat[block.start : block.stop]
        if block.is_padded:  # and else not: after copies of a block's size are freed, malloc keeps more than is used
            initial = np.pad(initial, (0, block.length - block.size))
        weights = jnp.array(initial, copy=True, device=self._device(number))
        state = None if block.is_frozen else self._kernels[number].init(weights, np.float32(values.lr))
        return Block(weights, state, weights if self._spec.sync_period is not None else None)

    def _parts(
        self, gradients: Sequence[np.ndarray], factors: tuple[np.float32, ...], combine: Combine
    ) -> Iterator[Parts]:
        transfer = self._placement.transfer
        for number, block in enumerate(self.plan.blocks):
            views = tuple(_view(block, flat) for flat in gradients)
            if block.is_frozen:
                yield Parts(views, factors)
            elif combine.kind == "mean":
                yield Parts(tuple(transfer.gradient(view, self._device(number)) for view in views), factors)
            else:
                yield Parts((combined(views, factors, combine),), (np.float32(1),))

    def _norm_scales(self, parts: Iterable[Parts], values: Sequence[StepValues]) -> list[dict[int, jax.Array]]:
        """For each device the factor of each scope that is clipped by its norm. Without any no part is looked at."""
        devices = self._placement.devices
        limits = {group.norm_scope: group.grad_clip_norm for group in values if group.grad_clip_norm is not None}
        if not limits:
            return [{} for _ in devices]
        squares: dict[int, list[jax.Array]] = {scope: [] for scope in limits}
        for block, part in zip(self.plan.blocks, parts, strict=True):
            scope = values[block.group].norm_scope
            if scope in limits and not block.is_frozen:
                square = _square(*part, np.int32(block.size), is_padded=block.is_padded)
                squares[scope].append(jax.device_put(square, devices[0]) if len(devices) > 1 else square)
        scales = {scope: _clip_scale(squares[scope], np.float32(limits[scope])) for scope in limits if squares[scope]}
        return [scales] if len(devices) == 1 else [jax.device_put(scales, device) for device in devices]

    def _advance(self, number: int, state: Block, part: Parts, scalars: Scalars, step: int) -> Block:
        kernels = self._kernels[number]
        out, spares = self._memory(state)
        inputs = (*part, scalars._replace(size=np.int32(self.plan.blocks[number].size)))
        if self._spec.ends_sync_period(step):
            weights, of_rule = kernels.sync(out, state.slow, state.weights, state.state, *inputs)
            if self._spec.reset_state:
                of_rule = kernels.init(weights, scalars.rule.lr)
            slow: jax.Array | None = weights
        else:
            weights, of_rule = kernels.fast(out, state.weights, state.state, *inputs)
            slow = state.slow
        self._placement.transfer.begin_to_host(weights)
        left = {id(array): array for array in (state.weights, state.slow) if array is not None and array is not slow}
        return Block(weights, of_rule, slow, (*spares, *left.values())[-_SPARE_COUNT:])

    def _memory(self, state: Block) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """An array that a step's weights may be written to, and the other spares.

        XLA would not write to one that somebody reads, but copy it first, which costs more than a new one.
        """
        for at, spare in enumerate(state.spares):
            if not (self._placement.transfer.is_shared and self._views.is_read(spare)):
                return spare, state.spares[:at] + state.spares[at + 1 :]
        return jnp.zeros_like(state.weights), state.spares


def _taken(
    arrays: Mapping[str, np.ndarray], name: str, like: jax.Array | jax.ShapeDtypeStruct, device: jax.Device
) -> jax.Array:
    array = arrays.get(name)
    if array is None or array.shape != like.shape or array.dtype != like.dtype:
        raise ValueError(f"{name} is missing, or not {like.dtype}{list(like.shape)}, as this run's state has it")
    return jnp.array(array, copy=True, device=device)


def _view(block: BlockPlan, flat: np.ndarray) -> np.ndarray:
    view = flat[block.start : block.start + block.length]
    if view.size == block.length:
        return view
    return np.concatenate([view, np.zeros(block.length - view.size, np.float32)])


def _scalars(values: StepValues, scale: jax.Array | None, of_rule: tuple[np.float32, ...]) -> Scalars:
    return Scalars(
        size=np.int32(0),  # each block's own
        grad_scale=np.float32(1) if scale is None else scale,
        grad_clip_value=np.float32(math.inf if values.grad_clip_value is None else values.grad_clip_value),
        weight_decay=np.float32(values.weight_decay),
        rule=StepScalars(np.float32(values.lr), np.float32(values.decoupled_weight_decay), of_rule),
    )


@lru_cache(maxsize=_KEPT_KERNELS)
def _kernels(kind: _Kind) -> _Kernels:
    # Arguments that are not read are kept: they say where results go, and on which device the state is to lie.
    compiled = partial(jax.jit, keep_unused=True, compiler_options=_ONE_THREAD if kind.has_one_thread else None)
    return _Kernels(
        init=compiled(partial(_init, kind)),
        fast=compiled(partial(_fast_step, kind), donate_argnums=(0, 2)),
        sync=compiled(partial(_sync_step, kind), donate_argnums=(0, 3)),
    )


def _init(kind: _Kind, weights: jax.Array, lr: jax.Array) -> State:
    return rule_of(kind.rule).init(_shaped(weights, kind.shape), lr)


def _fast_step(
    kind: _Kind,
    _out: jax.Array,
    weights: jax.Array,
    state: State,
    gradients: Sequence[jax.Array],
    factors: Sequence[jax.Array],
    scalars: Scalars,
) -> tuple[jax.Array, State]:
    # XLA writes its first result, the weights, to the memory of its first donated argument, which is not read. Measured
    # on two CPU cores, 25.6 M parameters, AdaBelief: 20.7 ms for 28.0 with new memory, as copies of the moments go too.
    g = _mean(gradients, factors) * scalars.grad_scale
    if kind.is_padded:
        g = _within(g, scalars.size)
    g = jnp.clip(g, -scalars.grad_clip_value, scalars.grad_clip_value)
    g = g + scalars.weight_decay * weights
    moved, state = rule_of(kind.rule).update(_shaped(g, kind.shape), _shaped(weights, kind.shape), state, scalars.rule)
    moved = moved.reshape(-1)
    return (_within(moved, scalars.size) if kind.is_padded else moved), state


def _sync_step(kind: _Kind, out: jax.Array, slow: jax.Array, *arguments: Any) -> tuple[jax.Array, State]:
    fast, state = _fast_step(kind, out, *arguments)
    return _toward(slow, fast, kind.alpha), state


def _toward(slow: jax.Array, fast: jax.Array, alpha: float) -> jax.Array:
    """The lookahead sync. At the ends of [0, 1] it must be exact, which the formula is not in floating point."""
    if alpha in (0, 1):
        return fast if alpha else slow
    return slow + alpha * (fast - slow)


def _shaped(flat: jax.Array, shape: Shape | None) -> jax.Array:
    return flat if shape is None else flat.reshape(shape)


def _within(flat: jax.Array, size: jax.Array | np.int32) -> jax.Array:
    """Zeros beyond the block's size, so that norms do not see what is there."""
    return jnp.where(jnp.arange(flat.size, dtype=jnp.int32) < size, flat, 0)


def _mean(gradients: Sequence[jax.Array], factors: Sequence[jax.Array]) -> jax.Array:
    total = gradients[0] * factors[0]
    for gradient, factor in zip(gradients[1:], factors[1:], strict=True):
        total = total + gradient * factor
    return total


_summed = jax.jit(_mean)


@partial(jax.jit, static_argnames="is_padded")
def _square(
    gradients: Sequence[jax.Array], factors: Sequence[jax.Array], size: jax.Array, *, is_padded: bool
) -> jax.Array:
    """The sum of squares of the mean."""
    mean = _mean(gradients, factors)
    return jnp.sum(jnp.square(_within(mean, size) if is_padded else mean))


@jax.jit
def _clip_scale(squares: Sequence[jax.Array], max_norm: jax.Array) -> jax.Array:
    norm = jnp.sqrt(jnp.sum(jnp.stack(squares)))
    return jnp.where(norm > max_norm, max_norm / norm, 1.0)
