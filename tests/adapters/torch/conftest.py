"""Servers, a network and real data for the tests of the PyTorch adapter. PyTorch is imported where it is used."""

import importlib.util
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from server_process import ServerProcess
from sklearn.datasets import load_digits

from kedge import testing
from kedge.client import Client, connect

_run_numbers = itertools.count(1)


@pytest.fixture
def client() -> Iterator[Client]:
    """Of a fake server."""
    with testing.FakeServer() as server, server.connect(retry_seconds=5.0) as client:
        yield client


@pytest.fixture(params=["fake", "real"])
def any_client(request: pytest.FixtureRequest) -> Iterator[Client]:
    """Of a fake server, and of a real one."""
    if request.param == "fake":
        yield request.getfixturevalue("client")
        return
    if importlib.util.find_spec("kedge_server") is None:
        pytest.skip("kedge_server is not installed")
    server: ServerProcess = request.getfixturevalue("server")
    with connect(server.address, retry_seconds=10.0) as client:
        yield client


@pytest.fixture
def run_name() -> str:
    """Unique, since the real server lives as long as the suite."""
    return f"torch-{next(_run_numbers)}"


@pytest.fixture
def network() -> Callable[..., Any]:
    """Makes networks for the digits, all with the same weights."""
    import torch

    def make(seed: int = 0) -> torch.nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return torch.nn.Sequential(torch.nn.Linear(64, 24), torch.nn.ReLU(), torch.nn.Linear(24, 10))

    return make


@pytest.fixture(scope="session")
def batches() -> list[Any]:
    """Forty minibatches of 44 handwritten digits: (images, labels)."""
    import torch

    raw = load_digits()
    images = torch.from_numpy((raw.data / 16).astype("float32"))
    labels = torch.from_numpy(raw.target.astype("int64"))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))
    return [(images[rows], labels[rows]) for rows in order[: 40 * 44].reshape(40, 44)]
