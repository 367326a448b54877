"""A network that loses answers, resets streams and repeats requests: each contribution is applied once all the same."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
from durable_server import DurableServer, inspected
from durable_training import impatient_client
from http2_proxy import Http2Proxy, Shares

import kedge
from kedge import optim

WORKERS, PUSHES = 8, 500
TOTAL = WORKERS * PUSHES
SIZE = 32
SEED = 5
SHARES = Shares(lost=0.3, reset=0.1, repeated=0.05)
RATE, MOMENTUM, PERIOD, ALPHA = 0.01, 0.9, 5, 0.5
LEDGER_WINDOW = 64


@pytest.fixture
def server(tmp_path: Path) -> Iterator[DurableServer]:
    with DurableServer(tmp_path / "data") as durable:
        yield durable.start()


def gradient(worker: int, sequence: int) -> np.ndarray:
    return np.random.default_rng((SEED, worker, sequence)).standard_normal(SIZE).astype(np.float32)


def push_all(address: str, run_id: str, worker: int) -> list[int]:
    """The steps that a worker's contributions went into, in the order of their sequences."""
    with (
        impatient_client(address) as client,
        client.get_run(run_id).join(f"w{worker}", lease_seconds=120, transport="grpc") as member,
    ):
        results = [member.push({"w": gradient(worker, s)}, base_step=0) for s in range(1, PUSHES + 1)]
        assert {result.outcome for result in results} == {"applied"}
        assert member.epoch == member_epoch(client, run_id, worker)
    return [result.step for result in results]


def member_epoch(client: kedge.Client, run_id: str, worker: int) -> int:
    (status,) = [one for one in client.get_run(run_id).status().workers if one.name.endswith(f"/w{worker}")]
    assert status.last_sequence == status.applied_count == PUSHES
    return status.epoch


def replayed(order: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """Fast and slow weights, float64: momentum within Lookahead, by the papers' equations."""
    fast, slow, velocity = np.zeros(SIZE), np.zeros(SIZE), np.zeros(SIZE)
    for step, (worker, sequence) in enumerate(order, start=1):
        velocity = MOMENTUM * velocity + gradient(worker, sequence)
        fast = fast - RATE * velocity
        if step % PERIOD == 0:
            slow = slow + ALPHA * (fast - slow)
            fast = slow.copy()
    return fast, slow


@pytest.mark.slow
def test_each_of_4000_contributions_is_applied_once(
    server: DurableServer, in_background: Callable[..., Future[list[int]]]
) -> None:
    with kedge.connect(server.address) as client:
        run = client.create_run(
            "lossy",
            params={"w": np.zeros(SIZE, np.float32)},
            optimizer=optim.Lookahead(optim.Momentum(lr=RATE, momentum=MOMENTUM), sync_period=PERIOD, alpha=ALPHA),
            aggregation=kedge.Asynchronous(),
        )
        with Http2Proxy(server.address, SHARES, seed=SEED) as proxy:
            pushing = [in_background(push_all, proxy.address, "lossy", worker) for worker in range(WORKERS)]
            steps = [future.result(110) for future in pushing]
        status, snapshot = run.status(), run.snapshot()
    counts = proxy.counts
    print(f"{TOTAL} contributions; seen on the way: {dict(counts)}")
    assert counts["answers"] > TOTAL
    assert counts["lost"] / counts["answers"] == pytest.approx(SHARES.lost, abs=0.03)
    assert counts["reset"] > SHARES.reset * TOTAL
    assert counts["repeated"] > 0.9 * SHARES.repeated * TOTAL * (1 - SHARES.lost)

    assert sorted(step for of_worker in steps for step in of_worker) == list(range(1, TOTAL + 1))
    assert (status.step, status.applied_count, status.rejected_counts) == (TOTAL, TOTAL, {})
    order = sorted((step, w, s) for w in range(WORKERS) for s, step in enumerate(steps[w], start=1))
    fast, slow = replayed([(worker, sequence) for _, worker, sequence in order])
    np.testing.assert_allclose(snapshot.fast["w"], fast, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(snapshot.slow["w"], slow, rtol=1e-4, atol=1e-4)

    assert server.stop() == 0
    kept = inspected(server.data_dir)["runs/lossy"]
    assert kept["applied_count"] == TOTAL
    expected = {
        (f"w{worker}", sequence, "applied", steps[worker][sequence - 1])
        for worker in range(WORKERS)
        for sequence in range(PUSHES - LEDGER_WINDOW + 1, PUSHES + 1)
    }
    ledger = kept["ledger"]
    assert len(ledger) == len(expected)
    assert {(entry["worker"], entry["sequence"], entry["outcome"], entry["step"]) for entry in ledger} == expected
