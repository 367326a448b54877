"""Clients of a fake and of a real server, and small brainstate models."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import brainstate
import jax.numpy as jnp
import numpy as np
import pytest

import kedge
from kedge import testing


@pytest.fixture
def client() -> Iterator[kedge.Client]:
    with testing.FakeServer() as server, kedge.connect(server.address) as client:
        yield client


@pytest.fixture(params=["fake", "real"])
def any_client(request: pytest.FixtureRequest) -> Iterator[kedge.Client]:
    if request.param == "fake":
        yield request.getfixturevalue("client")
        return
    with kedge.connect(request.getfixturevalue("server").address) as client:
        yield client


_numbers = itertools.count(1)


@pytest.fixture
def name() -> str:
    """Of a run: unique, since the real server lives as long as the suite."""
    return f"brainstate-{next(_numbers)}"


@pytest.fixture
def model() -> brainstate.nn.Module:
    """Two layers, of known weights."""
    brainstate.random.seed(0)
    return brainstate.nn.Sequential(brainstate.nn.Linear(4, 3), brainstate.nn.ReLU(), brainstate.nn.Linear(3, 2))


def weights_of(model: brainstate.nn.Module) -> Any:
    return model.states(brainstate.ParamState)


def by_name(states: Any) -> dict[str, np.ndarray]:
    """The weights of Linear layers, named by hand."""
    return {
        ".".join(map(str, (*path, leaf))): np.asarray(value)
        for path, state in states.items()
        for leaf, value in state.value.items()
    }


@pytest.fixture
def gradients() -> Callable[..., Iterator[Any]]:
    """Gradients of a mean square on random inputs, as many as asked for, at the weights of the moment."""

    def make(model: brainstate.nn.Module, count: int, *, seed: int = 0) -> Iterator[Any]:
        rng = np.random.default_rng(seed)
        for _ in range(count):
            inputs = jnp.asarray(rng.normal(size=(8, 4)).astype(np.float32))
            targets = jnp.asarray(rng.normal(size=(8, 2)).astype(np.float32))

            def loss(inputs: Any = inputs, targets: Any = targets) -> Any:
                return jnp.mean((model(inputs) - targets) ** 2)

            yield brainstate.transform.grad(loss, weights_of(model))()

    return make
