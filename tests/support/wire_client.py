"""A client that knows only the .proto files: protobuf's own serializers, no code of the SDK.

It stands for a client in another language, and can be told to break every rule.
"""

import struct
from collections.abc import Iterable, Sequence
from typing import Any

import grpc
import numpy as np
from google.protobuf import message_factory
from google.rpc import error_details_pb2, status_pb2

from kedge.v1 import (
    checkpoint_service_pb2,
    optimizer_pb2,
    optimizer_service_pb2,
    run_pb2,
    run_service_pb2,
    schedule_pb2,
    tensor_pb2,
)

CHUNK = 1 << 20

_SERVICES = {
    "CheckpointService": checkpoint_service_pb2,
    "OptimizerService": optimizer_service_pb2,
    "RunService": run_service_pb2,
}


def crc32c(data: bytes) -> int:
    """CRC-32C from its definition (reflected polynomial 0x82F63B78), a byte at a time."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def _table_entry(index: int) -> int:
    for _ in range(8):
        index = index >> 1 ^ (0x82F63B78 if index & 1 else 0)
    return index


_TABLE = [_table_entry(index) for index in range(256)]


def reason_of(error: grpc.RpcError) -> str:
    """The ErrorInfo.reason of a failed call."""
    return error_info(error).reason


def error_info(error: grpc.RpcError) -> error_details_pb2.ErrorInfo:
    """The ErrorInfo of a failed call."""
    metadata = dict(error.trailing_metadata())
    status = status_pb2.Status.FromString(metadata["grpc-status-details-bin"])
    assert status.code == error.code().value[0]
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    return info


def manifest(*shapes: tuple[int, ...]) -> tensor_pb2.Manifest:
    """A float32 manifest with tensors t0, t1, ..."""
    out = tensor_pb2.Manifest()
    offset = 0
    for index, shape in enumerate(shapes):
        out.tensors.add(name=f"t{index}", shape=shape, dtype=tensor_pb2.DTYPE_FLOAT32, offset=offset)
        offset += int(np.prod(shape, dtype=np.int64))
    return out


def sgd(lr: float = 1.0, **lookahead: float) -> optimizer_pb2.Optimizer:
    """Plain SGD, with Lookahead if its fields are given."""
    out = optimizer_pb2.Optimizer(sgd=optimizer_pb2.Sgd(), lr=schedule_pb2.LearningRate(value=lr))
    if lookahead:
        out.lookahead.sync_period = int(lookahead["sync_period"])
        out.lookahead.alpha = lookahead["alpha"]
    return out


def synchronous(quorum: int) -> run_pb2.Aggregation:
    """The synchronous policy."""
    return run_pb2.Aggregation(synchronous=run_pb2.Synchronous(quorum=quorum))


def asynchronous() -> run_pb2.Aggregation:
    """The asynchronous policy."""
    return run_pb2.Aggregation(asynchronous=run_pb2.Asynchronous())


class WireClient:
    """Calls every RPC through descriptors, with a token if it has one."""

    def __init__(self, address: str, *, token: str | None = None) -> None:
        self.address = address
        self.token = token
        # Else channels to one address share a connection, and wait together after a failure.
        self.channel = grpc.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)])

    def close(self) -> None:
        self.channel.close()

    def call(self, service: str, method: str, request: Any, *, timeout: float = 30) -> Any:
        """One call; `request` is a message, or an iterable of messages or bytes where the request streams."""
        pool = _SERVICES[service]
        descriptor = pool.DESCRIPTOR.services_by_name[service].methods_by_name[method]
        kind = f"{_arity(descriptor.client_streaming)}_{_arity(descriptor.server_streaming)}"
        stub = getattr(self.channel, kind)(
            f"/kedge.v1.{service}/{method}",
            request_serializer=lambda m: m if isinstance(m, bytes) else m.SerializeToString(),
            response_deserializer=message_factory.GetMessageClass(descriptor.output_type).FromString,
        )
        metadata = () if self.token is None else (("authorization", f"Bearer {self.token}"),)
        return stub(iter(request) if descriptor.client_streaming else request, timeout=timeout, metadata=metadata)

    def create(
        self,
        run_id: str,
        weights: np.ndarray,
        *,
        optimizer: optimizer_pb2.Optimizer | None = None,
        aggregation: run_pb2.Aggregation | None = None,
        shapes: Sequence[tuple[int, ...]] = (),
        **header: Any,
    ) -> run_pb2.Run:
        """Creates a run from a flat float32 array."""
        data = weights.astype("<f4").tobytes()
        fields = {
            "run_id": run_id,
            "manifest": manifest(*(shapes or [weights.shape])),
            "optimizer": optimizer or sgd(),
            "aggregation": aggregation or synchronous(1),
            "dtype": tensor_pb2.DTYPE_FLOAT32,
            "size_bytes": len(data),
        } | header
        head = run_service_pb2.CreateRunRequest(header=run_service_pb2.CreateRunHeader(**fields))
        return self.call("RunService", "CreateRun", stream(run_service_pb2.CreateRunRequest, head, data)).run

    def join(self, run: str, worker_id: str = "", **fields: Any) -> run_service_pb2.JoinRunResponse:
        """Takes a lease."""
        return self.call(
            "RunService", "JoinRun", run_service_pb2.JoinRunRequest(run=run, worker_id=worker_id, **fields)
        )

    def run(self, name: str, *, full: bool = False) -> run_pb2.Run:
        """Reads a run."""
        view = run_pb2.RUN_VIEW_FULL if full else run_pb2.RUN_VIEW_BASIC
        return self.call("RunService", "GetRun", run_service_pb2.GetRunRequest(name=name, view=view)).run

    def push(self, requests: Iterable[Any]) -> optimizer_service_pb2.PushResult:
        """Pushes a prepared stream."""
        return self.call("OptimizerService", "PushGradients", requests).result

    def pull(self, run: str, **spec: Any) -> tuple[optimizer_service_pb2.WeightsHeader, np.ndarray]:
        """Pulls weights, float32 unless told otherwise, and checks the stream's grammar."""
        request = optimizer_service_pb2.PullWeightsRequest(run=run, pull=optimizer_service_pb2.PullSpec(**spec))
        return read_weights(self.call("OptimizerService", "PullWeights", request))


