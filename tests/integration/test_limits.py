"""What peers send, or do not send, does not stop the server: stalled uploads and readers, leaks, poison, busy runs."""

import contextlib
import itertools
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2
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
    """A server with room for one MiB of gradients, and little patience: 1.5 s for an upload of 800,000 bytes."""
    limits = {"STAGING_BYTES": 1 << 20, "UPLOAD_IDLE_SECONDS": 0.5, "UPLOAD_MIN_BYTES_PER_SECOND": 800_000}
    with limited(**limits) as server:
        yield server


def limited(**limits: float) -> ServerProcess:
    return ServerProcess(environment={f"KEDGE_LIMITS__{key}": str(value) for key, value in limits.items()})


@pytest.fixture
def narrow_wire(narrow: ServerProcess) -> Iterator[WireClient]:
    client = WireClient(narrow.address)
    yield client
    client.close()


def stalled(*messages: Any) -> Iterator[Any]:
    """Sends these, and then nothing for long."""
    yield from messages
    threading.Event().wait(60)


def retry_delay_seconds(error: grpc.RpcError) -> float:
    """The delay of the RetryInfo of a failed call."""
    status = status_pb2.Status.FromString(dict(error.trailing_metadata())["grpc-status-details-bin"])
    retry = error_details_pb2.RetryInfo()
    assert status.details[1].Unpack(retry)
    return retry.retry_delay.ToTimedelta().total_seconds()


def trickling(header: Any) -> Iterator[Any]:
    """Four bytes of a gradient every 0.2 s, for ever, in good order."""
    yield header
    for offset in itertools.count(0, 4):
        yield PUSH(chunk=tensor_pb2.Chunk(offset=offset, data=bytes(4)))
        threading.Event().wait(0.2)


def test_stalled_upload_is_refused_and_its_buffer_lent_again(narrow_wire: WireClient, run_id: str) -> None:
    run = narrow_wire.create(run_id, np.zeros(200_000, np.float32))
    lease = narrow_wire.join(run.name, lease=Duration(seconds=60))
    header = PUSH(header=push_header(lease, run.manifest.digest, size_bytes=800_000))
    with pytest.raises(grpc.RpcError) as caught:
        narrow_wire.push(stalled(header, PUSH(chunk=tensor_pb2.Chunk(data=bytes(400_000)))))
    assert reason_of(caught.value) == "UPLOAD_STALLED"
    result = narrow_wire.push(push_stream(lease, run.manifest.digest, np.ones(200_000, np.float32)))
    assert result.outcome == pb.PUSH_OUTCOME_APPLIED


def test_upload_that_only_trickles_is_refused_at_its_deadline(narrow_wire: WireClient, run_id: str) -> None:
    run = narrow_wire.create(run_id, np.zeros(200_000, np.float32))
    lease = narrow_wire.join(run.name, lease=Duration(seconds=60))
    with pytest.raises(grpc.RpcError) as caught:
        narrow_wire.push(trickling(PUSH(header=push_header(lease, run.manifest.digest, size_bytes=800_000))))
    assert reason_of(caught.value) == "UPLOAD_STALLED"
    assert error_info(caught.value).metadata == {"idle_seconds": "0.5"}
    assert "1.5 s" in caught.value.details()
    state = narrow_wire.run(run.name).state
    assert (state.step, state.workers[0].last_sequence) == (0, 0)


@pytest.mark.parametrize(("service", "method"), [("OptimizerService", "PushGradients"), ("RunService", "CreateRun")])
def test_upload_whose_header_does_not_come_is_refused_and_an_exchange_may_idle(
    narrow_wire: WireClient, run_id: str, service: str, method: str
) -> None:
    run = narrow_wire.create(run_id, floats(4, 2))
    lease = narrow_wire.join(run.name, lease=Duration(seconds=60))
    may_go_on = threading.Event()

    def idle_first() -> Iterator[Any]:
        may_go_on.wait(60)
        yield pb.ExchangeRequest(pull=pb.ExchangePull(worker=lease.worker))

    exchange = narrow_wire.call("OptimizerService", "Exchange", idle_first())
    with pytest.raises(grpc.RpcError) as caught:
        narrow_wire.call(service, method, stalled())
    assert reason_of(caught.value) == "UPLOAD_STALLED"
    may_go_on.set()
    assert next(exchange).header.size_bytes == 8
    exchange.cancel()


