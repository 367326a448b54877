"""A naive float64 oracle of the whole update, in NumPy: from averaged gradients to fast and slow weights.

Written from the papers and the documented mathematics, one formula a line, and not from the code that it judges: it
imports neither `kedge` nor `kedge_server`, and takes plain numbers. It is slow and knows no blocks.

Sources: SGD with (Nesterov) momentum as arXiv:1907.08610's baselines and torch have it, v = momentum v + g; Adam
arXiv:1412.6980, algorithm 1; AdamW arXiv:1711.05101, algorithm 2; AdaBelief arXiv:2010.07468, algorithm 2, with epsilon
inside the recursion too; Lookahead arXiv:1907.08610, algorithm 1.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray
Rate = float | Sequence[Any]
"""A number, or (name of a schedule, its fields)."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """An optimizer in plain numbers. What is None or zero does not happen."""

    rule: str
    """sgd, adam, adamw or adabelief."""
    lr: Rate
    momentum: float = 0.0
    nesterov: bool = False
    betas: Sequence[float] = (0.9, 0.999)
    eps: float = 1e-8
    eps_root: float = 0.0
    """Added to AdaBelief's second moment in its recursion."""
    max_direction: float = np.inf
    """The greatest element of AdaBelief's direction."""
    decoupled_decay: float = 0.0
    """AdamW's."""
    decay: float = 0.0
    """Coupled, L2."""
    clip_norm: float | None = None
    clip_value: float | None = None
    sync_period: int | None = None
    alpha: float = 0.5


class State(NamedTuple):
    """Everything after a step, in float64."""

    fast: Array
    slow: Array
    """The initial weights for ever where there is no Lookahead."""
    first: Array
    """SGD's velocity, or the mean of the gradients."""
    second: Array
    """The mean of the squares."""


def trajectory(recipe: Recipe, weights: Array, gradients: Sequence[Array]) -> Iterator[State]:
    """The states after steps 1, 2, ..., one for each averaged gradient."""
    start = np.asarray(weights, np.float64)
    state = State(start, start, np.zeros_like(start), np.zeros_like(start))
    for step, gradient in enumerate(gradients, start=1):
        state = advance(recipe, state, np.asarray(gradient, np.float64), step)
        yield state


def advance(recipe: Recipe, state: State, gradient: Array, step: int) -> State:
    """One step; the first is step 1."""
    g = condition(recipe, gradient, state.fast)
    direction, first, second = RULES[recipe.rule](recipe, state, g, step)
    fast = state.fast - rate(recipe.lr, step - 1) * direction
    moved = State(fast, state.slow, first, second)
    if recipe.sync_period is None or step % recipe.sync_period != 0:
        return moved
    slow = state.slow + recipe.alpha * (fast - state.slow)
    return moved._replace(fast=slow, slow=slow)


def weighted_mean(gradients: Sequence[Array], example_counts: Sequence[int]) -> Array:
    """The mean gradient of all examples, where each gradient is the mean over its own."""
    total = sum(np.asarray(g, np.float64) * count for g, count in zip(gradients, example_counts, strict=True))
    return total / sum(example_counts)


def condition(recipe: Recipe, g: Array, weights: Array) -> Array:
    """What happens to a gradient before the rule: clip by norm, clip by value, coupled decay."""
    if recipe.clip_norm is not None:
        norm = np.sqrt(np.sum(g * g))
        g = g * min(1.0, recipe.clip_norm / norm)
    if recipe.clip_value is not None:
        g = np.minimum(np.maximum(g, -recipe.clip_value), recipe.clip_value)
    return g + recipe.decay * weights


def rate(lr: Rate, applied: int) -> float:
    """The learning rate of the next step, after `applied` steps."""
    if isinstance(lr, int | float):
        return lr
    name, fields = lr
    tick = applied // fields.get("steps_per_epoch", 1)
    if name == "constant_lr":
        return fields["base_lr"] * (fields["factor"] if tick < fields["total_iters"] else 1)
    decays = tick // fields["step_size"] if name == "step_lr" else tick
    return fields["base_lr"] * fields["gamma"] ** decays


def _sgd(recipe: Recipe, state: State, g: Array, _step: int) -> tuple[Array, Array, Array]:
    velocity = recipe.momentum * state.first + g
    return (g + recipe.momentum * velocity if recipe.nesterov else velocity), velocity, state.second


def _adam(recipe: Recipe, state: State, g: Array, step: int) -> tuple[Array, Array, Array]:
    b1, b2 = recipe.betas
    m = b1 * state.first + (1 - b1) * g
    v = b2 * state.second + (1 - b2) * g**2
    m_hat = m / (1 - b1**step)
    v_hat = v / (1 - b2**step)
    return m_hat / (np.sqrt(v_hat) + recipe.eps), m, v


def _adamw(recipe: Recipe, state: State, g: Array, step: int) -> tuple[Array, Array, Array]:
    direction, m, v = _adam(recipe, state, g, step)
    return direction + recipe.decoupled_decay * state.fast, m, v


def _adabelief(recipe: Recipe, state: State, g: Array, step: int) -> tuple[Array, Array, Array]:
    b1, b2 = recipe.betas
    m = b1 * state.first + (1 - b1) * g
    s = b2 * state.second + (1 - b2) * (g - m) ** 2 + recipe.eps_root
    m_hat = m / (1 - b1**step)
    s_hat = s / (1 - b2**step)
    direction = m_hat / (np.sqrt(s_hat) + recipe.eps)
    return np.minimum(np.maximum(direction, -recipe.max_direction), recipe.max_direction), m, s


RULES = {"sgd": _sgd, "adam": _adam, "adamw": _adamw, "adabelief": _adabelief}


def adabelief(**options: Any) -> Recipe:
    """AdaBelief with the defaults of its users: epsilon 1e-16, and the same inside the recursion."""
    eps = options.get("eps", 1e-16)
    return replace(Recipe(rule="adabelief", lr=1e-3, eps=eps, eps_root=eps), **options)
