"""A model of 498 MB: exact through two workers and back, in small messages and bounded memory."""

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from grpc_recorder import GrpcRecorder
from layouts import gpt2, parameter_count
from server_process import ServerProcess

import kedge
from kedge import optim

LAYOUT = gpt2()
COUNT = parameter_count(LAYOUT)
MESSAGE_LIMIT = 4 << 20
WORKERS = 2


def tree_of(period: int) -> dict[str, np.ndarray]:
    """Small whole numbers that repeat with a period prime to every dimension, so that a shifted chunk shows."""
    return {
        name: (np.arange(np.prod(shape), dtype=np.int64) % period).astype(np.float32).reshape(shape)
        for name, shape in LAYOUT
    }


def peak_memory_bytes(process_id: int) -> int:
    status = Path(f"/proc/{process_id}/status").read_text(encoding="ascii")
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])


def train(address: str, name: str, grads: dict[str, np.ndarray], steps: int) -> dict[str, np.ndarray]:
    with kedge.connect(address) as client, client.get_run(name).join(lease_seconds=60, transport="grpc") as worker:
        worker.pull()
        for _ in range(steps):
            weights = worker.step(grads)
    return weights


@pytest.mark.slow
def test_gpt2_goes_through_two_workers_exactly_in_small_messages() -> None:
    params, grads = tree_of(1009), [tree_of(7), tree_of(11)]
    with (
        ServerProcess() as server,
        GrpcRecorder(server.address) as recorder,
        ThreadPoolExecutor(WORKERS) as pool,
        kedge.connect(recorder.address) as client,
    ):
        run = client.create_run(
            "gpt2", params=params, optimizer=optim.SGD(lr=1.0), aggregation=kedge.Synchronous(WORKERS)
        )
        results = list(pool.map(lambda g: train(recorder.address, "gpt2", g, 2), grads))
        pulled = run.pull("fast")
    for name, start in params.items():
        expected = start - (grads[0][name] + grads[1][name])  # two steps of the mean: small whole numbers, exact
        for weights in (*results, pulled):
            np.testing.assert_array_equal(weights[name], expected)
    assert 1 << 20 <= recorder.largest_request_bytes <= MESSAGE_LIMIT
    assert 1 << 20 <= recorder.largest_response_bytes <= MESSAGE_LIMIT


@pytest.mark.slow
def test_gpt2_with_lookahead_and_adabelief_stays_within_its_memory() -> None:
    with ServerProcess() as server, ThreadPoolExecutor(WORKERS) as pool:
        with kedge.connect(server.address) as client:
            client.create_run(
                "gpt2",
                params={name: np.zeros(shape, np.float32) for name, shape in LAYOUT},
                optimizer=optim.Lookahead(optim.AdaBelief(lr=1e-3), sync_period=2),
                aggregation=kedge.Synchronous(WORKERS),
            )
            ones = {name: np.ones(shape, np.float32) for name, shape in LAYOUT}
            list(pool.map(lambda _: train(server.address, "gpt2", ones, 3), range(WORKERS)))
        peak = peak_memory_bytes(server.process.pid)
    budget = 16 * COUNT + 4 * COUNT * (WORKERS + 2) + 400_000_000
    print(f"peak {peak / 1e9:.3f} GB, budget {budget / 1e9:.3f} GB")
    assert peak <= budget
