"""What the numerics tests share: driving the code under test over a trajectory, on flat host arrays."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from kedge import optim
from kedge.optim.controls import Controls, StepValues
from kedge_server.core import update
from kedge_server.core.plan import BlockPlan, Plan
from kedge_server.core.values import MEAN, Combine

Array = np.ndarray


class Weights(NamedTuple):
    """The flat float32 weights after a step."""

    fast: Array
    slow: Array | None


def joined(blocks: Sequence[update.Block], plan: Plan | None = None) -> Weights:
    """The weights of a state, flat, in arrays of the host's own; with a plan, without what is beyond its blocks."""
    sizes = [block.size for block in plan.blocks] if plan else [block.weights.size for block in blocks]
    fast = np.concatenate([np.asarray(block.weights)[:size] for block, size in zip(blocks, sizes, strict=True)])
    if blocks[0].slow is None:
        return Weights(fast, None)
    slow = np.concatenate([np.asarray(block.slow)[:size] for block, size in zip(blocks, sizes, strict=True)])
    return Weights(fast, slow)


def plan_of(optimizer: optim.Optimizer, sizes: Sequence[int]) -> Plan:
    """A plan with blocks of just these sizes, whatever the rule: each is a tensor, so none ends in zeros."""
    ends = np.cumsum(sizes).tolist()
    blocks = [BlockPlan(end - size, end, 0, False, (size,)) for size, end in zip(sizes, ends, strict=True)]
    return Plan(optimizer.spec(), tuple(blocks), 0)


def trajectory(
    optimizer: optim.Optimizer,
    weights: Array,
    rounds: Sequence[Sequence[Array]],
    *,
    factors: Sequence[float] = (1.0,),
    sizes: Sequence[int] | None = None,
    plan: Plan | None = None,
    groups: Sequence[optim.Group] = (),
    combine: Combine = MEAN,
) -> Iterator[Weights]:
    """The weights after steps 1, 2, ...; each round is a sequence of flat gradients, one a contribution."""
    program = update.Program(plan or plan_of(optimizer, sizes or (weights.size,)))
    controls = Controls.begin(program.plan.spec, groups)
    blocks = program.init(np.asarray(weights, np.float32), controls.values())
    for step, gradients in enumerate(rounds, start=1):
        flat = [np.asarray(gradient, np.float32) for gradient in gradients]
        blocks = program.apply(blocks, flat, factors=factors, step=step, values=controls.values(), combine=combine)
        controls = controls.after_step(None, 0)
        yield joined(blocks, program.plan)


def state_of(optimizer: optim.Optimizer, weights: Array, sizes: Sequence[int] | None = None) -> update.Blocks:
    """The state of step 0, in one block unless sizes are given."""
    plan = plan_of(optimizer, sizes or (np.size(weights),))
    return update.Program(plan).init(np.asarray(weights, np.float32), values_at(optimizer, 1))


def values_at(optimizer: optim.Optimizer, step: int) -> tuple[StepValues, ...]:
    """The hyperparameters of a step, from 1."""
    controls = Controls.begin(optimizer.spec(), ())
    if isinstance(optimizer.spec().settings.lr, optim.Schedule):
        for _ in range(step - 1):
            controls = controls.after_step(None, 0)
    return controls.values()


def advance(optimizer: optim.Optimizer, blocks: update.Blocks, gradient: Array, step: int) -> update.Blocks:
    """The state after one contribution."""
    return advance_round(optimizer, blocks, [gradient], step, factors=[1.0])


def advance_round(
    optimizer: optim.Optimizer,
    blocks: update.Blocks,
    gradients: Sequence[Array],
    step: int,
    *,
    factors: Sequence[float],
) -> update.Blocks:
    """The state after one round of these flat gradients."""
    program = update.Program(plan_of(optimizer, [block.weights.size for block in blocks]))
    flat = [np.asarray(gradient, np.float32) for gradient in gradients]
    return program.apply(blocks, flat, factors=factors, step=step, values=values_at(optimizer, step))


def single(gradients: Sequence[Array]) -> list[tuple[Array]]:
    """Rounds of one contribution each."""
    return [(gradient,) for gradient in gradients]


def same_bits(left: Array | None, right: Array | None) -> bool:
    """Whether two float32 arrays are the same bit for bit, NaN and the sign of zero included."""
    assert left is not None
    assert right is not None
    assert left.dtype == right.dtype == np.float32
    return left.tobytes() == right.tobytes()
