"""Rules that scale each element by what they know of its gradient's size."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from kedge import optim
from kedge_server.core.rules.rule import Direction, Rule, Scalar, State, StepScalars, elementwise

YOGI_START = 1e-6
"""Yogi's moments begin above zero, so that the sign of its first difference means something (arXiv:1808.03632)."""


def adam(base: optim.Adam) -> Rule:
    """Adam, or AMSGrad."""
    if base.amsgrad:
        return _amsgrad(base)
    return elementwise(_adam(base.betas, base.eps), 0.0, 0.0, scalars=_bias_corrections(base.betas))


def adamw(base: optim.AdamW) -> Rule:
    """Adam's direction plus decoupled decay."""
    adams = _adam(base.betas, base.eps)

    def direction(g: jax.Array, w: jax.Array, state: State, step: StepScalars) -> tuple[jax.Array, State]:
        moved, state = adams(g, w, state, step)
        return moved + step.decoupled_weight_decay * w, state

    return elementwise(direction, 0.0, 0.0, scalars=_bias_corrections(base.betas))


def adabelief(base: optim.AdaBelief) -> Rule:
    """The second moment is that of the gradient's deviation from the new first one."""
    b1, b2 = base.betas
    eps_root = base.eps if base.eps_root is None else base.eps_root

    def direction(g: jax.Array, _w: jax.Array, state: State, step: StepScalars) -> tuple[jax.Array, State]:
        m = b1 * state[0] + (1 - b1) * g
        s = b2 * state[1] + (1 - b2) * jnp.square(g - m) + eps_root
        moved = _normalized(m, s, base.eps, step)
        # Left out, not clipped to infinity: what is compiled without a bound stays as it is to the bit.
        return moved if base.max_direction is None else jnp.clip(moved, -base.max_direction, base.max_direction), (m, s)

    return elementwise(direction, 0.0, 0.0, scalars=_bias_corrections(base.betas))


def yogi(base: optim.Yogi) -> Rule:
    """The second moment moves by the gradient's square at most, whichever way."""
    b1, b2 = base.betas

    def direction(g: jax.Array, _w: jax.Array, state: State, step: StepScalars) -> tuple[jax.Array, State]:
        square = jnp.square(g)
        m = b1 * state[0] + (1 - b1) * g
        v = state[1] - (1 - b2) * jnp.sign(state[1] - square) * square
        return _normalized(m, v, base.eps, step), (m, v)

    return elementwise(direction, YOGI_START, YOGI_START, scalars=_bias_corrections(base.betas))


def radam(base: optim.RAdam) -> Rule:
    """Adam with its variance rectified, and plain momentum while there is too little of it to go by."""
    b1, b2 = base.betas

    def direction(g: jax.Array, _w: jax.Array, state: State, step: StepScalars) -> tuple[jax.Array, State]:
        correct_m, correct_v, rectification = step.of_step
        m = b1 * state[0] + (1 - b1) * g
        v = b2 * state[1] + (1 - b2) * jnp.square(g)
        rectified = rectification * (m * correct_m) / (jnp.sqrt(v * correct_v) + base.eps)
        return jnp.where(rectification > 0, rectified, m * correct_m), (m, v)

    corrections = _bias_corrections(base.betas)
    return elementwise(direction, 0.0, 0.0, scalars=lambda t: (*corrections(t), _rectification(b2, t)))


def nadam(base: optim.Nadam) -> Rule:
    """Adam with Nesterov momentum on a schedule of its own. The third array holds the product of all momenta so far."""
    b1, b2 = base.betas

    def momentum(t: int) -> float:
        return b1 * (1 - 0.5 * math.pow(0.96, t * base.momentum_decay))

    def direction(g: jax.Array, _w: jax.Array, state: State, step: StepScalars) -> tuple[jax.Array, State]:
        mu, mu_next, correct_v = step.of_step
        m = b1 * state[0] + (1 - b1) * g
        v = b2 * state[1] + (1 - b2) * jnp.square(g)
        product = state[2] * mu
        looked_ahead = (1 - mu) / (1 - product) * g + mu_next / (1 - product * mu_next) * m
        return looked_ahead / (jnp.sqrt(v * correct_v) + base.eps), (m, v, product)

    def init(weights: jax.Array, _lr: Scalar) -> State:
        return jnp.zeros_like(weights), jnp.zeros_like(weights), jnp.ones((), weights.dtype)

    rule = elementwise(direction, scalars=lambda t: (momentum(t), momentum(t + 1), 1 / (1 - b2**t)))
    return rule._replace(init=init)


