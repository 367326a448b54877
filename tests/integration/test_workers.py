"""Worker processes: what four of them compute together, and what happens when one dies."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import worker_process
from server_process import ServerProcess

import kedge
from kedge import optim

SCRIPT = Path(worker_process.__file__)
STEPS = 12
PERIOD, ALPHA, RATE = 5, 0.5, 0.05


@contextmanager
def workers(address: str, run: str, indices: list[int]) -> Iterator[list[subprocess.Popen[str]]]:
    processes = [
        subprocess.Popen(
            [sys.executable, SCRIPT, address, run, str(index), str(STEPS)], stdout=subprocess.PIPE, text=True
        )
        for index in indices
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()
            process.stdout.close()


def create(client: kedge.Client, run_id: str) -> kedge.Run:
    return client.create_run(
        run_id,
        params={"w": np.zeros(worker_process.FEATURES, np.float32)},
        optimizer=optim.Lookahead(optim.AdaBelief(lr=RATE, eps=1e-8), sync_period=PERIOD, alpha=ALPHA),
        aggregation=kedge.Synchronous(quorum=4),
    )


def trained_in_one_process() -> tuple[np.ndarray, np.ndarray]:
    """Fast and slow weights, with the four gradients averaged here and the update by optax."""
    base = optax.chain(optax.scale_by_belief(0.9, 0.999, eps=1e-8, eps_root=1e-8), optax.scale(-RATE))
    fast = slow = jnp.zeros(worker_process.FEATURES)
    state = base.init(fast)
    for step in range(1, STEPS + 1):
        gradients = [worker_process.gradient(np.asarray(fast), index) for index in range(4)]
        mean = np.average(gradients, axis=0, weights=worker_process.SHARD_SIZES)
        updates, state = base.update(jnp.asarray(mean), state, fast)
        fast = fast + updates
        if step % PERIOD == 0:
            slow = slow + ALPHA * (fast - slow)
            fast = slow
    return np.asarray(fast), np.asarray(slow)


def test_four_processes_train_as_one_that_averages_their_gradients(server: ServerProcess, run_id: str) -> None:
    with kedge.connect(server.address) as client:
        run = create(client, run_id)
        with workers(server.address, run_id, [0, 1, 2, 3]) as processes:
            outputs = [process.communicate(timeout=90)[0] for process in processes]
        snapshot = run.snapshot()
    fast, slow = trained_in_one_process()
    assert snapshot.step == STEPS
    np.testing.assert_allclose(snapshot.fast["w"], fast, rtol=2e-4, atol=2e-5)
    np.testing.assert_allclose(snapshot.slow["w"], slow, rtol=2e-4, atol=2e-5)
    for output in outputs:
        assert output.splitlines()[-1] == "weights " + snapshot.fast["w"].tobytes().hex()


@pytest.mark.timeout(120)
def test_worker_killed_in_the_middle_of_a_round_does_not_stop_the_others(server: ServerProcess, run_id: str) -> None:
    with kedge.connect(server.address) as client:
        run = create(client, run_id)
        with workers(server.address, run_id, [0, 1, 2, -3]) as processes:
            *others, victim = processes
            while victim.stdout.readline() != "victim waits\n":
                pass
            victim.kill()
            outputs = [process.communicate(timeout=60)[0] for process in others]
        status = run.status()
    assert status.step == STEPS
    assert status.applied_count == 4 * 3 + 3 * (STEPS - 3)
    assert len({output.splitlines()[-1] for output in outputs}) == 1
