"""What the gRPC transport makes of a server that breaks the protocol, or goes away."""

import gc
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
from bridge import fake_server_behind_grpc

import kedge
from kedge.errors import KedgeError
from kedge.transport import Lease, PullRequest, Push
from kedge.transport.grpc import GrpcTransport
from kedge.v1 import tensor_pb2
from kedge.v1.optimizer_service_pb2 import PUSH_OUTCOME_APPLIED, ExchangeResponse, PushResult, WeightsHeader
from kedge.wire import codec
from kedge.wire.manifest import Manifest

MANIFEST = Manifest.from_specs([("w", (2,), "float32")])
HEADER = WeightsHeader(
    step=4,
    weights=tensor_pb2.WEIGHTS_FAST,
    dtype=tensor_pb2.DTYPE_FLOAT32,
    size_bytes=8,
    manifest_digest=MANIFEST.digest,
)
DATA = np.array([1, 2], np.float32).tobytes()
CRC = codec.google_crc32c.value(DATA)


def header(**changes):
    other = WeightsHeader()
    other.CopyFrom(HEADER)
    for name, value in changes.items():
        setattr(other, name, value)
    return ExchangeResponse(header=other)


def chunk(offset=0, data=DATA):
    return ExchangeResponse(chunk=tensor_pb2.Chunk(offset=offset, data=data))


def trailer(crc=CRC):
    return ExchangeResponse(trailer=tensor_pb2.StreamTrailer(crc32c=crc))


def result(sequence=1, outcome=PUSH_OUTCOME_APPLIED):
    return ExchangeResponse(result=PushResult(sequence=sequence, outcome=outcome, step=1))


@pytest.fixture
def exchange_with(serve):
    """An exchange with such a server."""
    opened = []

    def begin(*answers, code=None):
        transport = GrpcTransport(serve(*answers, code=code))
        stream = transport.open_exchange(MANIFEST)
        opened.extend([stream.close, transport.close])
        return stream

    yield begin
    for close in opened:
        close()


@pytest.fixture
def serve():
    """Starts a server whose Exchange answers the first message with these messages, and ends."""
    servers = []

    def start(*answers, code=None):
        def exchange(requests, context):
            next(requests)
            yield from (answer if isinstance(answer, bytes) else answer.SerializeToString() for answer in answers)
            if code is not None:
                context.abort(code, "as the test wants it")

        server = grpc.server(ThreadPoolExecutor(2))
        handler = grpc.stream_stream_rpc_method_handler(exchange)
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("kedge.v1.OptimizerService", {"Exchange": handler}),)
        )
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        servers.append(server)
        return f"127.0.0.1:{port}"

    yield start
    for server in servers:
        server.stop(0).wait()


def pull(stream):
    return stream.pull("runs/r/workers/a", PullRequest())


def push(stream):
    gradient = [np.zeros(2, np.float32)]
    return stream.push(Push(Lease("runs/r/workers/a", 1, 9.0), 1, 0, 1, None, gradient, "float32", 0.0, None))


def test_weights_are_read_from_header_chunks_and_trailer(exchange_with):
    weights = pull(exchange_with(header(), chunk(0, DATA[:4]), chunk(4, DATA[4:]), trailer()))

    assert (weights.step, weights.flat.tolist()) == (4, [1, 2])