def adamax(base: optim.Adamax) -> Rule:
    """Adam with the greatest gradient of late in the place of the second moment."""
    b1, b2 = base.betas

    def direction(g: jax.Array, _w: jax.Array, state: State, step: StepScalars) -> tuple[jax.Array, State]:
        m = b1 * state[0] + (1 - b1) * g
        greatest = jnp.maximum(b2 * state[1], jnp.abs(g) + base.eps)
        return m * step.of_step[0] / greatest, (m, greatest)

    return elementwise(direction, 0.0, 0.0, scalars=_bias_corrections(base.betas))


def rmsprop(base: optim.RMSprop) -> Rule:
    """The gradient over the root of its mean square, or of its variance, with momentum where it is wanted."""
    decay = base.alpha

    def direction(g: jax.Array, _w: jax.Array, state: State, _step: StepScalars) -> tuple[jax.Array, State]:
        square, *others = state
        square = decay * square + (1 - decay) * jnp.square(g)
        variance, kept = square, [square]
        if base.centered:
            mean = decay * others.pop(0) + (1 - decay) * g
            variance = jnp.maximum(square - jnp.square(mean), 0)  # rounding may take it below
            kept.append(mean)
        moved = g * jax.lax.rsqrt(variance + base.eps)
        if base.momentum:
            moved = moved + base.momentum * others.pop(0)
            kept.append(moved)
        return moved, tuple(kept)

    return elementwise(direction, *[0.0] * (1 + bool(base.centered) + bool(base.momentum)))


def adagrad(base: optim.Adagrad) -> Rule:
    """The gradient over the root of the sum of its squares."""

    def direction(g: jax.Array, _w: jax.Array, state: State, step: StepScalars) -> tuple[jax.Array, State]:
        total = state[0] + jnp.square(g)
        scaled = jnp.where(total > 0, g * jax.lax.rsqrt(total + base.eps), 0)
        return step.of_step[0] * scaled, (total,)

    decayed = base.lr_decay
    return elementwise(direction, base.initial_accumulator_value, scalars=lambda t: (1 / (1 + (t - 1) * decayed),))


def adadelta(base: optim.Adadelta) -> Rule:
    """Steps as large as those of late, measured by the gradients of late."""
    rho, eps = base.rho, base.eps

    def direction(g: jax.Array, _w: jax.Array, state: State, _step: StepScalars) -> tuple[jax.Array, State]:
        square = rho * state[0] + (1 - rho) * jnp.square(g)
        moved = jnp.sqrt(state[1] + eps) / jnp.sqrt(square + eps) * g
        return moved, (square, rho * state[1] + (1 - rho) * jnp.square(moved))

    return elementwise(direction, 0.0, 0.0)


def _adam(betas: tuple[float, float], eps: float) -> Direction:
    b1, b2 = betas

    def direction(g: jax.Array, _w: jax.Array, state: State, step: StepScalars) -> tuple[jax.Array, State]:
        m = b1 * state[0] + (1 - b1) * g
        v = b2 * state[1] + (1 - b2) * jnp.square(g)
        return _normalized(m, v, eps, step), (m, v)

    return direction


def _amsgrad(base: optim.Adam) -> Rule:
    b1, b2 = base.betas

    def direction(g: jax.Array, _w: jax.Array, state: State, step: StepScalars) -> tuple[jax.Array, State]:
        correct_m, correct_v = step.of_step
        m = b1 * state[0] + (1 - b1) * g
        v = b2 * state[1] + (1 - b2) * jnp.square(g)
        greatest = jnp.maximum(state[2], v * correct_v)
        return m * correct_m / (jnp.sqrt(greatest) + base.eps), (m, v, greatest)

    return elementwise(direction, 0.0, 0.0, 0.0, scalars=_bias_corrections(base.betas))


def _normalized(m: jax.Array, v: jax.Array, eps: float, step: StepScalars) -> jax.Array:
    correct_m, correct_v = step.of_step
    return m * correct_m / (jnp.sqrt(v * correct_v) + eps)


def _bias_corrections(betas: tuple[float, float]) -> Callable[[int], tuple[float, ...]]:
    return lambda step: tuple(1 / (1 - beta**step) for beta in betas)


def _rectification(b2: float, t: int) -> float:
    """RAdam's r_t; 0 where the variance cannot be trusted yet (arXiv:1908.03265, algorithm 2, with optax's bound 5)."""
    rho_max = 2 / (1 - b2) - 1
    rho = rho_max - 2 * t * b2**t / (1 - b2**t)
    if rho < 5:
        return 0.0
    return math.sqrt((rho - 4) * (rho - 2) * rho_max / ((rho_max - 4) * (rho_max - 2) * rho))
