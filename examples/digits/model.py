"""The network and the run that trains it: what every process of the demo has to know alike."""

from typing import Any

import numpy as np

import kedge
from data import Digits
from kedge import optim
from kedge.policies import Policy

RUN = "digits"
LEASE_SECONDS = 3.0
BATCH_SIZE = 32

_SIZES = {"hidden": (64, 128), "output": (128, 10)}
_SEED = 0


def open_run(client: kedge.Client, *, aggregation: Policy) -> kedge.Run:
    """The run, created by whoever comes first."""
    return client.get_or_create_run(
        RUN,
        params=init(),
        optimizer=optim.Lookahead(optim.AdaBelief(lr=2e-3), sync_period=5, alpha=0.5),
        aggregation=aggregation,
    )


def init() -> dict[str, Any]:
    """The weights to begin with: a dense layer of 128 units and one of 10."""
    generator = np.random.default_rng(_SEED)
    return {name: _dense(generator, *size) for name, size in _SIZES.items()}


def logits(weights: Any, images: Any) -> Any:
    """The network. It takes NumPy arrays as well as JAX's.

    Args:
        weights: as `init` makes them.
        images: [count, 64].

    Returns:
        [count, 10], the greater the likelier.
    """
    hidden = images @ weights["hidden"]["w"] + weights["hidden"]["b"]
    return hidden * (hidden > 0) @ weights["output"]["w"] + weights["output"]["b"]


def accuracy(weights: Any, digits: Digits) -> float:
    """The share of images that the network reads right, computed in NumPy."""
    return float(np.mean(logits(weights, digits.images).argmax(axis=1) == digits.labels))


def _dense(generator: np.random.Generator, inputs: int, outputs: int) -> dict[str, np.ndarray]:
    scale = np.sqrt(2 / inputs)
    weights = generator.normal(0, scale, (inputs, outputs)).astype(np.float32)
    return {"w": weights, "b": np.zeros(outputs, np.float32)}
