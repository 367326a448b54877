"""Whole trajectories that are checked in: what a refactoring must not change.

They are the float64 oracle's (`make_golden.py`) and compared within float32's rounding. No file pins the float32 bits
themselves: XLA compiles for the CPU that it finds, and where that has fused multiply-add, or orders a sum by its vector
width, the last bits are others. Bit-identity is asserted within one process instead (cuts, copies, alpha = 1).
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kedge import optim

from . import golden_inputs, harness, oracle

FOLDER = Path(__file__).parent / "golden"

OPTIMIZERS: dict[str, optim.Optimizer] = {
    "adabelief": optim.AdaBelief(lr=0.01),
    "lookahead_adabelief_everything": optim.Lookahead(
        optim.AdaBelief(lr=optim.StepLR(0.02, 13, 0.5)),
        weight_decay=0.05,
        grad_clip_norm=3.0,
        grad_clip_value=0.75,
        sync_period=5,
        alpha=0.5,
    ),
    "sgd_nesterov": optim.SGD(lr=0.02, momentum=0.9, nesterov=True),
    "adamw": optim.AdamW(lr=0.01, weight_decay=0.1),
}

# One rounding of each weight a step, and the files' ten decimals.
TOLERANCE = golden_inputs.STEP_COUNT * 2.0**-24 + 1e-10

each_golden = pytest.mark.parametrize("name", OPTIMIZERS)


def load(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text())
    return content


def assert_at_checkpoints(golden: dict[str, Any], path: list[Any], relative: float) -> None:
    scale = max(np.abs(weights.fast).max() for weights in path)
    for field in sorted(golden.keys() - {"recipe"}):
        assert [int(step) for step in golden[field]] == sorted(golden_inputs.CHECKPOINTS, key=str)
        for step, want in golden[field].items():
            got = getattr(path[int(step) - 1], field)
            np.testing.assert_allclose(got, want, rtol=0, atol=relative * scale, err_msg=f"{field} at step {step}")


@each_golden
@pytest.mark.parametrize("sizes", [(37,), (8, 1, 28)], ids=str)
def test_the_update_follows_the_golden_trajectory(name: str, sizes: tuple[int, ...]) -> None:
    rounds = harness.single(golden_inputs.gradients())
    path = list(harness.trajectory(OPTIMIZERS[name], golden_inputs.weights(), rounds, sizes=sizes))
    assert_at_checkpoints(load(name), path, TOLERANCE)


@each_golden
def test_the_golden_trajectory_is_still_the_oracles(name: str) -> None:
    golden = load(name)
    recipe = oracle.Recipe(**golden["recipe"])
    path = list(oracle.trajectory(recipe, golden_inputs.weights(), golden_inputs.gradients()))
    assert_at_checkpoints(golden, path, 1e-9)


def test_every_golden_file_is_compared() -> None:
    assert {file.stem for file in FOLDER.iterdir()} == OPTIMIZERS.keys()


def test_golden_inputs_are_exact_in_float32_and_reach_both_clips() -> None:
    for values in (golden_inputs.weights(), *golden_inputs.gradients()):
        assert np.array_equal(values, values.astype(np.float32))
    norms = [np.linalg.norm(gradient) for gradient in golden_inputs.gradients()]
    assert 10 < sum(norm > 3.0 for norm in norms) < 60
    largest = [np.abs(g).max() * min(1, 3.0 / norm) for g, norm in zip(golden_inputs.gradients(), norms, strict=True)]
    assert sum(value > 0.75 for value in largest) > 10
