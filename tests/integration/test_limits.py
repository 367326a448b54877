"""What peers send does not stop the server: stalled uploads, leaks, poison, busy runs at the end."""

import itertools
import signal
import threading
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.duration_pb2 import Duration
from server_process import ServerProcess
from wire_client import (
    WireClient,
    asynchronous,
    error_info,
    floats,
    manifest,
    push_header,
    push_stream,
    reason_of,
    sgd,
    synchronous,
)

import kedge
from kedge import optim
from kedge.v1 import optimizer_service_pb2 as pb
from kedge.v1 import run_pb2, run_service_pb2, tensor_pb2

from .test_bad_input import ERRORS, GRADIENT, WEIGHTS, Target

PUSH = pb.PushGradientsRequest


@pytest.fixture(scope="module")
def narrow() -> Iterator[ServerProcess]:
    """A server with room for one MiB of gradients, and little patience."""
    limits = {"KEDGE_LIMITS__STAGING_BYTES": str(1 << 20), "KEDGE_LIMITS__UPLOAD_IDLE_SECONDS": "0.5"}
    with ServerProcess(environment=limits) as server:
        yield server


@pytest.fixture
def narrow_wire(narrow: ServerProcess) -> Iterator[WireClient]:
    client = WireClient(narrow.address)
    yield client
    client.close()


def stalled(*messages: Any) -> Iterator[Any]:
    """Sends these, and then nothing for long."""
    yield from messages
    threading.Event().wait(60)


def test_stalled_upload_is_refused_and_its_buffer_lent_again(narrow_wire: WireClient, run_id: str) -> None:
    run = narrow_wire.create(run_id, np.zeros(200_000, np.float32))
    lease = narrow_wire.join(run.name, lease=Duration(seconds=60))
    header = PUSH(header=push_header(lease, run.manifest.digest, size_bytes=800_000))
    with pytest.raises(grpc.RpcError) as caught:
        narrow_wire.push(stalled(header, PUSH(chunk=tensor_pb2.Chunk(data=bytes(400_000)))))
    assert reason_of(caught.value) == "UPLOAD_STALLED"
    result = narrow_wire.push(push_stream(lease, run.manifest.digest, np.ones(200_000, np.float32)))
    assert result.outcome == pb.PUSH_OUTCOME_APPLIED


def test_second_gradient_at_once_is_told_when_to_come_again(narrow_wire: WireClient, run_id: str) -> None:
    run = narrow_wire.create(run_id, np.zeros(200_000, np.float32), aggregation=asynchronous())
    leases = [narrow_wire.join(run.name, lease=Duration(seconds=60)) for _ in range(2)]
    header = PUSH(header=push_header(leases[0], run.manifest.digest, size_bytes=800_000))
    begun = threading.Event()

    def hold() -> Iterator[Any]:
        yield header
        begun.set()
        yield from stalled()

    def push_and_stall() -> None:
        with pytest.raises(grpc.RpcError):
            narrow_wire.push(hold())

    holder = threading.Thread(target=push_and_stall)
    holder.start()
    assert begun.wait(10)
    gradient = np.ones(200_000, np.float32)
    with pytest.raises(grpc.RpcError) as caught:  # noqa: PT012  when it is refused is the server's matter
        for sequence in range(1, 100):  # until the first one's header has been seen
            narrow_wire.push(push_stream(leases[1], run.manifest.digest, gradient, sequence=sequence))
    assert reason_of(caught.value) == "STAGING_FULL"
    holder.join()
    with kedge.connect(narrow_wire.address) as client, client.get_run(run_id).join() as worker:
        worker.pull()
        assert worker.push({"t0": np.ones(200_000, np.float32)}).outcome == "applied"


def test_no_bad_push_keeps_a_buffer(narrow_wire: WireClient, run_id: str) -> None:
    optimizer = sgd(lr=1, sync_period=3, alpha=0.5)
    run = narrow_wire.create(run_id, WEIGHTS, optimizer=optimizer, shapes=[(2,), (2,)])
    target = Target(narrow_wire, run, narrow_wire.join(run.name, lease=Duration(seconds=60)))
    narrow_wire.push(target.good(sequence=1, base_step=0))
    for _, requests in ERRORS.values():
        with pytest.raises(grpc.RpcError):
            narrow_wire.push(requests(target))
    nan = np.full_like(GRADIENT, np.nan)
    narrow_wire.push(push_stream(target.lease, run.manifest.digest, nan, sequence=2, base_step=1))
    # 4-element buffers are tiny, so what is left of the budget is told by one that takes all but a page of it.
    everything = np.zeros((1 << 18) - 1024, np.float32)
    narrow_wire.create(f"{run_id}-large", everything)


