"""The update against optax, composed by hand in one process, in float32.

Lookahead is done by hand around it: `optax.lookahead` masks by multiplication, so that a NaN off-sync reaches the slow
weights, and its fast and slow weights differ in the last bit after a sync.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from . import cases, harness, oracle

ROUNDING = 2.0**-24
SHARES = [count / sum(cases.EXAMPLE_COUNTS) for count in cases.EXAMPLE_COUNTS]

# Both sides round each weight once a step. Besides, optax takes 1 - b2^t in float32, which is off by 1.3e-5 to 2e-5 up
# to t = 100, so its steps are off by half of that: at a rate of 0.02 and directions of 1 by 2e-7, a rounding or two of
# the largest weight. Found: 0.004 to 0.4 of this bound, nearly all of it optax's distance from the float64 oracle.
TOLERANCE = 2 * cases.STEP_COUNT * ROUNDING


def optax_schedule(lr: oracle.Rate) -> optax.Schedule:
    """optax's own form of a schedule."""
    if isinstance(lr, float):
        return optax.constant_schedule(lr)
    name, fields = lr
    every = fields.get("steps_per_epoch", 1)
    if name == "constant_lr":
        levels = [optax.constant_schedule(fields["base_lr"] * factor) for factor in (fields["factor"], 1.0)]
        return optax.join_schedules(levels, [fields["total_iters"] * every])
    return optax.exponential_decay(
        fields["base_lr"], every * fields.get("step_size", 1), fields["gamma"], staircase=True
    )


def optax_rule(recipe: oracle.Recipe) -> list[optax.GradientTransformation]:
    """The base optimizer without its rate."""
    b1, b2 = recipe.betas
    if recipe.rule == "sgd":
        return [optax.trace(recipe.momentum, recipe.nesterov)] if recipe.momentum else []
    if recipe.rule == "adabelief":
        belief = optax.scale_by_belief(b1, b2, recipe.eps, recipe.eps_root)
        return [belief, optax.clip(recipe.max_direction)] if np.isfinite(recipe.max_direction) else [belief]
    adam = optax.scale_by_adam(b1, b2, recipe.eps)
    return [adam, optax.add_decayed_weights(recipe.decoupled_decay)] if recipe.rule == "adamw" else [adam]


def optax_chain(recipe: oracle.Recipe) -> optax.GradientTransformation:
    """All that happens to the mean gradient, in the documented order."""
    parts: list[optax.GradientTransformation] = []
    if recipe.clip_norm is not None:
        parts.append(optax.clip_by_global_norm(recipe.clip_norm))
    if recipe.clip_value is not None:
        parts.append(optax.clip(recipe.clip_value))
    if recipe.decay:
        parts.append(optax.add_decayed_weights(recipe.decay))
    schedule = optax_schedule(recipe.lr)
    return optax.chain(*parts, *optax_rule(recipe), optax.scale_by_schedule(lambda count: -schedule(count)))


def optax_trajectory(recipe: oracle.Recipe, weights: np.ndarray, means: list[np.ndarray]) -> list[harness.Weights]:
    """The float32 weights after every step."""
    chain = optax_chain(recipe)

    @jax.jit
    def step_with(fast: jax.Array, state: Any, gradient: jax.Array) -> tuple[jax.Array, Any]:
        updates, state = chain.update(gradient, state, fast)
        return optax.apply_updates(fast, updates), state

    fast = slow = jnp.asarray(weights)
    state = chain.init(fast)
    path = []
    for step, gradient in enumerate(means, start=1):
        fast, state = step_with(fast, state, gradient)
        if recipe.sync_period is not None and step % recipe.sync_period == 0:
            fast = slow = optax.incremental_update(fast, slow, recipe.alpha)
        path.append(harness.Weights(np.asarray(fast), np.asarray(slow)))
    return path


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
def test_every_step_agrees_with_optax(case: cases.Case) -> None:
    rounds = cases.make_rounds(seed=11)
    start = cases.make_weights(seed=12)
    means = [oracle.weighted_mean(contributions, cases.EXAMPLE_COUNTS).astype(np.float32) for contributions in rounds]
    want = optax_trajectory(case.recipe, start, means)
    got = list(harness.trajectory(case.optimizer, start, rounds, factors=SHARES, sizes=(17, 1, 23)))
    scale = max(np.abs(weights.fast).max() for weights in want)
    assert len(got) == len(want) == cases.STEP_COUNT
    for ours, theirs in zip(got, want, strict=True):
        np.testing.assert_allclose(ours.fast, theirs.fast, rtol=0, atol=TOLERANCE * scale)
        if ours.slow is not None:
            np.testing.assert_allclose(ours.slow, theirs.slow, rtol=0, atol=TOLERANCE * scale)


def test_optax_knows_adabelief_with_the_new_first_moment() -> None:
    # optax up to 0.2.3 took the old one, and its first step is the rate instead of the rate over b1.
    (first,) = optax_trajectory(oracle.adabelief(lr=1.0), np.zeros(1, np.float32), [np.ones(1, np.float32)])
    assert first.fast[0] == pytest.approx(-1 / 0.9, rel=1e-4)
