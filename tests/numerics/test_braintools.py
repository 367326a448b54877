"""The update against the braintools package itself: its AdaBelief and its Lookahead, in float32.

Where braintools does something else than its documents say, the update does what they say, and a test shows both.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import brainstate
import braintools
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kedge import optim

from . import cases, harness, oracle

ROUNDING = 2.0**-24

# Both sides round each weight once a step, braintools' Lookahead twice. Besides, optax takes 1 - b2^t in float32, which
# is off by up to 2e-5: at the rates of here less than a rounding of the largest weight a step. Found: 0.008 to 0.36 of
# this bound.
TOLERANCE = 2 * cases.STEP_COUNT * ROUNDING


class Case(NamedTuple):
    """One optimizer, ours and theirs."""

    ours: optim.Optimizer
    theirs: Callable[[], Any]
    """Makes it anew: it holds the state of a trajectory."""


CLIPS: dict[str, float] = {"grad_clip_norm": 4.0, "grad_clip_value": 0.7}

ADABELIEF = {
    "plain": Case(optim.AdaBelief(lr=0.01), lambda: braintools.optim.AdaBelief(lr=0.01)),
    "defaults": Case(optim.AdaBelief(), braintools.optim.AdaBelief),
    "betas": Case(
        optim.AdaBelief(lr=0.01, betas=(0.8, 0.99)), lambda: braintools.optim.AdaBelief(lr=0.01, betas=(0.8, 0.99))
    ),
    "decay_clip_norm": Case(
        optim.AdaBelief(lr=0.01, weight_decay=0.1, grad_clip_norm=3.0),
        lambda: braintools.optim.AdaBelief(lr=0.01, weight_decay=0.1, grad_clip_norm=3.0),
    ),
    "both_clips": Case(optim.AdaBelief(lr=0.01, **CLIPS), lambda: braintools.optim.AdaBelief(lr=0.01, **CLIPS)),
    "step_lr": Case(
        optim.AdaBelief(lr=optim.StepLR(0.02, 7, 0.5)),
        lambda: braintools.optim.AdaBelief(lr=braintools.optim.StepLR(0.02, 7, 0.5)),
    ),
    "exponential_lr": Case(
        optim.AdaBelief(lr=optim.ExponentialLR(0.02, 0.95)),
        lambda: braintools.optim.AdaBelief(lr=braintools.optim.ExponentialLR(0.02, 0.95)),
    ),
    "everything": Case(
        optim.AdaBelief(optim.StepLR(0.02, 7, 0.5), (0.8, 0.99), weight_decay=0.1, **CLIPS),
        lambda: braintools.optim.AdaBelief(
            braintools.optim.StepLR(0.02, 7, 0.5), (0.8, 0.99), weight_decay=0.1, **CLIPS
        ),
    ),
}

BASES = {
    "sgd": (optim.SGD(lr=0.02), lambda: optax.sgd(0.02)),
    "momentum": (optim.SGD(lr=0.02, momentum=0.9), lambda: optax.sgd(0.02, momentum=0.9)),
    "adam": (optim.Adam(lr=0.01), lambda: optax.adam(0.01)),
    "adabelief": (optim.AdaBelief(lr=0.01), lambda: optax.adabelief(0.01)),
}


def lookahead(base: str, sync_period: int, alpha: float, **options: float) -> Case:
    ours, theirs = BASES[base]
    return Case(
        optim.Lookahead(ours, sync_period, alpha, **options),
        lambda: braintools.optim.Lookahead(theirs(), sync_period, alpha, **options),
    )


LOOKAHEAD = {
    f"{base}_{sync_period}_{alpha}": lookahead(base, sync_period, alpha)
    for base in BASES
    for sync_period, alpha in ((1, 0.5), (5, 0.5), (6, 0.3), (10, 0.8), (60, 0.5))
} | {
    "adam_5_0": lookahead("adam", 5, 0.0),
    "adam_5_1": lookahead("adam", 5, 1.0),
    "momentum_decay_clips": lookahead("momentum", 5, 0.5, weight_decay=0.1, **CLIPS),
    "adabelief_decay_clips": lookahead("adabelief", 6, 0.3, weight_decay=0.1, **CLIPS),
}


def braintools_trajectory(optimizer: Any, weights: np.ndarray, gradients: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The weights after every step; the schedule ticks after each."""
    state = brainstate.ParamState(jnp.asarray(weights))
    optimizer.register_trainable_weights({"weights": state})
    path = []
    for gradient in gradients:
        optimizer.update({"weights": jnp.asarray(gradient)})
        optimizer.lr.step()
        path.append(np.asarray(state.value))
    return path


