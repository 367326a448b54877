"""What the numerics tests share: driving the code under test over a trajectory, on flat host arrays."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from kedge import optim
from kedge.optim.controls import Controls, StepValues
from kedge_server.core import update
from kedge_server.core.plan import BlockPlan, Plan
from kedge_server.core.rules import rule_of

Array = np.ndarray


class Weights(NamedTuple):
    """The flat float32 weights after a step."""

    fast: Array
    slow: Array | None


def cut(flat: Array, sizes: Sequence[int]) -> tuple[Array, ...]:
    """A flat array in blocks of these sizes."""
    assert sum(sizes) == flat.size
    return tuple(np.split(np.asarray(flat, np.float32), np.cumsum(sizes)[:-1]))


def joined(blocks: Sequence[update.Block]) -> Weights:
    """The weights of a state, flat, in arrays of the host's own."""
    fast = np.concatenate([np.asarray(block.weights) for block in blocks])
    if blocks[0].slow is None:
        return Weights(fast, None)
    return Weights(fast, np.concatenate([np.asarray(block.slow) for block in blocks]))


def plan_of(optimizer: optim.Optimizer, sizes: Sequence[int]) -> Plan:
    """A plan with blocks of these sizes, whatever the rule; to one that looks at tensors each is a vector."""
    spec = optimizer.spec()
    ends = np.cumsum(sizes).tolist()
    is_elementwise = rule_of(spec.rule).is_elementwise
    return Plan(
        spec,
        tuple(
            BlockPlan(end - size, end, 0, False, None if is_elementwise else ((size,),))
            for size, end in zip(sizes, ends, strict=True)
        ),
    )


def trajectory(
    optimizer: optim.Optimizer,
    weights: Array,
    rounds: Sequence[Sequence[Array]],
    *,
    mean_weights: Sequence[float] = (1.0,),
    sizes: Sequence[int] | None = None,
    plan: Plan | None = None,
    groups: Sequence[optim.Group] = (),
) -> Iterator[Weights]:
    """The weights after steps 1, 2, ...; each round is a sequence of flat gradients, one a contribution."""
    plan = plan or plan_of(optimizer, sizes or (weights.size,))
    controls = Controls.begin(plan.spec, groups)
    sizes = [block.stop - block.start for block in plan.blocks]
    blocks = update.init_blocks(plan, cut(weights, sizes), controls.values())
    for step, gradients in enumerate(rounds, start=1):
        blocks = update.apply_round(
            plan,
            blocks,
            [cut(gradient, sizes) for gradient in gradients],
            mean_weights=mean_weights,
            step=step,
            values=controls.values(),
        )
        controls = controls.after_step(None, 0)
        yield joined(blocks)


def state_of(
    optimizer: optim.Optimizer, weights: Array, sizes: Sequence[int] | None = None
) -> tuple[update.Block, ...]:
    """The state of step 0, in one block unless sizes are given."""
    plan = plan_of(optimizer, sizes or (np.size(weights),))
    return update.init_blocks(plan, cut(np.asarray(weights), sizes or (np.size(weights),)), values_at(optimizer, 1))


def values_at(optimizer: optim.Optimizer, step: int) -> tuple[StepValues, ...]:
    """The hyperparameters of a step, from 1."""
    controls = Controls.begin(optimizer.spec(), ())
    if isinstance(optimizer.spec().settings.lr, optim.Schedule):
        for _ in range(step - 1):
            controls = controls.after_step(None, 0)
    return controls.values()


def advance(
    optimizer: optim.Optimizer,
    blocks: tuple[update.Block, ...],
    gradient: Array,
    step: int,
) -> tuple[update.Block, ...]:
    """The state after one contribution."""
    return advance_round(optimizer, blocks, [gradient], step, mean_weights=[1.0])


def advance_round(
    optimizer: optim.Optimizer,
    blocks: tuple[update.Block, ...],
    gradients: Sequence[Array],
    step: int,
    *,
    mean_weights: Sequence[float],
) -> tuple[update.Block, ...]:
    """The state after one round of these flat gradients."""
    sizes = [block.weights.size for block in blocks]
    return update.apply_round(
        plan_of(optimizer, sizes),
        blocks,
        [cut(np.asarray(gradient), sizes) for gradient in gradients],
        mean_weights=mean_weights,
        step=step,
        values=values_at(optimizer, step),
    )


def single(gradients: Sequence[Array]) -> list[tuple[Array]]:
    """Rounds of one contribution each."""
    return [(gradient,) for gradient in gradients]


def same_bits(left: Array | None, right: Array | None) -> bool:
    """Whether two float32 arrays are the same bit for bit, NaN and the sign of zero included."""
    assert left is not None
    assert right is not None
    assert left.dtype == right.dtype == np.float32
    return left.tobytes() == right.tobytes()
