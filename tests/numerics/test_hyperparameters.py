"""Hyperparameters of a live run: parameter groups against optax's own partition, and nothing compiled for a change."""

import logging
import math
import re
from typing import Any

import jax
import numpy as np
import optax
import pytest

from kedge import optim
from kedge.optim.controls import Change, Controls
from kedge.wire.manifest import Manifest
from kedge_server.core import update
from kedge_server.core.plan import plan

from . import harness

SHAPES: dict[str, tuple[int, ...]] = {
    "embed.w": (12, 5),
    "a.w": (5, 6),
    "a.b": (6,),
    "b.w": (6, 4),
    "b.b": (4,),
    "scale": (),
}
MANIFEST = Manifest.from_specs([(name, shape, "float32") for name, shape in SHAPES.items()])
COUNT = MANIFEST.element_count
STEP_COUNT = 50


def gradients() -> list[np.ndarray]:
    rng = np.random.default_rng(8)
    return [rng.normal(size=COUNT).astype(np.float32) for _ in range(STEP_COUNT)]


def start() -> np.ndarray:
    return np.random.default_rng(9).normal(size=COUNT).astype(np.float32)


def tree_of(flat: np.ndarray) -> dict[str, np.ndarray]:
    return {t.name: flat[t.offset : t.offset + t.size].reshape(t.shape) for t in MANIFEST.tensors}


def optax_walk(transformation: optax.GradientTransformation) -> np.ndarray:
    weights: Any = tree_of(start())
    state = transformation.init(weights)
    for gradient in gradients():
        updates, state = transformation.update(tree_of(gradient), state, weights)
        weights = optax.apply_updates(weights, updates)
    return np.concatenate([np.asarray(weights[name]).reshape(-1) for name in SHAPES])  # JAX sorts a dict


def our_walk(optimizer: optim.Optimizer, groups: list[optim.Group]) -> np.ndarray:
    cut = plan(optimizer.spec(), MANIFEST, groups=groups, block_elements=40)
    *_, last = harness.trajectory(optimizer, start(), harness.single(gradients()), plan=cut, groups=groups)
    return last.fast


def adamw(rate: float, decay: float, norm: float | None = None) -> optax.GradientTransformation:
    clip = optax.identity() if norm is None else optax.clip_by_global_norm(norm)
    return optax.chain(clip, optax.adamw(rate, weight_decay=decay))


def lamb(rate: float, decay: float) -> optax.GradientTransformation:
    return optax.lamb(rate, weight_decay=decay)


GROUPS = [
    optim.Group("*.b", weight_decay=0.0),
    optim.Group("embed.*", lr=0.001),
    optim.Group("scale", frozen=True),
]
LABELS = {"embed.w": "embed", "a.w": "run", "a.b": "bias", "b.w": "run", "b.b": "bias", "scale": "frozen"}


@pytest.mark.parametrize(("ours", "theirs"), [(optim.AdamW, adamw), (optim.Lamb, lamb)], ids=["adamw", "lamb"])
def test_groups_agree_with_optax_partition(ours: Any, theirs: Any) -> None:
    parts = {
        "run": theirs(0.01, 0.1),
        "bias": theirs(0.01, 0.0),
        "embed": theirs(0.001, 0.1),
        "frozen": optax.set_to_zero(),
    }
    want = optax_walk(optax.partition(parts, LABELS))
    got = our_walk(ours(0.01, weight_decay=0.1), GROUPS)

    assert np.abs(got - want).max() < 1e-5
    assert got[-1] == start()[-1]


def test_norm_clips_of_groups_agree_with_optax_partition() -> None:
    # Within a part optax's clip_by_global_norm sees that part alone, which is what a clip of the group's own is.
    labels = {name: "a" if name.startswith("a.") else "rest" for name in SHAPES}
    want = optax_walk(optax.partition({"a": adamw(0.01, 0.1, 0.5), "rest": adamw(0.01, 0.1, 2.0)}, labels))
    groups = [optim.Group("a.*", grad_clip_norm=0.5), optim.Group("scale", lr=0.01)]  # the second shares the run's clip

    assert np.abs(our_walk(optim.AdamW(0.01, weight_decay=0.1, grad_clip_norm=2.0), groups) - want).max() < 1e-5


OPTIMIZERS = [
    optim.AdamW(),
    optim.Lookahead(optim.Lamb(), sync_period=2),
    optim.Lookahead(optim.Adafactor(), sync_period=2, reset_state=True),
    optim.Optax("adan"),
]


@pytest.mark.parametrize("contribution_count", [1, 3])
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=["adamw", "lookahead_lamb", "lookahead_adafactor", "adan"])
def test_a_change_does_not_compile_the_rule_anew(
    optimizer: optim.Optimizer, contribution_count: int, caplog: pytest.LogCaptureFixture
) -> None:
    jax.clear_caches()  # whatever other tests have compiled
    group = optim.Group("a.*", name="a")
    program = update.Program(plan(optimizer.spec(), MANIFEST, groups=[group], block_elements=40))
    controls = Controls.begin(optimizer.spec(), [group])
    blocks = program.init(start(), controls.values())

    def advance(step: int) -> update.Blocks:
        parts = [gradients()[step]] * contribution_count
        shares = [1 / contribution_count] * contribution_count
        return program.apply(blocks, parts, factors=shares, step=step, values=controls.values())

    changes = [
        Change(lr=0.5),
        Change(lr=optim.CosineAnnealingLR(0.1, 50)),
        Change(weight_decay=0.3),
        Change(grad_clip_value=0.1),
        Change(grad_clip_value=math.inf),
        Change(grad_clip_norm=0.5),
    ]
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        for step in (1, 2, 3):
            blocks = advance(step)
        assert "_fast_step" in caplog.text
        caplog.clear()
        for step, change in enumerate(changes * 2, start=4):
            controls = controls.changed("a" if step % 2 else "", change, step=step)
            blocks = advance(step)
    compiled = set(re.findall(r"Finished XLA compilation of jit\((\w+)\)", caplog.text))
    assert compiled == {"_square", "_clip_scale"}  # for the first clip by norm: small, and once for each length
