"""Checkpoints of a real server: taken, listed, gone back to, forked and exported, before and after it is killed."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from durable_server import DurableServer, kedge_server
from durable_training import impatient_client
from lives import gradient, params
from safetensors.numpy import load_file
from wire_client import WireClient

import kedge
from kedge import optim
from kedge.v1 import checkpoint_service_pb2 as pb

PERIOD = 5


@pytest.fixture
def server(tmp_path: Path) -> Iterator[DurableServer]:
    with DurableServer(tmp_path / "data") as durable:
        yield durable.start()


@pytest.fixture
def client(server: DurableServer) -> Iterator[kedge.Client]:
    with impatient_client(server.address) as connection:
        yield connection


@pytest.fixture
def run(client: kedge.Client) -> kedge.Run:
    return client.create_run(
        "r",
        params=params(),
        optimizer=optim.Lookahead(
            optim.AdaBelief(lr=optim.ExponentialLR(0.1, gamma=0.9)), sync_period=PERIOD, alpha=0.5
        ),
        aggregation=kedge.Asynchronous(),
        checkpoints=kedge.Checkpoints(keep_latest=4),
    )


def train(run: kedge.Run, numbers: range) -> tuple[int, bytes, bytes]:
    """Steps whose gradients follow from weights and numbers; the step, fast and slow weights that come of it."""
    with run.join("w0") as worker:
        weights = worker.pull()
        for number in numbers:
            weights = worker.step(gradient(weights, number), loss=float(number))
    return state_of(run)


def state_of(run: kedge.Run) -> tuple[int, bytes, bytes]:
    snapshot = run.snapshot()
    fast, slow = ([value.tobytes() for value in tree.values()] for tree in (snapshot.fast, snapshot.slow))
    return snapshot.step, b"".join(fast), b"".join(slow)


def test_run_goes_back_to_a_checkpoint_in_the_middle_of_a_sync_period_and_repeats_its_way(
    server: DurableServer, run: kedge.Run
) -> None:
    there = train(run, range(7))
    checkpoint = run.checkpoint(metrics={"accuracy": 0.5})
    assert (checkpoint.step, checkpoint.metrics["accuracy"]) == (7, 0.5)
    further = train(run, range(7, 13))
    assert run.restore(checkpoint) == 7
    assert state_of(run) == there
    assert train(run, range(7, 13)) == further
    server.restart()
    assert state_of(run) == further

    assert run.restore(checkpoint) == 7
    server.restart()
    assert state_of(run) == there
    assert train(run, range(7, 13)) == further


def test_restore_or_fork_that_is_repeated_after_a_crash_is_answered_as_before_and_undoes_nothing(
    server: DurableServer, client: kedge.Client, run: kedge.Run
) -> None:
    train(run, range(3))
    name = run.checkpoint().name
    train(run, range(3, 6))
    restore = pb.RestoreCheckpointRequest(name=name, request_id="back")
    fork = pb.ForkCheckpointRequest(name=name, run_id="fork", request_id="away")
    wire = WireClient(server.address)
    assert wire.call("CheckpointService", "RestoreCheckpoint", restore).step == 3
    created = wire.call("CheckpointService", "ForkCheckpoint", fork).run
    further = train(run, range(3, 5))
    elsewhere = train(client.get_run("fork", like=params()), range(10, 12))

    server.restart()
    wire = WireClient(server.address)
    assert wire.call("CheckpointService", "RestoreCheckpoint", restore).step == 3
    assert wire.call("CheckpointService", "ForkCheckpoint", fork).run.create_time == created.create_time
    wire.close()
    assert state_of(run) == further
    assert state_of(client.get_run("fork", like=params())) == elsewhere


def test_fork_goes_its_own_way_from_the_same_place(server: DurableServer, client: kedge.Client, run: kedge.Run) -> None:
    train(run, range(7))
    checkpoint = run.checkpoint()
    further = train(run, range(7, 13))
    fork = run.fork(checkpoint, "fork")
    server.restart()
    assert train(client.get_run("fork", like=params()), range(7, 13)) == further
    elsewhere = train(fork, range(100, 103))
    server.restart()
    assert state_of(run) == further
    assert state_of(fork) == elsewhere


def test_checkpoints_are_listed_newest_first_and_as_many_are_kept_as_the_run_was_told(
    server: DurableServer, run: kedge.Run
) -> None:
    taken = []
    for number in range(6):
        train(run, range(number, number + 1))
        taken.append(run.checkpoint())
    listed = run.checkpoints()
    assert [checkpoint.step for checkpoint in listed] == [6, 5, 4, 3]
    assert listed[0].name == taken[-1].name
    with pytest.raises(kedge.KedgeError) as refused:
        run.restore(taken[0])
    assert refused.value.reason == "CHECKPOINT_NOT_FOUND"
    server.restart()
    assert run.checkpoints() == listed


@pytest.mark.parametrize("weights", ["fast", "slow"])
def test_exported_weights_are_those_that_were_pulled(
    server: DurableServer, run: kedge.Run, tmp_path: Path, weights: str
) -> None:
    train(run, range(7))
    pulled, at_checkpoint = run.pull(weights), run.checkpoint()
    train(run, range(7, 9))
    newest = run.pull(weights)
    server.kill()
    for options, expected in (
        ((), newest),
        (("--checkpoint", at_checkpoint.name.rpartition("/")[2]), pulled),
    ):
        path = tmp_path / "weights.safetensors"
        exported = kedge_server("export", server.data_dir, "--run", "r", "--weights", weights, "-o", path, *options)
        assert exported.returncode == 0, exported.stderr
        tensors = load_file(path)
        assert set(tensors) == set(expected)
        for name, value in expected.items():
            np.testing.assert_array_equal(tensors[name], value, strict=True)
        path.unlink()


def test_verify_finds_a_directory_in_order_that_a_killed_server_left(server: DurableServer, run: kedge.Run) -> None:
    train(run, range(7))
    refused = kedge_server("verify", server.data_dir)
    assert refused.returncode != 0
    assert str(server.data_dir) in refused.stderr
    server.kill()
    verified = kedge_server("verify", server.data_dir)
    assert verified.returncode == 0, verified.stdout + verified.stderr
