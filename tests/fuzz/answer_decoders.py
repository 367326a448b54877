"""What a client reads of a server, which may lie."""

import grpc
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import error_details_pb2, status_pb2
from wire_client import stream

from kedge import policies
from kedge.transport import convert as answers
from kedge.transport.status import error_from_rpc
from kedge.transport.stream import read_weights
from kedge.v1 import checkpoint_service_pb2 as checkpoint_pb
from kedge.v1 import optimizer_service_pb2 as optimizer_pb
from kedge.v1 import run_pb2, tensor_pb2
from kedge.v1 import run_service_pb2 as run_pb
from kedge.wire import convert as wire
from kedge.wire.codec import Malformed, stream_parser
from kedge.wire.groups import group_to_wire
from kedge.wire.policies import (
    admission_to_wire,
    durability_from_wire,
    policy_to_wire,
)

from .decoder import GROUPS, LEASE, MANIFEST, OPTIMIZERS, POLICIES, VALUES, Decoder, of_messages, pieces


def _pulled(raw: bytes) -> None:
    """A stream of weights, its messages in whatever order."""
    parse = stream_parser(optimizer_pb.PullWeightsResponse)
    messages = [message for message in map(parse, pieces(raw)) if not isinstance(message, Malformed)]
    read_weights(iter(messages), MANIFEST)


def _weights() -> list[bytes]:
    kind, data = optimizer_pb.PullWeightsResponse, VALUES.tobytes()
    header = optimizer_pb.WeightsHeader(
        step=3, dtype=tensor_pb2.DTYPE_FLOAT32, size_bytes=len(data), manifest_digest=MANIFEST.digest, weights=1
    )
    whole = stream(kind, kind(header=header), data)
    unchanged = optimizer_pb.WeightsHeader(step=3, is_unchanged=True, manifest_digest=MANIFEST.digest)
    nothing = [kind(header=unchanged), kind(trailer=tensor_pb2.StreamTrailer())]
    return [b"|".join(one.SerializeToString() for one in messages) for messages in (whole, nothing)]


class _FailedCall(grpc.RpcError):
    """A call as gRPC raises it."""

    def __init__(self, raw: bytes) -> None:
        super().__init__()
        self._raw = raw

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.UNKNOWN

    def details(self) -> str:
        return self._raw[:40].decode("utf-8", "replace")

    def trailing_metadata(self) -> list[tuple[str, str | bytes]]:
        return [("grpc-status-details-bin", self._raw)]


def _failed(raw: bytes) -> None:
    raise error_from_rpc(_FailedCall(raw), address="here:1", is_closed=False)


def _status() -> bytes:
    status = status_pb2.Status(code=5, message="there is none")
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason="RUN_NOT_FOUND", domain="kedge.dev"))
    retry = error_details_pb2.RetryInfo()
    retry.retry_delay.seconds = 3
    status.details.add().Pack(retry)
    return status.SerializeToString()


def _described() -> run_pb2.Run:
    worker = run_pb2.Worker(name="runs/a/workers/w", epoch=3, applied_count=2, last_loss=0.5)
    return run_pb2.Run(
        name="runs/a",
        create_time=Timestamp(seconds=1_700_000_000),
        optimizer=wire.optimizer_to_wire(OPTIMIZERS[1]),
        aggregation=policy_to_wire(POLICIES[0]),
        manifest=wire.manifest_to_wire(MANIFEST),
        groups=map(group_to_wire, GROUPS),
        admission=admission_to_wire(policies.Admission()),
        state=run_pb2.RunState(step=4, workers=[worker], rejected_counts={"STALE_GRADIENT": 3}),
    )


def _events(message: run_pb.WatchRunResponse) -> None:
    answers.events(message.events)


def _event() -> run_pb.WatchRunResponse:
    event = run_pb2.Event(number=3, kind=1, step=4, aggregation=policy_to_wire(POLICIES[1]))
    event.time.seconds = 1_700_000_000
    return run_pb.WatchRunResponse(events=[event])


def _result(message: optimizer_pb.PushResult) -> None:
    durability_from_wire(message.durability)
    answers.push_result(message, _Pushed)  # type: ignore[arg-type]


class _Pushed:
    sequence = 1


CLIENT: dict[str, Decoder] = {
    "weights": Decoder(_pulled, _weights()),
    "status": Decoder(_failed, [_status()]),
    "run": of_messages(run_pb2.Run, answers.run_info, [_described()]),
    "events": of_messages(run_pb.WatchRunResponse, _events, [_event()]),
    "result": of_messages(
        optimizer_pb.PushResult, _result, [optimizer_pb.PushResult(sequence=1, outcome=1, durability=2)]
    ),
    "lease": of_messages(run_pb.JoinRunResponse, answers.lease, [LEASE]),
    "checkpoint": of_messages(
        checkpoint_pb.Checkpoint,
        answers.checkpoint,
        [checkpoint_pb.Checkpoint(name="runs/a/checkpoints/4-8", step=4, metrics={"loss": 0.5})],
    ),
}
