"""What the numerics tests share: driving the code under test over a trajectory, on flat host arrays."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from kedge import optim
from kedge_server.core import update

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


def trajectory(
    optimizer: optim.Optimizer,
    weights: Array,
    rounds: Sequence[Sequence[Array]],
    *,
    mean_weights: Sequence[float] = (1.0,),
    sizes: Sequence[int] | None = None,
) -> Iterator[Weights]:
    """The weights after steps 1, 2, ...; each round is a sequence of flat gradients, one a contribution."""
    spec = optimizer.spec()
    sizes = sizes or (weights.size,)
    blocks = update.init_blocks(spec, cut(weights, sizes))
    for step, gradients in enumerate(rounds, start=1):
        cut_gradients = [cut(gradient, sizes) for gradient in gradients]
        blocks = update.apply_round(spec, blocks, cut_gradients, mean_weights=mean_weights, step=step)
        yield joined(blocks)


def state_of(optimizer: optim.Optimizer, weights: Array) -> tuple[update.Block, ...]:
    """The state of step 0, in one block."""
    return update.init_blocks(optimizer.spec(), (np.asarray(weights, np.float32),))


def advance(
    optimizer: optim.Optimizer, blocks: tuple[update.Block, ...], gradient: Array, step: int
) -> tuple[update.Block, ...]:
    """The state after one contribution, where it is one block."""
    gradients = [(np.asarray(gradient, np.float32),)]
    return update.apply_round(optimizer.spec(), blocks, gradients, mean_weights=[1.0], step=step)


def single(gradients: Sequence[Array]) -> list[tuple[Array]]:
    """Rounds of one contribution each."""
    return [(gradient,) for gradient in gradients]


def same_bits(left: Array | None, right: Array | None) -> bool:
    """Whether two float32 arrays are the same bit for bit, NaN and the sign of zero included."""
    assert left is not None
    assert right is not None
    assert left.dtype == right.dtype == np.float32
    return left.tobytes() == right.tobytes()
