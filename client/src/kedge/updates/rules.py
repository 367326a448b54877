"""The rules: for each class of `kedge.optim` a function from a gradient to a direction, which is scaled by the rate.

A function reads as the formula in its class does. What a rule keeps of a tensor lies in its `state`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kedge import optim
from kedge.wire.errors import KedgeError

LEAST_FACTORED_LENGTH = 128
"""Adafactor keeps rows and columns where both have at least so many elements."""
YOGI_INITIAL_MOMENT = 1e-6
Array = Any
"""float64. NumPy's types say no more of what its functions return."""


@dataclass
class Tensor:
    """A tensor, and what a rule keeps of it and sees at one step besides the gradient."""

    range: slice
    """Of the run's flat range."""
    shape: tuple[int, ...]
    group: int
    """0: none."""
    weights: Array = field(default_factory=lambda: np.zeros(()))
    decay: float = 0.0
    """The decoupled one."""
    step: int = 0
    """From 1, since the state was empty."""
    state: dict[str, Array] = field(default_factory=dict)

    def moment(self, name: str, rate: float, value: Array, *, initial: float = 0.0) -> Array:
        """The moving average of that name, moved on: `rate * average + (1 - rate) * value`."""
        return self.sum(name, rate, (1 - rate) * value, initial=initial)

    def sum(self, name: str, rate: float, value: Array, *, initial: float = 0.0) -> Array:
        """The sum of that name, moved on: `rate * sum + value`."""
        self.state[name] = rate * self.state.get(name, np.asarray(initial)) + value
        return self.state[name]


Direction = Callable[[Any, Tensor, Array], Array]


def direction_of(rule: optim.Rule) -> Direction:
    """The function of a rule.

    Raises:
        KedgeError: INVALID_CONFIGURATION for `optim.Optax`.
    """
    if isinstance(rule, optim.Optax):
        message = f"NumPy has no optax: use a real server for Optax({rule.name!r})"
        raise KedgeError("INVALID_CONFIGURATION", message, field="optimizer.rule")
    return _DIRECTIONS[type(rule)]


def _sgd(rule: optim.SGD, t: Tensor, g: Array) -> Array:
    return _nesterov(rule, t, g) if rule.nesterov else _heavy_ball(rule, t, g)


def _heavy_ball(rule: Any, t: Tensor, g: Array) -> Array:
    return t.sum("velocity", rule.momentum, g)


def _nesterov(rule: Any, t: Tensor, g: Array) -> Array:
    return g + rule.momentum * _heavy_ball(rule, t, g)


def _lion(rule: optim.Lion, t: Tensor, g: Array) -> Array:
    b1, b2 = rule.betas
    mixed = b1 * t.state.get("m", 0.0) + (1 - b1) * g
    t.moment("m", b2, g)
    return np.sign(mixed) + t.decay * t.weights


def _adam(rule: Any, t: Tensor, g: Array) -> Array:
    first, second = _corrected(rule, t, t.moment("m", rule.betas[0], g), t.moment("v", rule.betas[1], g**2))
    if getattr(rule, "amsgrad", False):
        second = t.state["greatest"] = np.maximum(t.state.get("greatest", 0.0), second)
    return first / (np.sqrt(second) + rule.eps)


def _adamw(rule: optim.AdamW, t: Tensor, g: Array) -> Array:
    return _adam(rule, t, g) + t.decay * t.weights


def _nadam(rule: optim.Nadam, t: Tensor, g: Array) -> Array:
    b1, b2 = rule.betas
    m, v = t.moment("m", b1, g), t.moment("v", b2, g**2)
    now, then = (b1 * (1 - 0.5 * 0.96 ** (step * rule.momentum_decay)) for step in (t.step, t.step + 1))
    product = t.state["product"] = t.state.get("product", np.ones(())) * now
    first = then * m / (1 - product * then) + (1 - now) * g / (1 - product)
    return first / (np.sqrt(v / (1 - b2**t.step)) + rule.eps)


def _radam(rule: optim.RAdam, t: Tensor, g: Array) -> Array:
    b1, b2 = rule.betas
    first, second = _corrected(rule, t, t.moment("m", b1, g), t.moment("v", b2, g**2))
    limit = 2 / (1 - b2) - 1
    rho = limit - 2 * t.step * b2**t.step / (1 - b2**t.step)
    if rho < 5:
        return first
    rectified = ((rho - 4) * (rho - 2) * limit / ((limit - 4) * (limit - 2) * rho)) ** 0.5
    return rectified * first / (np.sqrt(second) + rule.eps)


def _adamax(rule: optim.Adamax, t: Tensor, g: Array) -> Array:
    b1, b2 = rule.betas
    u = t.state["u"] = np.maximum(b2 * t.state.get("u", 0.0), np.abs(g) + rule.eps)
    return t.moment("m", b1, g) / (1 - b1**t.step) / u


def _yogi(rule: optim.Yogi, t: Tensor, g: Array) -> Array:
    b1, b2 = rule.betas
    m = t.moment("m", b1, g, initial=YOGI_INITIAL_MOMENT)
    v = t.state.get("v", YOGI_INITIAL_MOMENT)
    v = t.state["v"] = v - (1 - b2) * np.sign(v - g**2) * g**2
    first, second = _corrected(rule, t, m, v)
    return first / (np.sqrt(second) + rule.eps)


