"""Runs that several processes want to create at the same moment."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from server_process import ServerProcess
from wire_client import WireClient

import kedge
from kedge import optim

STARTERS = 6
PARAMS = {"w": np.zeros(300_000, np.float32)}


def test_starters_in_any_order_get_one_run(server: ServerProcess, run_id: str) -> None:
    barrier = threading.Barrier(STARTERS)

    def start(attempt: int) -> kedge.Run:
        with kedge.connect(server.address) as client:
            barrier.wait(timeout=30)
            return client.get_or_create_run(
                f"{run_id}-{attempt}", params=PARAMS, optimizer=optim.SGD(), aggregation=kedge.Synchronous(1)
            )

    with ThreadPoolExecutor(STARTERS) as pool:
        for attempt in range(10):
            runs = list(pool.map(lambda _, attempt=attempt: start(attempt), range(STARTERS)))
            assert {run.name for run in runs} == {f"runs/{run_id}-{attempt}"}


def test_creation_repeated_while_the_first_is_under_way_gets_the_same_run(server: ServerProcess, run_id: str) -> None:
    barrier = threading.Barrier(STARTERS)

    def create(attempt: int) -> tuple[int, int]:
        client = WireClient(server.address)
        barrier.wait(timeout=30)
        run = client.create(f"{run_id}-{attempt}", PARAMS["w"], request_id="one")
        client.close()
        return run.create_time.seconds, run.create_time.nanos

    with ThreadPoolExecutor(STARTERS) as pool:
        for attempt in range(3):
            moments = set(pool.map(lambda _, attempt=attempt: create(attempt), range(STARTERS)))
            assert len(moments) == 1
