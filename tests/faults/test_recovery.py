"""A server that is killed and started again: what it knows is what it knew, and all goes on as if it had not been."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import numpy as np
import pytest
from durable_server import DurableServer, essence, inspected
from durable_training import impatient_client
from lives import LIVES, params
from wire_client import WireClient, floats, push_stream, reason_of

import kedge
from kedge import optim
from kedge.v1 import optimizer_pb2, run_pb2, run_service_pb2, schedule_pb2

SETTINGS = {"KEDGE_STORAGE__SEGMENT_BYTES": "20000"}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[DurableServer]:
    with DurableServer(tmp_path / "data", environment=SETTINGS) as durable:
        yield durable.start()


@pytest.fixture
def client(server: DurableServer) -> Iterator[kedge.Client]:
    with impatient_client(server.address) as connection:
        yield connection


@pytest.fixture
def wire(server: DurableServer) -> Iterator[WireClient]:
    connection = WireClient(server.address)
    yield connection
    connection.close()


class Told(NamedTuple):
    """What is known of all lives: by run."""

    before: dict[str, Any]
    """What the server says of the run in the middle of its life; then, after the interruption if there was one."""
    after: dict[str, Any]
    kept: dict[str, Any]
    """What its data directory holds in the end."""
    failures: dict[str, Exception]
    """Of lives that did not go on as they should."""


def said_of(wire: WireClient, run_id: str) -> run_pb2.Run:
    """All that the server says of a run, but how long leases still last."""
    run = wire.run(f"runs/{run_id}", full=True)
    for worker in run.state.workers:
        assert worker.HasField("lease_remaining")
        worker.ClearField("lease_remaining")
    return run


def live_all(data_dir: Path, interrupt: Callable[[DurableServer], None]) -> Told:
    """All lives side by side on one server."""
    with DurableServer(data_dir, environment=SETTINGS) as server:
        server.start()
        with impatient_client(server.address) as client:
            lives = {name: live(client) for name, live in LIVES.items()}
            for life in lives.values():
                next(life)
            wire = WireClient(server.address)
            before = {name: said_of(wire, name) for name in lives}
            wire.close()
            interrupt(server)
            wire = WireClient(server.address)
            after = {name: said_of(wire, name) for name in lives}
            wire.close()
            failures = {name: failure for name, life in lives.items() if (failure := failure_of(life))}
            assert server.stop() == 0
    kept = inspected(data_dir)
    return Told(before, after, {name: essence(kept[f"runs/{name}"]) for name in LIVES}, failures)


def failure_of(life: Iterator[None]) -> Exception | None:
    """What keeps a life from coming to its end."""
    try:
        assert next(life, "its end") == "its end"
    except (AssertionError, kedge.KedgeError) as failure:
        return failure
    return None


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Told:
    return live_all(tmp_path_factory.mktemp("interrupted"), DurableServer.restart)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Told:
    return live_all(tmp_path_factory.mktemp("uninterrupted"), lambda server: None)


@pytest.mark.parametrize("run_id", LIVES)
def test_server_says_of_a_run_what_it_said_before_it_was_killed(interrupted: Told, run_id: str) -> None:
    assert interrupted.after[run_id] == interrupted.before[run_id]


@pytest.mark.parametrize("run_id", LIVES)
def test_run_goes_on_bit_for_bit_as_one_that_was_not_interrupted(
    interrupted: Told, uninterrupted: Told, run_id: str
) -> None:
    for told in (uninterrupted, interrupted):
        if run_id in told.failures:
            raise told.failures[run_id]
    assert interrupted.kept[run_id] == uninterrupted.kept[run_id]


def test_run_that_is_kept_in_memory_is_gone(server: DurableServer, client: kedge.Client) -> None:
    memory = {"params": params(), "optimizer": optim.SGD(lr=1.0), "aggregation": kedge.Asynchronous()}
    client.create_run("memory", **memory, durability="memory")
    client.create_run("journal", **memory)
    server.restart()
    assert [info.name for info in client.list_runs()] == ["runs/journal"]
    with pytest.raises(kedge.KedgeError) as refused:
        client.get_run("memory")
    assert refused.value.reason == "RUN_NOT_FOUND"
    client.create_run("memory", **memory, durability="memory")


def test_run_at_checkpoint_level_goes_back_to_its_checkpoint_and_its_worker_goes_on_by_itself(
    server: DurableServer, client: kedge.Client
) -> None:
    run = client.create_run(
        "checkpoint",
        params=params(),
        optimizer=optim.SGD(lr=1.0),
        aggregation=kedge.Asynchronous(),
        durability="checkpoint",
    )
    ones = {name: np.ones_like(value) for name, value in params().items()}
    with run.join("w0", lease_seconds=120) as worker:
        worker.pull()
        for number in range(5):
            worker.step(ones)
            if number == 2:
                assert run.checkpoint().step == 3
        server.restart()
        assert (run.status().step, run.status().applied_count) == (3, 3)
        assert run.pull()["b"].tolist() == [1.0 - 3] * 8
        while worker.step(ones)["b"][0] != 1.0 - 6:
            assert worker.step_number <= 6
    assert run.status().step == 6


def test_request_that_is_repeated_after_a_crash_is_answered_as_before_and_done_once(
    server: DurableServer, wire: WireClient
) -> None:
    optimizer = optimizer_pb2.Optimizer(sgd=optimizer_pb2.Sgd())
    optimizer.lr.exponential_lr.CopyFrom(schedule_pb2.ExponentialLR(base_lr=1.0, gamma=0.5))
    optimizer.lr.tick = schedule_pb2.TICK_MANUAL
    created = wire.create("r", floats(1, 2), optimizer=optimizer, request_id="create")
    wire.join(created.name, "w0")
    change = run_pb2.HyperparameterChange(grad_clip_norm=3.0)
    requests = [
        ("UpdateRun", run_service_pb2.UpdateRunRequest(name=created.name, hyperparameters=change, request_id="u")),
        ("TickSchedule", run_service_pb2.TickScheduleRequest(name=created.name, request_id="t")),
        (
            "EvictWorker",
            run_service_pb2.EvictWorkerRequest(worker=f"{created.name}/workers/w0", cause="c", request_id="e"),
        ),
    ]
    answers = [wire.call("RunService", method, request) for method, request in requests]
    before = said_of(wire, "r")

    server.restart()
    wire.join(created.name, "w0")  # not to be sent away by the request that sent away the one before
    repeated = [wire.call("RunService", method, request) for method, request in requests]
    again = wire.create("r", floats(1, 2), optimizer=optimizer, request_id="create")
    after = said_of(wire, "r")
    assert repeated == answers
    assert again.create_time == created.create_time
    assert (after.changes, after.state.learning_rate) == (before.changes, before.state.learning_rate)
    assert [worker.name for worker in after.state.workers] == [f"{created.name}/workers/w0"]
    with pytest.raises(grpc.RpcError) as refused:
        wire.create("r", floats(1, 2), request_id="another")
    assert reason_of(refused.value) == "RUN_ALREADY_EXISTS"


def test_push_that_is_repeated_after_a_crash_gets_the_recorded_answer(server: DurableServer, wire: WireClient) -> None:
    run = wire.create("r", floats(1, 2))
    lease = wire.join(run.name, "w0")
    gradients = {1: floats(1, 1), 2: floats(np.nan, 1), 3: floats(2, 2)}

    def push(sequence: int) -> Any:
        digest = run.manifest.digest
        result = wire.push(push_stream(lease, digest, gradients[sequence], sequence=sequence, base_step=0))
        return result.sequence, result.outcome, result.reason, result.step, result.staleness, result.message

    answers = [push(sequence) for sequence in (1, 2)]
    server.restart()
    assert [push(sequence) for sequence in (1, 2)] == answers
    assert wire.pull(run.name)[1].tolist() == [0, 1]
    push(3)
    server.restart()
    assert [push(sequence) for sequence in (1, 2)] == answers
    with pytest.raises(grpc.RpcError) as refused:
        wire.push(push_stream(lease, run.manifest.digest, floats(1, 1), sequence=5, base_step=0))
    assert reason_of(refused.value) == "SEQUENCE_GAP"