def test_newer_upload_of_a_worker_ends_the_one_that_its_lost_connection_left(
    narrow_wire: WireClient, run_id: str, in_background: Callable[..., Any]
) -> None:
    narrow_wire.create(run_id, np.zeros(200_000, np.float32), optimizer=sgd(0.5), aggregation=asynchronous())
    lease, digest = (
        narrow_wire.join(f"runs/{run_id}", "w"),
        narrow_wire.run(f"runs/{run_id}", full=True).manifest.digest,
    )
    begun = threading.Event()

    def ghost() -> Iterator[Any]:
        for count, message in enumerate(trickling(PUSH(header=push_header(lease, digest, size_bytes=800_000)))):
            yield message
            if count == 2:
                begun.set()

    # Of the MiB of staging it holds 800,000 bytes from its first chunk on.
    lost = in_background(narrow_wire.push, ghost())
    assert begun.wait(30)
    assert narrow_wire.push(push_stream(lease, digest, np.ones(200_000, np.float32))).reason == "EACH_CONTRIBUTION"
    error = lost.exception(30)
    assert reason_of(error) == "UPLOAD_STALLED"
    assert "another upload" in error.details()


def test_stopping_server_tells_uploads_that_are_half_done_to_come_again(
    run_id: str, in_background: Callable[..., Any]
) -> None:
    with limited() as server:
        wire = WireClient(server.address)
        wire.create(run_id, np.zeros(4, np.float32), optimizer=sgd(0.5), aggregation=asynchronous())
        lease, digest = wire.join(f"runs/{run_id}", "w"), wire.run(f"runs/{run_id}", full=True).manifest.digest
        begun = threading.Event()

        def half() -> Iterator[Any]:
            yield PUSH(header=push_header(lease, digest, size_bytes=16))
            yield PUSH(chunk=tensor_pb2.Chunk(data=bytes(4)))
            begun.set()
            threading.Event().wait(60)

        uploading = in_background(wire.push, half())
        assert begun.wait(30)
        assert wire.run(f"runs/{run_id}").state.step == 0  # answered after what was sent before
        server.process.send_signal(signal.SIGTERM)
        assert reason_of(uploading.exception(30)) == "SERVER_DRAINING"
        assert server.process.wait(30) == 0
        assert server.log == []
        wire.close()


def test_who_has_only_sent_a_header_holds_no_buffer(narrow_wire: WireClient, run_id: str) -> None:
    run = narrow_wire.create(run_id, np.zeros(200_000, np.float32), aggregation=asynchronous())
    holder, other = (narrow_wire.join(run.name, lease=Duration(seconds=60)) for _ in range(2))
    header = push_header(holder, run.manifest.digest, size_bytes=800_000)
    is_open = threading.Event()

    def header_alone() -> Iterator[Any]:
        yield pb.ExchangeRequest(pull=pb.ExchangePull(worker=holder.worker, pull=pb.PullSpec(if_newer_than=1 << 60)))
        is_open.wait(60)
        yield from stalled(pb.ExchangeRequest(push=header))

    exchange = narrow_wire.call("OptimizerService", "Exchange", header_alone())
    assert next(exchange).header.is_unchanged
    is_open.set()
    gradient = np.ones(200_000, np.float32)
    for sequence in range(1, 6):  # the header has certainly been seen during these
        result = narrow_wire.push(push_stream(other, run.manifest.digest, gradient, sequence=sequence))
        assert result.outcome == pb.PUSH_OUTCOME_APPLIED
    exchange.cancel()


