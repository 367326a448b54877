"""What the contract suite runs against: the fake server, the fake one behind gRPC, and the real one.

With the real one payloads go over gRPC, and once more through shared memory.
"""

import contextlib
import functools
import importlib.util
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from bridge import fake_server_behind_grpc

from kedge import testing
from kedge.client import Client, connect
from kedge.optim import SGD
from kedge.policies import Synchronous
from kedge.run import Run
from kedge.transport import Channel, Event, Exchange, Lease, Push, PushResult
from kedge.wire.manifest import Manifest
from kedge.worker import Worker


@pytest.fixture(scope="session", params=["fake", "grpc", "real", "shared_memory"])
def deployment(request: pytest.FixtureRequest) -> str:
    """Which of them it is."""
    return request.param


@pytest.fixture(scope="session")
def server_address(request: pytest.FixtureRequest, deployment: str) -> Iterator[str]:
    if deployment == "fake":
        with testing.FakeServer() as server:
            yield server.address
    elif deployment == "grpc":
        with fake_server_behind_grpc() as address:
            yield address
    elif importlib.util.find_spec("kedge_server") is None:
        pytest.skip("kedge_server is not installed")
    else:
        yield request.getfixturevalue("server").address


@pytest.fixture
def has_shared_memory(deployment: str) -> bool:
    """Whether it is there for who insists on it."""
    return deployment in ("real", "shared_memory")


def _carried_by(channel: Channel, client: Client) -> None:
    """Lets the payloads of those who leave that open go this way, and no other."""
    open_exchange = client._transport.open_exchange

    def over_channel(manifest: Manifest, lease: Lease | None = None, wanted: Channel = "auto") -> Exchange:
        return open_exchange(manifest, lease, channel if wanted == "auto" else wanted)

    client._transport.open_exchange = over_channel


@contextlib.contextmanager
def _connected(address: str, deployment: str) -> Iterator[Client]:
    with connect(address, retry_seconds=10.0) as client:
        if deployment in ("real", "shared_memory"):
            _carried_by("grpc" if deployment == "real" else "shared_memory", client)
        yield client


@pytest.fixture
def client(server_address: str, deployment: str) -> Iterator[Client]:
    with _connected(server_address, deployment) as client:
        yield client


@pytest.fixture
def other_client(server_address: str, deployment: str) -> Iterator[Client]:
    with _connected(server_address, deployment) as client:
        yield client


_run_numbers = itertools.count(1)


@pytest.fixture
def run_name() -> str:
    """Unique, since the servers live as long as the suite."""
    return f"contract-{next(_run_numbers)}"


@pytest.fixture
def new_run(client: Client, run_name: str) -> Callable[..., Run]:
    """Creates a run with one tensor "w" unless told otherwise."""

    def create(optimizer: Any, aggregation: Any, params: Any = None, groups: Any = (), **options: Any) -> Run:
        params = {"w": np.array([3.0], np.float32)} if params is None else params
        return client.create_run(
            run_name, params=params, optimizer=optimizer, aggregation=aggregation, groups=groups, **options
        )

    return create


@pytest.fixture
def pair(new_run: Callable[..., Run]) -> Iterator[tuple[Run, Worker, Worker]]:
    """A run with a quorum of two, and two workers that have pulled."""
    run = new_run(SGD(lr=1.0), Synchronous(quorum=2))
    with run.join("a") as a, run.join("b") as b:
        a.pull()
        b.pull()
        yield run, a, b


class NumberedWorker:
    """A worker whose pushes are numbered by the test, and which never joins again by itself."""

    def __init__(self, client: Client, run: Run, name: str) -> None:
        self._transport = client._transport
        self._run = run
        self.lease = self._transport.join(run.name, name, 60.0)

    def push(self, sequence: int, *values: float, **changes: Any) -> PushResult:
        """Sends a gradient of the weights of step 0, unless changes say otherwise."""
        arrays = [np.array(values, np.float32)]
        contribution = Push(self.lease, sequence, 0, 1, None, arrays, "float32", 0.0, None)
        with contextlib.closing(self._transport.open_exchange(self._run.manifest, self.lease)) as exchange:
            return exchange.push(contribution._replace(**changes))[0]

    def heartbeat(self) -> None:
        """Renews its lease."""
        self._transport.heartbeat(self.lease)

    def leave(self) -> None:
        """Gives its lease back."""
        self._transport.leave(self.lease)


@pytest.fixture
def numbered_worker(client: Client) -> Callable[[Run, str], NumberedWorker]:
    """Joins a run as one."""
    return functools.partial(NumberedWorker, client)


@pytest.fixture
def take(in_background: Callable[..., Any]) -> Callable[..., Any]:
    """Reads so many events of a watch, and fails if they do not come within half a minute."""

    def read(watch: Iterator[Event], count: int) -> list[Event]:
        return in_background(lambda: [next(watch) for _ in range(count)]).result(30)

    return read
