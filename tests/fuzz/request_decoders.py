"""What the server reads of a client: every RPC's request."""

from typing import Any

from wire_client import push_header

from kedge import optim, policies
from kedge.v1 import checkpoint_service_pb2 as checkpoint_pb
from kedge.v1 import optimizer_service_pb2 as optimizer_pb
from kedge.v1 import run_service_pb2 as run_pb
from kedge.v1 import tensor_pb2
from kedge.wire import convert as wire
from kedge.wire import names
from kedge.wire.groups import change_to_wire, group_to_wire
from kedge.wire.policies import (
    admission_to_wire,
    policy_to_wire,
)
from kedge_server.rpc import convert
from kedge_server.storage import plain

from .decoder import CONFIG, ELEMENTS, GROUPS, LEASE, MANIFEST, OPTIMIZERS, POLICIES, SCHEDULES, Decoder, of_messages

_HEADER = push_header(LEASE, MANIFEST.digest, size_bytes=4 * ELEMENTS, loss=0.5)
_PULL = optimizer_pb.PullSpec(weights=tensor_pb2.WEIGHTS_SLOW, dtype=tensor_pb2.DTYPE_BFLOAT16, min_step=3)


def _creation(optimizer: optim.Optimizer, policy: policies.Policy) -> run_pb.CreateRunHeader:
    return run_pb.CreateRunHeader(
        run_id="a",
        manifest=wire.manifest_to_wire(MANIFEST),
        optimizer=wire.optimizer_to_wire(optimizer),
        aggregation=policy_to_wire(policy),
        dtype=tensor_pb2.DTYPE_FLOAT32,
        size_bytes=4 * ELEMENTS,
        request_id="once",
        groups=map(group_to_wire, GROUPS),
    )


def _push(header: optimizer_pb.PushHeader) -> None:
    convert.contribution_header(header)
    convert.gradient_dtype(header, CONFIG)
    wire.duration_from_wire(header, "wait")
    convert.pull(header.pull)


def _join(request: run_pb.JoinRunRequest) -> None:
    names.parse_run(request.run)
    names.check_id(request.worker_id, what="worker")
    wire.duration_from_wire(request, "lease")


def _update(request: run_pb.UpdateRunRequest) -> None:
    names.parse_run(request.name)
    convert.request_id(request)
    update = convert.run_update(request)
    plain.decode(plain.encode(tuple(update)))


def _run_of(request: Any) -> None:
    names.parse_run(request.name)


def _worker_of(request: Any) -> None:
    names.parse_worker(request.worker)


def _checkpoint_of(request: Any) -> None:
    names.parse_checkpoint(request.name)
    convert.request_id(request)


REQUESTS: dict[str, Decoder] = {
    "CreateRun": of_messages(
        run_pb.CreateRunHeader,
        convert.new_run,
        [_creation(optimizer, policy) for optimizer in OPTIMIZERS for policy in POLICIES],
    ),
    "GetRun": of_messages(run_pb.GetRunRequest, _run_of, [run_pb.GetRunRequest(name="runs/a", view=2)]),
    "ListRuns": of_messages(
        run_pb.ListRunsRequest, lambda message: message.page_size, [run_pb.ListRunsRequest(page_size=4)]
    ),
    "UpdateRun": of_messages(
        run_pb.UpdateRunRequest,
        _update,
        [
            run_pb.UpdateRunRequest(
                name="runs/a",
                request_id="once",
                aggregation=policy_to_wire(POLICIES[0]),
                admission=admission_to_wire(policies.Admission()),
                hyperparameters=change_to_wire("bias", optim.controls.Change(lr=SCHEDULES[1])),
            )
        ],
    ),
    "TickSchedule": of_messages(
        run_pb.TickScheduleRequest,
        lambda request: (_run_of(request), convert.request_id(request)),
        [run_pb.TickScheduleRequest(name="runs/a", group="bias", to_tick=4)],
    ),
    "DeleteRun": of_messages(run_pb.DeleteRunRequest, _run_of, [run_pb.DeleteRunRequest(name="runs/a")]),
    "JoinRun": of_messages(run_pb.JoinRunRequest, _join, [run_pb.JoinRunRequest(run="runs/a", worker_id="w")]),
    "Heartbeat": of_messages(run_pb.HeartbeatRequest, _worker_of, [run_pb.HeartbeatRequest(worker=LEASE.worker)]),
    "LeaveRun": of_messages(run_pb.LeaveRunRequest, _worker_of, [run_pb.LeaveRunRequest(worker=LEASE.worker)]),
    "EvictWorker": of_messages(
        run_pb.EvictWorkerRequest,
        lambda request: (_worker_of(request), convert.eviction(request)),
        [run_pb.EvictWorkerRequest(worker=LEASE.worker, cause="it is slow")],
    ),
    "WatchRun": of_messages(
        run_pb.WatchRunRequest,
        lambda request: (_run_of(request), convert.watch_start(request, 3)),
        [run_pb.WatchRunRequest(name="runs/a", after_number=4, server_generation=3)],
    ),
    "PushGradients": of_messages(
        optimizer_pb.PushHeader, _push, [_HEADER, optimizer_pb.PushHeader(worker=LEASE.worker, pull=_PULL)]
    ),
    "PullWeights": of_messages(
        optimizer_pb.PullWeightsRequest,
        lambda request: (names.parse_run(request.run), convert.pull(request.pull)),
        [optimizer_pb.PullWeightsRequest(run="runs/a", pull=_PULL)],
    ),
    "Exchange": of_messages(
        optimizer_pb.ExchangePull,
        lambda request: (_worker_of(request), convert.pull(request.pull)),
        [optimizer_pb.ExchangePull(worker=LEASE.worker, pull=_PULL)],
    ),
    "OfferMemory": of_messages(
        optimizer_pb.OfferMemoryRequest, _worker_of, [optimizer_pb.OfferMemoryRequest(worker=LEASE.worker)]
    ),
    "CreateCheckpoint": of_messages(
        checkpoint_pb.CreateCheckpointRequest,
        lambda request: convert.metrics(request.metrics),
        [checkpoint_pb.CreateCheckpointRequest(metrics={"loss": 0.5})],
    ),
    "RestoreCheckpoint": of_messages(
        checkpoint_pb.RestoreCheckpointRequest,
        _checkpoint_of,
        [checkpoint_pb.RestoreCheckpointRequest(name="runs/a/checkpoints/4-8", request_id="once")],
    ),
    "ForkCheckpoint": of_messages(
        checkpoint_pb.ForkCheckpointRequest,
        lambda request: (_checkpoint_of(request), names.check_id(request.run_id, what="run")),
        [checkpoint_pb.ForkCheckpointRequest(name="runs/a/checkpoints/4-8", run_id="b")],
    ),
}
