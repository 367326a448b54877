"""Gradient descent, with momentum or the sign of it."""

import jax
import jax.numpy as jnp

from kedge import optim
from kedge_server.core.rules.rule import Rule, State, StepScalars, elementwise


def sgd(base: optim.SGD) -> Rule:
    """Plain, or with momentum."""
    return with_momentum(base.momentum, nesterov=base.nesterov) if base.momentum else elementwise(_plain)


def with_momentum(momentum: float, *, nesterov: bool) -> Rule:
    """`v = momentum v + g`; the direction is v, or g + momentum v."""

    def direction(g: jax.Array, _w: jax.Array, state: State, _step: StepScalars) -> tuple[jax.Array, State]:
        velocity = momentum * state[0] + g
        return (g + momentum * velocity if nesterov else velocity), (velocity,)

    return elementwise(direction, 0.0)


def lion(base: optim.Lion) -> Rule:
    """The sign of an interpolation between momentum and gradient."""
    b1, b2 = base.betas

    def direction(g: jax.Array, w: jax.Array, state: State, step: StepScalars) -> tuple[jax.Array, State]:
        sign = jnp.sign(b1 * state[0] + (1 - b1) * g)
        return sign + step.decoupled_weight_decay * w, (b2 * state[0] + (1 - b2) * g,)

    return elementwise(direction, 0.0)


def _plain(g: jax.Array, _w: jax.Array, state: State, _step: StepScalars) -> tuple[jax.Array, State]:
    return g, state
