"""The servers that the contract suite runs against: the fake one, the fake one behind gRPC, and the real one."""

import importlib.util
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from bridge import fake_server_behind_grpc

from kedge import testing
from kedge.client import Client, Run, connect
from kedge.optim import SGD
from kedge.policies import Synchronous
from kedge.worker import Worker


@pytest.fixture(scope="session", params=["fake", "grpc", "real"])
def server_address(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "fake":
        with testing.FakeServer() as server:
            yield server.address
    elif request.param == "grpc":
        with fake_server_behind_grpc() as address:
            yield address
    elif importlib.util.find_spec("kedge_server") is None:
        pytest.skip("kedge_server is not installed")
    else:
        yield request.getfixturevalue("server").address


@pytest.fixture
def client(server_address: str) -> Iterator[Client]:
    with connect(server_address, retry_seconds=10.0) as client:
        yield client


@pytest.fixture
def other_client(server_address: str) -> Iterator[Client]:
    with connect(server_address, retry_seconds=10.0) as client:
        yield client


_run_numbers = itertools.count(1)


@pytest.fixture
def run_name() -> str:
    """Unique, since the servers live as long as the suite."""
    return f"contract-{next(_run_numbers)}"


@pytest.fixture
def new_run(client: Client, run_name: str) -> Callable[..., Run]:
    """Creates a run with one tensor "w" unless told otherwise."""

    def create(optimizer: Any, aggregation: Any, params: Any = None, groups: Any = ()) -> Run:
        params = {"w": np.array([3.0], np.float32)} if params is None else params
        return client.create_run(run_name, params=params, optimizer=optimizer, aggregation=aggregation, groups=groups)

    return create


@pytest.fixture
def pair(new_run: Callable[..., Run]) -> Iterator[tuple[Run, Worker, Worker]]:
    """A run with a quorum of two, and two workers that have pulled."""
    run = new_run(SGD(lr=1.0), Synchronous(quorum=2))
    with run.join("a") as a, run.join("b") as b:
        a.pull()
        b.pull()
        yield run, a, b
