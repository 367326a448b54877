"""Walks runs on several devices and on one, and prints as JSON which agreed: `python tests/support/on_devices.py`.

A program of its own, since the number of virtual devices is fixed when JAX starts:
XLA_FLAGS=--xla_force_host_platform_device_count=4. Names of answers that a test looks for are those of `CASES`.
"""

import json
import sys
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from kedge import optim
from kedge.optim.controls import Controls
from kedge.wire.manifest import Manifest
from kedge_server.core.placement import Placement, Staged
from kedge_server.core.plan import plan
from kedge_server.core.values import MEAN, Combine
from kedge_server.engine.device import Writer

SHAPES = [("a", (50, 100), "float32"), ("bias", (60,), "float32"), ("b", (9000,), "float32")]
COUNT = 14_060
STEPS = 5
OF_ADABELIEF = optim.AdaBelief().spec().rule
GROUPS = [optim.Group("bias", lr=0.5, grad_clip_norm=0.25)]


class Case(NamedTuple):
    """A run, and how often it is walked."""

    optimizer: optim.Optimizer
    combine: Combine = MEAN
    contribution_count: int = 1
    groups: tuple[optim.Group, ...] = ()


def _around(optimizer: optim.Optimizer) -> optim.Optimizer:
    return optim.Lookahead(optimizer, sync_period=2, alpha=0.5)


CASES = {
    "sgd": Case(_around(optim.SGD(0.1, 0.9, grad_clip_norm=1.0))),
    "adam": Case(_around(optim.Adam(0.1, amsgrad=True, grad_clip_norm=1.0))),
    "adamw": Case(_around(optim.AdamW(0.1, weight_decay=0.1, grad_clip_norm=1.0))),
    "yogi": Case(_around(optim.Yogi(0.1, grad_clip_norm=1.0))),
    "radam": Case(_around(optim.RAdam(0.1, grad_clip_norm=1.0))),
    "nadam": Case(_around(optim.Nadam(0.1, grad_clip_norm=1.0))),
    "lion": Case(_around(optim.Lion(0.1, grad_clip_norm=1.0))),
    "rmsprop": Case(_around(optim.RMSprop(0.1, momentum=0.5, centered=True, grad_clip_norm=1.0))),
    "adagrad": Case(_around(optim.Adagrad(0.1, grad_clip_norm=1.0))),
    "adadelta": Case(_around(optim.Adadelta(0.1, grad_clip_norm=1.0))),
    "adamax": Case(_around(optim.Adamax(0.1, grad_clip_norm=1.0))),
    "lamb": Case(_around(optim.Lamb(0.1, grad_clip_norm=1.0))),
    "adafactor": Case(optim.Adafactor(0.1)),
    "adabelief": Case(optim.AdaBelief(0.1)),
    "adabelief_clipped": Case(optim.AdaBelief(0.1, grad_clip_norm=1.0)),
    "adabelief_lookahead": Case(_around(optim.AdaBelief(0.1))),
    "adabelief_lookahead_clipped": Case(_around(optim.AdaBelief(0.1, grad_clip_norm=1.0))),
    "four_contributions": Case(_around(optim.AdaBelief(0.1, grad_clip_norm=1.0)), contribution_count=4),
    "median": Case(_around(optim.AdaBelief(0.1, grad_clip_norm=1.0)), Combine("median"), 3),
    "groups": Case(_around(optim.AdaBelief(0.1, grad_clip_norm=1.0)), groups=(*GROUPS, optim.Group("a", frozen=True))),
}


def one() -> Placement:
    """What a server has by default."""
    return Placement.of()


def two() -> Placement:
    """The one, and another: JAX compiles for each, so most rules are tried on no more."""
    return Placement.of(2)


def four() -> Placement:
    """A range of blocks on each."""
    return Placement.of("all")


def staged() -> Placement:
    """As on accelerators: by way of pinned memory, and copied out."""
    return Placement(jax.local_devices()[1:3], Staged())


def walk(case: Case, *placements: Callable[[], Placement]) -> bytes:
    """The state after all steps; it moves to the next placement in the midst of each, by way of what is stored."""
    spec = case.optimizer.spec()
    cut = plan(spec, Manifest.from_specs(SHAPES), groups=case.groups, block_elements=2000)
    values = Controls.begin(spec, case.groups).values()
    random = np.random.default_rng(7)
    writer = Writer(cut, random.standard_normal(COUNT, np.float32), values, placements[0]())
    for step, placement in enumerate(placements * (STEPS // len(placements)), start=1):
        gradients = list(random.standard_normal((case.contribution_count, COUNT), np.float32))
        factors = [1 / len(gradients) if case.combine == MEAN else 1.0] * len(gradients)
        if step % 2:
            writer.apply_combined(gradients, factors, values, case.combine, on_combined=lambda _: None)
        else:
            writer.apply(gradients, factors, values, case.combine)
        if len(placements) > 1:
            writer = Writer.resume(cut, writer.capture(), values, step=step, placement=placement())
    snapshot = writer.snapshot()
    return b"".join(array.tobytes() for array in (*snapshot.fast, *(snapshot.slow or ()), *writer.capture().values()))


def main() -> None:
    """Prints {case: whether it agreed with one device on several, bit for bit}, and what was where."""
    agreed = {}
    for name, case in CASES.items():
        placements = (four, staged) if case.optimizer.spec().rule == OF_ADABELIEF else (two,)
        agreed[name] = {walk(case, placement) for placement in placements} == {walk(case, one)}
    moved = CASES["adabelief_lookahead_clipped"]
    agreed["moved"] = walk(moved, four, one, staged, four, one) == walk(moved, one)
    json.dump({"agreed": agreed, "device_count": len(used(four())), "staged_count": len(used(staged()))}, sys.stdout)


def used(placement: Placement) -> set[jax.Device]:
    """The devices that a run's arrays lie on after a step."""
    spec = CASES["adabelief_clipped"].optimizer.spec()
    cut = plan(spec, Manifest.from_specs(SHAPES), block_elements=2000)
    values = Controls.begin(spec, ()).values()
    writer = Writer(cut, np.ones(COUNT, np.float32), values, placement)
    writer.apply([np.ones(COUNT, np.float32)], [1.0], values)
    return {device for array in jax.tree.leaves(writer._blocks) for device in array.devices()}


if __name__ == "__main__":
    main()