def means(seed: int) -> list[np.ndarray]:
    rounds = cases.make_rounds(seed=seed)
    return [oracle.weighted_mean(contributions, cases.EXAMPLE_COUNTS).astype(np.float32) for contributions in rounds]


@pytest.mark.parametrize("case", [*ADABELIEF.values(), *LOOKAHEAD.values()], ids=[*ADABELIEF, *LOOKAHEAD])
def test_every_step_agrees_with_braintools(case: Case) -> None:
    start, gradients = cases.make_weights(seed=21), means(seed=22)
    want = braintools_trajectory(case.theirs(), start, gradients)
    got = [weights.fast for weights in harness.trajectory(case.ours, start, harness.single(gradients))]
    scale = max(np.abs(weights).max() for weights in want)
    assert len(got) == len(want) == cases.STEP_COUNT
    for ours, theirs in zip(got, want, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE * scale)


def test_eps_is_in_the_recursion_as_the_text_has_it_and_not_as_braintools_has_it() -> None:
    # braintools gives optax its eps but not its eps_root, so 1e-16 stands in the recursion whatever eps is.
    start, gradients = cases.make_weights(seed=23), means(seed=24)
    text, package = (
        [state.fast for state in oracle.trajectory(oracle.adabelief(lr=0.01, eps=1e-3, **root), start, gradients)]
        for root in ({}, {"eps_root": 1e-16})
    )
    ours = list(harness.trajectory(optim.AdaBelief(lr=0.01, eps=1e-3), start, harness.single(gradients)))
    theirs = braintools_trajectory(braintools.optim.AdaBelief(lr=0.01, eps=1e-3), start, gradients)
    same = optim.AdaBelief(lr=0.01, eps=1e-3, eps_root=1e-16)
    like_theirs = list(harness.trajectory(same, start, harness.single(gradients)))
    atol = TOLERANCE * np.abs(package).max()
    for step in range(cases.STEP_COUNT):
        np.testing.assert_allclose(ours[step].fast, text[step], rtol=0, atol=atol)
        np.testing.assert_allclose(theirs[step], package[step], rtol=0, atol=atol)
        np.testing.assert_allclose(like_theirs[step].fast, package[step], rtol=0, atol=atol)
    assert np.abs(text[-1] - package[-1]).max() > 1000 * atol


def test_the_rate_of_lookahead_is_that_of_the_base_as_the_text_has_it_and_not_ignored_as_in_braintools() -> None:
    start, gradient = np.zeros(1, np.float32), np.ones(1, np.float32)
    (ours,) = harness.trajectory(optim.Lookahead(optim.SGD(lr=0.5), lr=0.125), start, harness.single([gradient]))
    (theirs,) = braintools_trajectory(braintools.optim.Lookahead(optax.sgd(0.5), lr=0.125), start, [gradient])
    assert (ours.fast.tolist(), theirs.tolist()) == ([-0.125], [-0.5])


def test_the_rate_of_the_base_is_kept_where_lookahead_is_given_none() -> None:
    start, gradient = np.zeros(1, np.float32), np.ones(1, np.float32)
    (ours,) = harness.trajectory(optim.Lookahead(optim.SGD(lr=0.5)), start, harness.single([gradient]))
    (theirs,) = braintools_trajectory(braintools.optim.Lookahead(optax.sgd(0.5)), start, [gradient])
    assert ours.fast.tolist() == theirs.tolist() == [-0.5]
