from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
from server_process import ServerProcess
from worker_fleet import Fleet

import kedge
from kedge import optim

pytest.register_assert_rewrite("outage", "killed_training")  # so that its assertions say what they compared


@pytest.fixture
def fleet() -> Iterator[Fleet]:
    """Worker processes, gone when the test ends."""
    with Fleet() as processes:
        yield processes


@pytest.fixture
def client(server: ServerProcess) -> Iterator[kedge.Client]:
    with kedge.connect(server.address) as connection:
        yield connection


@pytest.fixture
def new_run(client: kedge.Client, run_id: str):
    """Creates the test's run: plain SGD on one tensor of zeros, so that weights are the sum of what was applied."""

    def create(aggregation: kedge.Synchronous | kedge.Asynchronous, *, size: int = 16, lr: float = 1.0) -> kedge.Run:
        return client.create_run(
            run_id, params={"w": np.zeros(size, np.float32)}, optimizer=optim.SGD(lr=lr), aggregation=aggregation
        )

    return create


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Any], Any]:
    """What came of the known training, at a level of durability, on a server that nobody killed."""
    import killed_training

    return cache(lambda durability: killed_training.play(tmp_path_factory.mktemp("uninterrupted"), durability))