def test_push_over_the_staging_bound_is_told_when_to_come_again_and_the_sdk_does(
    narrow_wire: WireClient, run_id: str, in_background: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    run = narrow_wire.create(run_id, np.zeros(200_000, np.float32), aggregation=asynchronous())
    holder, other = (narrow_wire.join(run.name, lease=Duration(seconds=60)) for _ in range(2))
    header = PUSH(header=push_header(holder, run.manifest.digest, size_bytes=800_000))
    holding = in_background(narrow_wire.push, trickling(header))
    gradient = np.ones(200_000, np.float32)
    with pytest.raises(grpc.RpcError) as caught:  # noqa: PT012  when it is refused is the server's matter
        for sequence in range(1, 200):  # until the holder's first chunk has come
            narrow_wire.push(push_stream(other, run.manifest.digest, gradient, sequence=sequence))
    assert reason_of(caught.value) == "STAGING_FULL"
    assert retry_delay_seconds(caught.value) == 0.5
    with kedge.connect(narrow_wire.address) as client, client.get_run(run_id).join() as worker:
        worker.pull()
        assert worker.push({"t0": gradient}).outcome == "applied"
    assert "STAGING_FULL" in caplog.text, "it was refused first"
    assert reason_of(holding.exception(timeout=20)) == "UPLOAD_STALLED"


def test_more_streams_than_allowed_are_refused_and_small_calls_never(run_id: str) -> None:
    with limited(STREAMS=2) as server:
        wire = WireClient(server.address)
        run = wire.create(run_id, floats(4, 2))
        lease = wire.join(run.name)
        ask = pb.ExchangeRequest(pull=pb.ExchangePull(worker=lease.worker))
        idle = [wire.call("OptimizerService", "Exchange", stalled(ask)) for _ in range(2)]
        assert [next(exchange).header.step for exchange in idle] == [0, 0]
        for refused in (lambda: wire.pull(run.name), lambda: wire.push([]), lambda: wire.create("another", floats(1))):
            with pytest.raises(grpc.RpcError) as caught:
                refused()
            assert error_info(caught.value).reason == "TOO_MANY_STREAMS"
            assert error_info(caught.value).metadata == {"limit": "2"}
            assert retry_delay_seconds(caught.value) == 0.5
        heartbeat = run_service_pb2.HeartbeatRequest(worker=lease.worker, epoch=lease.epoch)
        assert wire.call("RunService", "Heartbeat", heartbeat).step == 0
        idle[0].cancel()
        with kedge.connect(server.address) as client:
            assert client.get_run(run_id).pull()["t0"].tolist() == [4, 2]
        wire.close()


def test_reader_that_takes_nothing_is_dropped_and_its_place_is_free(
    run_id: str, eventually: Callable[[Callable[[], Any]], None]
) -> None:
    # More than gRPC and the kernel will hold for a reader that takes nothing, whose stream could end well otherwise.
    weights = np.zeros(1 << 24, np.float32)
    with limited(STREAMS=2, READ_IDLE_SECONDS=0.5) as server:
        wire = WireClient(server.address)
        run = wire.create(run_id, weights)
        request = pb.PullWeightsRequest(run=run.name)
        never_read = [wire.call("OptimizerService", "PullWeights", request) for _ in range(2)]
        later = []

        def are_two_more_begun() -> bool:
            stream = wire.call("OptimizerService", "PullWeights", request)
            with contextlib.suppress(grpc.RpcError):  # TOO_MANY_STREAMS
                next(stream)
                later.append(stream)
            return len(later) == 2

        eventually(are_two_more_begun)
        with kedge.connect(server.address) as client:  # waits until one of these has been dropped too
            assert client.get_run(run_id).pull()["t0"].size == weights.size
        for stream in never_read:
            with pytest.raises(grpc.RpcError) as caught:  # noqa: PT012  what had come already comes first
                while True:
                    next(stream)
            assert caught.value.code() in (grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED)
        wire.close()


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
