"""Every rule against the fake server's model: float64 NumPy on whole tensors, which shares no sum with the server's.

In Lookahead, with clips, decay, a schedule and parameter groups at once, on a tree of scalars, vectors, matrices and a
4-D kernel that the code under test cuts into blocks. What both read of `kedge.optim.controls` has its own tests.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from kedge import optim
from kedge.optim.controls import Controls
from kedge.updates import Updater
from kedge.wire.manifest import Manifest
from kedge_server.core.plan import plan

from . import harness

STEP_COUNT = 50
SHAPES: list[tuple[str, tuple[int, ...]]] = [
    ("scale", ()),
    ("bias", (7,)),
    ("kernel", (3, 3, 4, 5)),
    ("embedding", (130, 140)),  # as large as it must be for Adafactor to keep rows and columns
    ("fixed", (5, 3)),
    ("w", (6, 9)),
    ("b", (1,)),
]
MANIFEST = Manifest.from_specs([(name, shape, "float32") for name, shape in SHAPES])
BLOCK = 5000
LR = optim.ExponentialLR(0.01, 0.98)
CLIPS: dict[str, Any] = {"grad_clip_norm": 60.0, "grad_clip_value": 0.5}
GROUPS = (
    optim.Group(("bias", "b"), lr=optim.StepLR(0.02, 3, 0.9, steps_per_epoch=4), weight_decay=0.0),
    optim.Group("kernel", weight_decay=0.2, grad_clip_norm=5.0, grad_clip_value=2.0),
    optim.Group("fixed", frozen=True),
)
# What float32 rounds in 50 steps came to 1.4e-6 for Yogi, whose signs turn where v is next to g^2, and 4e-7 elsewhere.
TOLERANCE = 2.0**-18

RULES: list[optim.Rule] = [
    optim.SGD(LR, **CLIPS),
    optim.SGD(LR, 0.8, 0.05, nesterov=True, **CLIPS),
    optim.Momentum(LR, weight_decay=0.05, **CLIPS),
    optim.MomentumNesterov(LR, 0.7, 0.05, **CLIPS),
    optim.Lion(LR, weight_decay=0.1, **CLIPS),
    optim.Adam(LR, weight_decay=0.05, **CLIPS),
    optim.Adam(LR, (0.8, 0.9), amsgrad=True, **CLIPS),
    optim.AdamW(LR, weight_decay=0.1, **CLIPS),
    optim.Nadam(LR, weight_decay=0.05, **CLIPS),
    optim.RAdam(LR, (0.9, 0.5), weight_decay=0.05, **CLIPS),
    optim.Adamax(LR, weight_decay=0.05, **CLIPS),
    optim.Yogi(LR, weight_decay=0.05, **CLIPS),
    optim.AdaBelief(LR, eps=1e-8, weight_decay=0.05, **CLIPS),
    optim.AdaBelief(LR, eps=1e-8, weight_decay=0.05, max_direction=0.75, **CLIPS),
    optim.RMSprop(LR, 0.9, 1e-4, 0.05, momentum=0.5, centered=True, **CLIPS),
    optim.RMSprop(LR, weight_decay=0.05, **CLIPS),
    optim.Adagrad(LR, lr_decay=0.1, weight_decay=0.05, initial_accumulator_value=0.1, **CLIPS),
    optim.Adadelta(LR, weight_decay=0.05, **CLIPS),
    optim.Lamb(LR, weight_decay=0.1, **CLIPS),
    optim.Lars(LR, weight_decay=0.05, trust_coefficient=0.5, **CLIPS),
    optim.Adafactor(LR, weight_decay=0.1, **CLIPS),
    optim.Adafactor(LR, beta1=0.8, clip_threshold=0.5, decay_rate=0.7, factored=False, **CLIPS),
    optim.Novograd(LR, (0.95, 0.98), weight_decay=0.1, **CLIPS),
]


def start() -> np.ndarray:
    return np.random.default_rng(5).normal(size=MANIFEST.element_count).astype(np.float32)


def gradients() -> list[np.ndarray]:
    """Of each step: noise about a drift, of another size from step to step."""
    rng = np.random.default_rng(6)
    drift = rng.normal(size=MANIFEST.element_count)
    sizes = 10.0 ** rng.uniform(-2, 0.5, STEP_COUNT)
    return [((0.3 * drift + rng.normal(size=drift.size)) * size).astype(np.float32) for size in sizes]


def model_walk(optimizer: optim.Optimizer) -> Iterator[harness.Weights]:
    """The model's weights after each step."""
    model = Updater(optimizer, GROUPS, MANIFEST, start())
    controls = Controls.begin(optimizer.spec(), GROUPS)
    for gradient in gradients():
        model.apply(gradient, controls.values())
        controls = controls.after_step(None, 0)
        yield harness.Weights(model.fast.copy(), None if model.slow is None else model.slow.copy())


def our_walk(optimizer: optim.Optimizer) -> Iterator[harness.Weights]:
    """The weights after each step, on blocks."""
    cut = plan(optimizer.spec(), MANIFEST, groups=GROUPS, block_elements=BLOCK)
    return harness.trajectory(optimizer, start(), harness.single(gradients()), plan=cut, groups=GROUPS)


def distance(got: harness.Weights, want: harness.Weights) -> float:
    """The greatest difference of a weight, in the unit of the greatest weight."""
    assert got.slow is not None
    assert want.slow is not None
    apart = max(np.abs(got.fast - want.fast).max(), np.abs(got.slow - want.slow).max())
    return float(apart / np.abs(want.fast).max())


@pytest.mark.parametrize("reset_state", [False, True], ids=["kept", "reset"])
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_agrees_with_the_fake_servers_model(rule: optim.Rule, reset_state: bool) -> None:
    optimizer = optim.Lookahead(rule, sync_period=6, alpha=0.4, reset_state=reset_state)
    for got, want in zip(our_walk(optimizer), model_walk(optimizer), strict=True):
        assert distance(got, want) < TOLERANCE


def test_every_rule_but_optax_is_here() -> None:
    known = {value for value in vars(optim).values() if isinstance(value, type) and issubclass(value, optim.Rule)}
    assert {type(rule) for rule in RULES} == known - {optim.Rule, optim.Optax}
