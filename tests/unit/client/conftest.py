"""A run of the fake server behind a transport that fails as a test wants it."""

import numpy as np
import pytest
from faulty_transport import FaultyTransport, Time

import kedge
from kedge import testing
from kedge.client import Client
from kedge.retry import Retrier
from kedge.transport import in_process


@pytest.fixture
def server_time():
    return Time()


@pytest.fixture
def transport(server_time):
    with testing.FakeServer(clock=server_time) as server:
        yield FaultyTransport(in_process.transport_to(server.address))


@pytest.fixture
def run(transport):
    time = Time()
    client = Client(transport, Retrier(10.0, clock=time, wait=time.wait))
    return client.create_run(
        "r",
        params={"w": np.array([3.0], np.float32)},
        optimizer=kedge.optim.SGD(lr=1.0),
        aggregation=kedge.Asynchronous(),
    )


@pytest.fixture
def worker(run):
    with run.join("a", lease_seconds=60.0) as worker:
        worker.pull()
        yield worker
