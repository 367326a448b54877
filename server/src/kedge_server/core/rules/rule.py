"""What a rule is: the part of an optimizer that turns a gradient and its own state into a step."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Sees = Literal["elements", "norms", "shapes"]
"""What a rule looks at beside each element: nothing; the norm of its tensor; the shape of its tensor."""
State = Any
"""What a rule keeps for a block: a tree of arrays."""
Scalar = jax.Array | np.float32


class StepScalars(NamedTuple):
    """What a step of a rule needs beyond the arrays, each a float32 scalar."""

    lr: Scalar
    decoupled_weight_decay: Scalar
    of_step: tuple[Scalar, ...]
    """What `Rule.scalars` said of this step."""


class Rule(NamedTuple):
    """One base optimizer."""

    sees: Sees
    """A rule that sees elements gets flat arrays of any range, one that sees norms that of a whole tensor; both may end
    in zeros, whose gradient is zero. One that sees shapes gets the tensor in its shape."""
    init: Callable[[jax.Array, Scalar], State]
    """(weights, learning rate) -> the state of step 0. It must not hold the weights' own array."""
    scalars: Callable[[int], tuple[float, ...]]
    """What the rule's step t (from 1) needs beyond the arrays, in float64: `1 - b2**t` in float32 is off by 1e-5 and
    more in the first steps."""
    update: Callable[[jax.Array, jax.Array, State, StepScalars], tuple[jax.Array, State]]
    """(gradient, weights, state, scalars) -> (new weights, new state)"""


Direction = Callable[[jax.Array, jax.Array, State, StepScalars], tuple[jax.Array, State]]
"""(gradient, weights, state, scalars) -> (direction, new state); the weights move by -lr * direction."""


def no_scalars(_step: int) -> tuple[float, ...]:
    """For rules that every step is the same for."""
    return ()


def elementwise(direction: Direction, *start: float, scalars: Callable[[int], tuple[float, ...]] = no_scalars) -> Rule:
    """A rule for flat arrays, whose state is one array of the weights' shape for each number of `start`."""

    def init(weights: jax.Array, _lr: Scalar) -> State:
        return tuple(jnp.full_like(weights, value) for value in start)

    def update(g: jax.Array, w: jax.Array, state: State, step: StepScalars) -> tuple[jax.Array, State]:
        moved, state = direction(g, w, state, step)
        return w - step.lr * moved, state

    return Rule("elements", init, scalars, update)