def test_quorum_whose_gradients_cannot_be_held_is_refused_at_creation(narrow_wire: WireClient, run_id: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        narrow_wire.create(run_id, np.zeros(200_000, np.float32), aggregation=synchronous(2))
    assert reason_of(caught.value) == "RUN_TOO_LARGE"
    assert "staging_bytes" in caught.value.details()


@pytest.mark.parametrize("seconds", [(1 << 63) - 1, -5])
def test_duration_that_none_can_be_is_refused_and_the_list_stays_readable(
    wire: WireClient, run_id: str, seconds: int
) -> None:
    policy = run_pb2.Synchronous(quorum=1, timeout=Duration(seconds=seconds))
    with pytest.raises(grpc.RpcError) as caught:
        wire.create(run_id, floats(1), aggregation=run_pb2.Aggregation(synchronous=policy))
    assert reason_of(caught.value) == "INVALID_CONFIGURATION"
    wire.call("RunService", "ListRuns", run_service_pb2.ListRunsRequest())


def test_manifest_of_absurd_size_is_refused_with_its_reason(wire: WireClient, run_id: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        wire.create(run_id, floats(1), manifest=manifest_of([(1 << 63) - 1] * 300))
    assert reason_of(caught.value) == "MANIFEST_INVALID"


def manifest_of(shape: list[int]) -> tensor_pb2.Manifest:
    out = manifest((1,))
    out.tensors[0].shape[:] = shape
    return out


def test_what_is_echoed_of_a_peers_bytes_is_bounded(wire: WireClient, run_id: str) -> None:
    run = wire.create(run_id, floats(1))
    lease = wire.join(run.name)
    header = push_header(lease, b"x" * 3_000_000, size_bytes=4)
    with pytest.raises(grpc.RpcError) as caught:
        wire.push([PUSH(header=header)])
    assert error_info(caught.value).reason == "MANIFEST_MISMATCH"


def test_worker_of_a_deleted_run_does_not_train_the_one_that_has_its_name(server: ServerProcess, run_id: str) -> None:
    params = {"w": np.float32([1])}

    def create() -> kedge.Run:
        return client.create_run(run_id, params=params, optimizer=optim.SGD(lr=1.0), aggregation=kedge.Asynchronous())

    with kedge.connect(server.address) as client, create().join("a") as worker:
        worker.pull()
        client.delete_run(run_id)
        successor = create()
        with pytest.raises(kedge.KedgeError) as caught:
            worker.push({"w": np.float32([5])})
        assert caught.value.reason == "RUN_NOT_FOUND"
        assert successor.pull()["w"].tolist() == [1]


def test_busy_asynchronous_run_does_not_keep_the_server_from_ending() -> None:
    with ServerProcess(environment={"KEDGE_DEVICE__BLOCK_ELEMENTS": "1024"}) as server:
        params = {"w": np.zeros(300_000, np.float32)}
        with kedge.connect(server.address) as client:
            client.create_run("busy", params=params, optimizer=optim.Adam(), aggregation=kedge.Asynchronous())

        def work() -> None:
            with kedge.connect(server.address, retry_seconds=0.1) as own, own.get_run("busy").join() as worker:
                worker.pull()
                with pytest.raises(kedge.KedgeError):  # noqa: PT012  it ends when the server does
                    for _ in itertools.count():
                        worker.step(params)

        workers = [threading.Thread(target=work) for _ in range(3)]
        for worker in workers:
            worker.start()
        wire = WireClient(server.address)
        while wire.run("runs/busy").state.step < 10:
            pass
        wire.close()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(timeout=20) == 0
        for worker in workers:
            worker.join(timeout=20)


def test_list_of_runs_with_many_workers_comes_in_pages_that_fit(server: ServerProcess, run_id: str) -> None:
    wire = WireClient(server.address)
    names = [wire.create(f"{run_id}-{number}", floats(1)).name for number in range(30)]
    for name in names:
        for number in range(12):
            wire.join(name, f"worker-with-a-name-that-takes-some-room-in-an-answer-{number:06}")
    with kedge.connect(server.address) as client:
        listed = [info for info in client.list_runs() if info.name in names]
    assert [len(info.status.workers) for info in listed] == [12] * 30
    wire.close()
