"""A run's description fits into one message, whatever its owner gave it, and so does every page of a list."""

from collections.abc import Iterator

import grpc
import numpy as np
import pytest
from server_process import ServerProcess
from wire_client import WireClient, error_info, floats

import kedge
from kedge import optim
from kedge.v1 import run_pb2, run_service_pb2, tensor_pb2
from kedge.v1.schedule_pb2 import LearningRate
from kedge.wire.codec import MAX_MESSAGE_BYTES

ALONE = kedge.Synchronous(quorum=1)


@pytest.fixture
def own_server() -> Iterator[ServerProcess]:
    """One whose list of runs this module may fill."""
    with ServerProcess() as server:
        yield server


@pytest.fixture
def client(own_server: ServerProcess) -> Iterator[kedge.Client]:
    with kedge.connect(own_server.address) as client:
        yield client


@pytest.fixture
def wire(own_server: ServerProcess) -> Iterator[WireClient]:
    wire = WireClient(own_server.address)
    yield wire
    wire.close()


def schedule(at: int) -> optim.Schedule:
    """Of some 16 KiB on the wire."""
    return optim.PiecewiseConstantSchedule(boundaries=range(2**60 + at, 2**60 + at + 999), values=[0.5] * 1000)


def large_params() -> dict[str, np.ndarray]:
    """As many tensors as have room in 3 MiB of manifest, nearly."""
    return {f"{'layer.' * 15}{i:06d}.w": np.zeros(1, np.float32) for i in range(27_000)}


def large_groups() -> list[optim.Group]:
    """Of nearly 256 KiB."""
    return [
        optim.Group((*(f"{'x' * 100}{j}" for j in range(63)), f"*{i:02d}.w"), lr=0.5, name=str(i)) for i in range(32)
    ]


def test_the_largest_descriptions_can_still_be_read(own_server: ServerProcess, client: kedge.Client) -> None:
    for name in ("a", "b", "c"):
        run = client.create_run(
            name,
            params=large_params(),
            optimizer=optim.SGD(lr=schedule(0)),
            aggregation=ALONE,
            groups=large_groups(),
        )
        for at in range(1, 40):
            run.set_hyperparameters(lr=schedule(at))

    run = client.get_run("b")
    assert len(run.groups) == 32
    assert run.info().changes[-1].change.lr == schedule(39)
    assert 1 <= len(run.info().changes) < 32
    assert [info.name for info in client.list_runs()] == ["runs/a", "runs/b", "runs/c"]
    with kedge.connect(own_server.address) as another:
        another.get_run("a")


def test_a_page_ends_before_the_run_that_would_not_fit(client: kedge.Client, wire: WireClient) -> None:
    # Of a quarter of a MiB each.
    unused = [f"{'y' * 240}{j}" for j in range(15)]
    groups = [optim.Group((*unused, f"t{i}"), name=f"{i}{'n' * 200}") for i in range(60)]
    params = {f"t{i}": np.zeros(1, np.float32) for i in range(60)}
    names = [f"run-{i}" for i in range(12)]
    for name in names:
        client.create_run(name, params=params, optimizer=optim.SGD(), aggregation=ALONE, groups=groups)

    pages, token = [], None
    while token != "":
        page = wire.call("RunService", "ListRuns", run_service_pb2.ListRunsRequest(page_token=token or ""))
        assert page.ByteSize() < MAX_MESSAGE_BYTES
        pages.append([run.name for run in page.runs])
        token = page.next_page_token
    assert len(pages) > 1
    assert [name for page in pages for name in page] == [f"runs/{name}" for name in sorted(names)]


def test_what_would_not_fit_is_refused_with_its_field(wire: WireClient, run_id: str) -> None:
    tensors = [
        tensor_pb2.TensorSpec(name=f"{'n' * 110}{i:06d}", dtype="DTYPE_FLOAT32", offset=i) for i in range(27_000)
    ]
    with pytest.raises(grpc.RpcError) as caught:
        wire.create(run_id, floats(*range(27_000)), manifest=tensor_pb2.Manifest(tensors=tensors))
    assert error_info(caught.value).reason == "MANIFEST_INVALID"

    groups = [run_pb2.ParameterGroup(name=str(i), patterns=["t" * 200] * 64) for i in range(30)]
    with pytest.raises(grpc.RpcError) as caught:
        wire.create(run_id, floats(1), groups=groups)
    assert error_info(caught.value).metadata["field"] == "groups"


def test_a_change_that_is_asked_for_again_undoes_nothing(wire: WireClient, run_id: str) -> None:
    run = wire.create(run_id, floats(1))

    def update(lr: float, request_id: str) -> int:
        change = run_pb2.HyperparameterChange(lr=LearningRate(value=lr))
        request = run_service_pb2.UpdateRunRequest(name=run.name, hyperparameters=change, request_id=request_id)
        return wire.call("RunService", "UpdateRun", request).step

    assert [update(0.5, "one"), update(0.25, "two"), update(0.5, "one")] == [1, 1, 1]
    assert wire.run(run.name).state.learning_rate == 0.25
    with pytest.raises(grpc.RpcError) as caught:
        update(0.5, "x" * 65)
    assert error_info(caught.value).metadata["field"] == "request_id"