def _arity(streaming: bool) -> str:
    return "stream" if streaming else "unary"


def chunks(kind: type[Any], data: bytes, size: int = CHUNK) -> list[Any]:
    """Chunk messages of the data."""
    return [kind(chunk=tensor_pb2.Chunk(offset=at, data=data[at : at + size])) for at in range(0, len(data), size)]


def stream(kind: type[Any], head: Any, data: bytes, *, checksum: int | None = None) -> list[Any]:
    """A whole stream: header, chunks, trailer."""
    trailer = tensor_pb2.StreamTrailer(crc32c=crc32c(data) if checksum is None else checksum)
    return [head, *chunks(kind, data), kind(trailer=trailer)]


def push_header(lease: Any, digest: bytes, **fields: Any) -> optimizer_service_pb2.PushHeader:
    """A push header with sensible fields, each of which can be overridden."""
    defaults = {
        "worker": lease.worker,
        "epoch": lease.epoch,
        "sequence": 1,
        "base_step": 0,
        "manifest_digest": digest,
        "example_count": 1,
        "dtype": tensor_pb2.DTYPE_FLOAT32,
    }
    return optimizer_service_pb2.PushHeader(**(defaults | fields))


def push_stream(lease: Any, digest: bytes, gradient: np.ndarray, **fields: Any) -> list[Any]:
    """A whole push of a float32 gradient."""
    data = gradient.astype("<f4").tobytes()
    kind = optimizer_service_pb2.PushGradientsRequest
    return stream(kind, kind(header=push_header(lease, digest, size_bytes=len(data), **fields)), data)


def read_weights(responses: Iterable[Any]) -> tuple[optimizer_service_pb2.WeightsHeader, np.ndarray]:
    """Puts a stream of weights together, float32, with every rule of the grammar asserted."""
    header, data, finished = None, bytearray(), False
    for response in responses:
        assert not finished, "something follows the trailer"
        match response.WhichOneof("payload"):
            case "header":
                assert header is None
                header = response.header
            case "chunk":
                assert response.chunk.offset == len(data)
                data += response.chunk.data
            case "trailer":
                finished = True
                assert response.trailer.crc32c == crc32c(bytes(data))
    assert header is not None
    assert finished
    assert len(data) == header.size_bytes
    return header, np.frombuffer(bytes(data), "<f4")


def floats(*values: float) -> np.ndarray:
    """A float32 array."""
    return np.frombuffer(struct.pack(f"<{len(values)}f", *values), "<f4")
