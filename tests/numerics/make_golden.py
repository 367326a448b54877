"""Writes golden/*.json: `python tests/numerics/make_golden.py`.

The trajectories are those of the float64 oracle, not of the code under test. A golden file changes only when the
documented mathematics does.
"""

import json
from dataclasses import asdict
from pathlib import Path

import golden_inputs
import numpy as np
import oracle

FOLDER = Path(__file__).parent / "golden"

RECIPES = {
    "adabelief": oracle.adabelief(lr=0.01),
    "lookahead_adabelief_everything": oracle.adabelief(
        lr=("step_lr", {"base_lr": 0.02, "step_size": 13, "gamma": 0.5}),
        decay=0.05,
        clip_norm=3.0,
        clip_value=0.75,
        sync_period=5,
        alpha=0.5,
    ),
    "sgd_nesterov": oracle.Recipe(rule="sgd", lr=0.02, momentum=0.9, nesterov=True),
    "adamw": oracle.Recipe(rule="adamw", lr=0.01, decoupled_decay=0.1),
}


def rounded(values: np.ndarray) -> list[float]:
    """To ten decimals: a hundred times below float32's rounding of a weight of 1."""
    return [round(float(value), 10) for value in values]


def golden(recipe: oracle.Recipe) -> dict[str, object]:
    """The recipe and the weights at the checkpoints."""
    states = list(oracle.trajectory(recipe, golden_inputs.weights(), golden_inputs.gradients()))
    chosen = {step: states[step - 1] for step in golden_inputs.CHECKPOINTS}
    content: dict[str, object] = {
        "recipe": {field: value for field, value in asdict(recipe).items() if value is not None},
        "fast": {str(step): rounded(state.fast) for step, state in chosen.items()},
    }
    if recipe.sync_period is not None:
        content["slow"] = {str(step): rounded(state.slow) for step, state in chosen.items()}
    return content


def main() -> None:
    """Writes every file."""
    FOLDER.mkdir(exist_ok=True)
    for name, recipe in RECIPES.items():
        text = json.dumps(golden(recipe), indent=0, sort_keys=True)
        (FOLDER / f"{name}.json").write_text(text.replace(",\n", ", ").replace("], ", "],\n") + "\n")


if __name__ == "__main__":
    main()
