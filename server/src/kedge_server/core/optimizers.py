"""The rules of the base optimizers, on arrays of any shape: from gradient and moments to a direction.

What surrounds a rule (clips, coupled decay, learning rate, Lookahead) is `kedge_server.core.update`'s matter. What
depends on the step number alone is computed in float64 on the host and comes in as a scalar, because `1 - b2**t` in
float32 is off by 1e-5 and more in the first steps.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kedge import optim

Moments = tuple[jax.Array, ...]
Scalars = tuple[jax.Array | np.float32, ...]


class Rule(NamedTuple):
    """One base optimizer."""

    moment_count: int
    """How many arrays of the weights' shape it keeps. They begin as zeros."""
    scalars: Callable[[int], tuple[float, ...]]
    """What step t (from 1) needs beyond the arrays, in float64."""
    direction: Callable[[jax.Array, jax.Array, Moments, Scalars], tuple[jax.Array, Moments]]
    """(gradient, weights, moments, scalars) -> (direction, new moments); the weights move by -lr * direction."""


def rule_of(base: optim.BaseOptimizer) -> Rule:
    """The rule of a base optimizer."""
    match base:
        case optim.SGD():
            return _sgd(base)
        case optim.Adam():
            return _adam(base.betas, base.eps)
        case optim.AdamW():
            return _adamw(base)
        case optim.AdaBelief():
            return _adabelief(base)


def _sgd(base: optim.SGD) -> Rule:
    momentum = base.momentum

    def plain(g: jax.Array, _w: jax.Array, moments: Moments, _scalars: Scalars) -> tuple[jax.Array, Moments]:
        return g, moments

    def with_momentum(g: jax.Array, _w: jax.Array, moments: Moments, _scalars: Scalars) -> tuple[jax.Array, Moments]:
        velocity = momentum * moments[0] + g
        return (g + momentum * velocity if base.nesterov else velocity), (velocity,)

    return Rule(1, _no_scalars, with_momentum) if momentum else Rule(0, _no_scalars, plain)


def _adam(betas: tuple[float, float], eps: float) -> Rule:
    b1, b2 = betas

    def direction(g: jax.Array, _w: jax.Array, moments: Moments, scalars: Scalars) -> tuple[jax.Array, Moments]:
        m = b1 * moments[0] + (1 - b1) * g
        v = b2 * moments[1] + (1 - b2) * jnp.square(g)
        return _normalized(m, v, eps, scalars), (m, v)

    return Rule(2, _bias_corrections(betas), direction)


def _adamw(base: optim.AdamW) -> Rule:
    adam = _adam(base.betas, base.eps)
    decay = base.weight_decay

    def direction(g: jax.Array, w: jax.Array, moments: Moments, scalars: Scalars) -> tuple[jax.Array, Moments]:
        step, moments = adam.direction(g, w, moments, scalars)
        return step + decay * w, moments

    return adam._replace(direction=direction)


def _adabelief(base: optim.AdaBelief) -> Rule:
    b1, b2 = base.betas
    eps_root = base.eps if base.eps_root is None else base.eps_root

    def direction(g: jax.Array, _w: jax.Array, moments: Moments, scalars: Scalars) -> tuple[jax.Array, Moments]:
        m = b1 * moments[0] + (1 - b1) * g
        s = b2 * moments[1] + (1 - b2) * jnp.square(g - m) + eps_root
        return _normalized(m, s, base.eps, scalars), (m, s)

    return Rule(2, _bias_corrections(base.betas), direction)


def _normalized(m: jax.Array, v: jax.Array, eps: float, scalars: Scalars) -> jax.Array:
    correct_m, correct_v = scalars
    return m * correct_m / (jnp.sqrt(v * correct_v) + eps)


def _bias_corrections(betas: tuple[float, float]) -> Callable[[int], tuple[float, ...]]:
    return lambda step: tuple(1 / (1 - beta**step) for beta in betas)


def _no_scalars(_step: int) -> tuple[float, ...]:
    return ()
