"""Training on the handwritten digits with compressed gradients ends within one point of the accuracy without."""

import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kedge
from kedge import optim, testing

DIGITS = Path(__file__).parents[2] / "examples" / "digits"
STEPS = 3000
WORKERS = 2
GREATEST = 1.0


@cache
def example() -> tuple[Any, Any]:
    """The example's modules, which import each other by their bare names."""
    sys.path.insert(0, str(DIGITS))
    try:
        import data
        import model
    finally:
        sys.path.remove(str(DIGITS))
    return data, model


def gradient(weights: Any, batch: Any) -> dict[str, dict[str, np.ndarray]]:
    """Of the mean cross-entropy of the example's network, by hand."""
    hidden = batch.images @ weights["hidden"]["w"] + weights["hidden"]["b"]
    active = np.maximum(hidden, 0)
    logits = active @ weights["output"]["w"] + weights["output"]["b"]
    share = np.exp(logits - logits.max(axis=1, keepdims=True))
    share /= share.sum(axis=1, keepdims=True)
    share[np.arange(len(batch.labels)), batch.labels] -= 1
    share /= len(batch.labels)
    inner = share @ weights["output"]["w"].T * (hidden > 0)
    return {
        "hidden": {"w": batch.images.T @ inner, "b": inner.sum(axis=0)},
        "output": {"w": active.T @ share, "b": share.sum(axis=0)},
    }


@cache
def accuracy(wire_dtype: str | kedge.TopK) -> float:
    """Of the slow weights, on images that were not trained with."""
    data, model = example()
    train, test = data.load()
    greatest = GREATEST if wire_dtype == "sign" else None
    optimizer = optim.Lookahead(optim.AdaBelief(lr=2e-3, max_direction=greatest), sync_period=5, alpha=0.5)
    with testing.FakeServer() as server, server.connect() as client:
        run = client.create_run(
            "digits", params=model.init(), optimizer=optimizer, aggregation=kedge.Synchronous(quorum=WORKERS)
        )
        with run.join("a", wire_dtype=wire_dtype) as first, run.join("b", wire_dtype=wire_dtype) as second:
            workers = [
                (worker, data.batches(data.shard(train, at, WORKERS), size=32, seed=at))
                for at, worker in enumerate((first, second))
            ]
            for _ in range(STEPS):
                for worker, batches in workers:
                    worker.push(gradient(worker.pull(), next(batches)))
        assert run.status().step == STEPS
        return float(model.accuracy(run.pull("slow"), test))


@pytest.mark.parametrize("wire_dtype", ["int8", kedge.TopK(0.05), "sign"], ids=str)
def test_accuracy_is_within_a_point_of_that_without_compression(wire_dtype: str | kedge.TopK) -> None:
    plain = accuracy("float32")
    assert plain > 0.95
    assert accuracy(wire_dtype) > plain - 0.01