def test_weights_that_are_unchanged_are_none(exchange_with):
    weights = pull(exchange_with(header(is_unchanged=True, size_bytes=0), trailer(0)))

    assert weights == (4, None)


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        ([b"\xff\xff"], "INTERNAL"),
        ([header(is_unchanged=True), trailer(0)], "INTERNAL"),
        ([header(is_unchanged=True, size_bytes=0), trailer(1)], "INTERNAL"),
        ([header(is_unchanged=True, size_bytes=0), chunk(), trailer(0)], "INTERNAL"),
        ([header(is_unchanged=True, size_bytes=0)], "SERVER_UNAVAILABLE"),
        ([ExchangeResponse()], "INTERNAL"),
        ([chunk()], "INTERNAL"),
        ([result()], "INTERNAL"),
        ([header(), header()], "INTERNAL"),
        ([header(), chunk(4, DATA[4:]), trailer()], "INTERNAL"),
        ([header(), chunk(), chunk(), trailer()], "INTERNAL"),
        ([header(), chunk(0, DATA[:4]), trailer()], "INTERNAL"),
        ([header(size_bytes=12)], "INTERNAL"),
        ([header(dtype=0)], "INTERNAL"),
        ([header(manifest_digest=b"x")], "MANIFEST_MISMATCH"),
        ([header(), chunk(), trailer(CRC ^ 1)], "CHECKSUM_MISMATCH"),
        ([header(), chunk()], "SERVER_UNAVAILABLE"),
        ([], "SERVER_UNAVAILABLE"),
    ],
)
def test_weights_that_are_not_whole_are_an_error(exchange_with, answers, reason):
    with pytest.raises(KedgeError) as error:
        pull(exchange_with(*answers))
    assert error.value.reason == reason


@pytest.mark.parametrize("answer", [result(sequence=2), result(outcome=0), header()])
def test_answer_to_something_else_is_an_error(exchange_with, answer):
    with pytest.raises(KedgeError) as error:
        push(exchange_with(answer))
    assert error.value.reason == "INTERNAL"


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (grpc.StatusCode.UNAVAILABLE, "SERVER_UNAVAILABLE"),
        (grpc.StatusCode.CANCELLED, "SERVER_UNAVAILABLE"),
        (grpc.StatusCode.UNKNOWN, "INTERNAL"),
    ],
)
def test_stream_that_fails_half_way_is_an_error(exchange_with, code, reason):
    with pytest.raises(KedgeError) as error:
        pull(exchange_with(header(), code=code))
    assert error.value.reason == reason


def test_closed_stream_refuses(exchange_with):
    stream = exchange_with()
    stream.close()
    stream.close()

    with pytest.raises(KedgeError) as error:
        pull(stream)
    assert error.value.reason == "CANCELLED"


def test_other_server_is_told_from_a_kedge_server(serve):
    with pytest.raises(KedgeError) as error:
        kedge.connect(serve(), timeout_seconds=30)
    assert error.value.reason == "UNSUPPORTED"


def test_no_server_says_what_was_tried():
    with pytest.raises(KedgeError, match=r"127\.0\.0\.1:1 .*kedge-server serve") as error:
        kedge.connect("127.0.0.1:1", timeout_seconds=0.2)
    assert error.value.reason == "SERVER_UNAVAILABLE"
    assert error.value.metadata == {"address": "127.0.0.1:1"}


def test_process_that_closes_nothing_ends_in_silence():
    code = """
import sys, numpy as np, kedge
client = kedge.connect(sys.argv[1])
params, policy = np.zeros(1, np.float32), kedge.Asynchronous()
run = client.create_run("r", params=params, optimizer=kedge.optim.SGD(), aggregation=policy)
worker = run.join()
events = run.watch()
print(worker.pull(), worker.step(np.ones(1, np.float32)), next(events))
"""
    with fake_server_behind_grpc() as address:
        command = [sys.executable, "-c", code, address]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    assert (done.returncode, done.stderr) == (0, "")


def test_forgotten_stream_ends_its_threads():
    with fake_server_behind_grpc() as address, kedge.connect(address) as client:
        params, policy = np.zeros(1, np.float32), kedge.Asynchronous()
        run = client.create_run("r", params=params, optimizer=kedge.optim.SGD(), aggregation=policy)
        before = set(threading.enumerate())
        stream = client._transport.open_exchange(run.manifest)
        stream.pull(f"{run.name}/workers/a", PullRequest())
        started = [t for t in threading.enumerate() if t not in before and "ThreadPool" not in t.name]
        assert started
        del stream
        gc.collect()

        for thread in started:
            thread.join(30)
            assert not thread.is_alive()