def _adabelief(rule: optim.AdaBelief, t: Tensor, g: Array) -> Array:
    b1, b2 = rule.betas
    eps_root = rule.eps if rule.eps_root is None else rule.eps_root
    m = t.moment("m", b1, g)
    s = t.sum("s", b2, (1 - b2) * (g - m) ** 2 + eps_root)
    first, second = _corrected(rule, t, m, s)
    direction = first / (np.sqrt(second) + rule.eps)
    return direction if rule.max_direction is None else np.clip(direction, -rule.max_direction, rule.max_direction)


def _rmsprop(rule: optim.RMSprop, t: Tensor, g: Array) -> Array:
    v = t.moment("v", rule.alpha, g**2)
    if rule.centered:
        v = np.maximum(v - t.moment("a", rule.alpha, g) ** 2, 0.0)
    return _heavy_ball(rule, t, g / np.sqrt(v + rule.eps))


def _adagrad(rule: optim.Adagrad, t: Tensor, g: Array) -> Array:
    s = t.sum("s", 1.0, g**2, initial=rule.initial_accumulator_value)
    return g / np.sqrt(s + rule.eps) / (1 + (t.step - 1) * rule.lr_decay)


def _adadelta(rule: optim.Adadelta, t: Tensor, g: Array) -> Array:
    v = t.moment("v", rule.rho, g**2)
    step = np.sqrt(t.state.get("u", 0.0) + rule.eps) / np.sqrt(v + rule.eps) * g
    t.moment("u", rule.rho, step**2)
    return step


def _lamb(rule: optim.Lamb, t: Tensor, g: Array) -> Array:
    step = _adam(rule, t, g) + t.decay * t.weights
    return _trust_ratio(t.weights, step) * step


def _lars(rule: optim.Lars, t: Tensor, g: Array) -> Array:
    return _heavy_ball(rule, t, _trust_ratio(t.weights, g, rule.trust_coefficient, rule.eps) * g)


def _adafactor(rule: optim.Adafactor, t: Tensor, g: Array) -> Array:
    step = g / np.sqrt(_second_moment(rule, t, g**2 + rule.eps[0]))
    step = step / max(1.0, float(np.sqrt(np.mean(step**2))) / rule.clip_threshold)
    if rule.beta1 is not None:
        step = t.moment("m", rule.beta1, step)
    return step + t.decay * t.weights


def _second_moment(rule: optim.Adafactor, t: Tensor, square: Array) -> Array:
    """Adafactor's, for every element."""
    rate = 1 - t.step**-rule.decay_rate
    axes = _two_longest_axes(square.shape)
    if not (rule.factored and axes and square.shape[axes[0]] >= LEAST_FACTORED_LENGTH):
        return t.moment("v", rate, square)
    second, longest = axes
    rows = t.moment("rows", rate, square.mean(axis=longest, keepdims=True))
    columns = t.moment("columns", rate, square.mean(axis=second, keepdims=True))
    return rows * columns / rows.mean(axis=second, keepdims=True)


def _two_longest_axes(shape: tuple[int, ...]) -> tuple[int, int] | None:
    """The second longest and the longest; among axes of one length the last count as the longest."""
    if len(shape) < 2:
        return None
    axes = sorted(range(len(shape)), key=lambda axis: shape[axis])
    return axes[-2], axes[-1]


def _novograd(rule: optim.Novograd, t: Tensor, g: Array) -> Array:
    b1, b2 = rule.betas
    v = t.moment("v", 0.0 if t.step == 1 else b2, np.sum(g**2))
    return t.sum("m", b1, g / (np.sqrt(v) + rule.eps) + t.decay * t.weights)


def _corrected(rule: Any, t: Tensor, first: Array, second: Array) -> tuple[Array, Array]:
    """The moments without the bias towards their beginnings."""
    b1, b2 = rule.betas
    return first / (1 - b1**t.step), second / (1 - b2**t.step)


def _trust_ratio(weights: Array, step: Array, coefficient: float = 1.0, eps: float = 0.0) -> float:
    """The size of the weights to that of the step; 1 where one of them has none."""
    size, step_size = (float(np.sqrt(np.sum(array**2))) for array in (weights, step))
    return coefficient * size / (step_size + eps) if size and step_size else 1.0


_DIRECTIONS: dict[type[optim.Rule], Direction] = {
    optim.SGD: _sgd,
    optim.Momentum: _heavy_ball,
    optim.MomentumNesterov: _nesterov,
    optim.Lion: _lion,
    optim.Adam: _adam,
    optim.AdamW: _adamw,
    optim.Nadam: _nadam,
    optim.RAdam: _radam,
    optim.Adamax: _adamax,
    optim.Yogi: _yogi,
    optim.AdaBelief: _adabelief,
    optim.RMSprop: _rmsprop,
    optim.Adagrad: _adagrad,
    optim.Adadelta: _adadelta,
    optim.Lamb: _lamb,
    optim.Lars: _lars,
    optim.Adafactor: _adafactor,
    optim.Novograd: _novograd,
}
