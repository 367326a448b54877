"""A worker without a framework: computes gradients with NumPy, pushes them, and goes on with what came of them.

The server's address is in KEDGE_ADDRESS, and open_run.py has opened the run. Start as many as you like, whenever you
like; each one takes images of its own choice.

    KEDGE_ADDRESS=127.0.0.1:50051 python numpy_worker.py --steps 20000
"""

import argparse
import signal
import sys
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np

import data
import kedge
import model


def value_and_grad(weights: Any, images: np.ndarray, labels: np.ndarray) -> tuple[float, Any]:
    """The mean cross entropy of a minibatch, and its gradient."""
    hidden, output = weights["hidden"], weights["output"]
    active = np.maximum(images @ hidden["w"] + hidden["b"], 0)
    log_probabilities = _log_softmax(active @ output["w"] + output["b"])
    rows = np.arange(len(labels))
    loss = -float(np.mean(log_probabilities[rows, labels]))

    by_logits = np.exp(log_probabilities)
    by_logits[rows, labels] -= 1
    by_logits /= len(labels)
    by_hidden = (by_logits @ output["w"].T) * (active > 0)
    return loss, {"hidden": _dense_grad(images, by_hidden), "output": _dense_grad(active, by_logits)}


def train(run: kedge.Run, batches: Iterable[data.Digits], *, steps: int) -> Counter[str]:
    """Contributes until the run has made so many steps, and counts what became of the contributions."""
    outcomes: Counter[str] = Counter()
    with run.join(lease_seconds=model.LEASE_SECONDS) as worker:
        weights = worker.pull()
        for images, labels in batches:
            if worker.step_number >= steps:
                break
            loss, grads = value_and_grad(weights, images, labels)
            weights = worker.step(grads, loss=loss, example_count=len(labels))
            if worker.last_result is not None:
                outcomes[worker.last_result.outcome] += 1
    return outcomes


def main() -> None:
    """The command."""
    arguments = _parse_arguments()
    # So that a container that is stopped leaves the run, instead of being waited for until its lease expires.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    train_digits, _ = data.load()
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    with kedge.connect() as client:
        run = client.get_run(model.RUN, like=model.init())
        outcomes = train(run, data.batches(train_digits, size=model.BATCH_SIZE, seed=seed), steps=arguments.steps)
    print(f"{outcomes['applied']} applied, {outcomes['rejected']} rejected")


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=1, keepdims=True)
    result: np.ndarray = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


def _dense_grad(inputs: np.ndarray, by_outputs: np.ndarray) -> dict[str, np.ndarray]:
    return {"w": inputs.T @ by_outputs, "b": by_outputs.sum(axis=0)}


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train on handwritten digits, without a framework.")
    parser.add_argument("--steps", type=int, default=20000, help="stop when the run has made so many steps")
    return parser.parse_args()


if __name__ == "__main__":
    main()
