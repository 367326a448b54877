"""Between messages and the engine's values, for what only the server converts; the rest is `kedge.wire.convert`."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from kedge.optim.controls import RecordedChange
from kedge.policies import METRIC_NAME_LENGTH
from kedge.v1 import checkpoint_service_pb2, optimizer_service_pb2, run_pb2, run_service_pb2, tensor_pb2
from kedge.wire import compressed, names
from kedge.wire import convert as wire
from kedge.wire.errors import KedgeError
from kedge.wire.groups import change_from_wire, change_to_wire, group_to_wire, groups_from_wire
from kedge.wire.policies import (
    admission_from_wire,
    admission_to_wire,
    checkpoints_from_wire,
    checkpoints_to_wire,
    durability_from_wire,
    durability_to_wire,
    policy_from_wire,
    policy_to_wire,
)
from kedge.wire.reflection import invalid
from kedge_server.core.commits import RunConfig
from kedge_server.core.events import Event
from kedge_server.core.leases import Lease
from kedge_server.core.stored import CheckpointInfo
from kedge_server.core.values import ContributionHeader, PushResult
from kedge_server.engine.registry import NewRun
from kedge_server.engine.run import RunEngine
from kedge_server.engine.run_state import RunState, RunUpdate
from kedge_server.engine.snapshots import Snapshot, Weights

# A run is described in one message of at most 4 MiB, with what its workers add.
_MAX_MANIFEST_BYTES = 3 << 20
_MAX_GROUPS_BYTES = 256 << 10
_MAX_CHANGES_BYTES = 64 << 10
_MAX_REQUEST_ID_LENGTH = 64
_MAX_CAUSE_LENGTH = 256
_MAX_METRICS = 32

_WEIGHTS: dict[int, Weights] = {
    tensor_pb2.WEIGHTS_UNSPECIFIED: "fast",
    tensor_pb2.WEIGHTS_FAST: "fast",
    tensor_pb2.WEIGHTS_SLOW: "slow",
    tensor_pb2.WEIGHTS_FAST_AND_SLOW: "fast_and_slow",
}
_WEIGHTS_TO_WIRE = {
    "fast": tensor_pb2.WEIGHTS_FAST,
    "slow": tensor_pb2.WEIGHTS_SLOW,
    "fast_and_slow": tensor_pb2.WEIGHTS_FAST_AND_SLOW,
}


def new_run(header: run_service_pb2.CreateRunHeader) -> NewRun:
    """What a creation asks for.

    Raises:
        KedgeError: INVALID_NAME, MANIFEST_INVALID, UNSUPPORTED_DTYPE or INVALID_CONFIGURATION.
    """
    _check_sizes(header)
    return NewRun(
        name=f"runs/{names.check_id(header.run_id, what='run')}",
        manifest=wire.manifest_from_wire(header.manifest),
        optimizer=wire.optimizer_from_wire(header.optimizer),
        policy=policy_from_wire(header.aggregation),
        admission=admission_from_wire(header.admission),
        groups=groups_from_wire(header.groups),
        request_id=request_id(header),
        durability=durability_from_wire(header.durability),
        checkpoints=checkpoints_from_wire(header.checkpointing),
    )


def request_id(message: Any) -> str:
    """The identity of a request that may be repeated; empty if it has none.

    Raises:
        KedgeError: INVALID_CONFIGURATION if it is too long.
    """
    given: str = message.request_id
    if len(given) > _MAX_REQUEST_ID_LENGTH:
        problem = f"request_id has {len(given)} characters: it must be at most {_MAX_REQUEST_ID_LENGTH}"
        raise invalid("request_id", problem)
    return given


def run_update(request: run_service_pb2.UpdateRunRequest) -> RunUpdate:
    """What a live run is to be changed to.

    Raises:
        KedgeError: INVALID_CONFIGURATION.
    """
    group, change = "", None
    if request.HasField("hyperparameters"):
        _, group, change = change_from_wire(request.hyperparameters)
    return RunUpdate(
        group,
        change,
        policy=policy_from_wire(request.aggregation) if request.HasField("aggregation") else None,
        admission=admission_from_wire(request.admission) if request.HasField("admission") else None,
    )


def watch_start(request: run_service_pb2.WatchRunRequest, generation: int) -> dict[str, int]:
    """Where a watch begins, as `Feed.reader` takes it: what was told by an earlier server says nothing here."""
    start = request.WhichOneof("start")
    if start == "after_number" and request.server_generation not in (0, generation):
        return {start: 0}
    return {start: getattr(request, start)} if start else {}


def eviction(request: run_service_pb2.EvictWorkerRequest) -> tuple[str, float | None]:
    """Why a worker is sent away, and for how long.

    Raises:
        KedgeError: INVALID_CONFIGURATION.
    """
    if len(request.cause) > _MAX_CAUSE_LENGTH:
        problem = f"cause has {len(request.cause)} characters: it must be at most {_MAX_CAUSE_LENGTH}"
        raise invalid("cause", problem)
    return request.cause, wire.duration_from_wire(request, "block")


def contribution_header(header: optimizer_service_pb2.PushHeader) -> tuple[names.WorkerName, ContributionHeader]:
    """The worker and the contribution that a push announces.

    Raises:
        KedgeError: INVALID_NAME.
    """
    worker = names.parse_worker(header.worker)
    return worker, ContributionHeader(
        worker_id=worker.worker_id,
        epoch=header.epoch,
        sequence=header.sequence,
        base_step=header.base_step,
        manifest_digest=header.manifest_digest,
        example_count=header.example_count,
        loss=header.loss if header.HasField("loss") else None,
    )


def gradient_dtype(header: optimizer_service_pb2.PushHeader, config: RunConfig) -> str:
    """What a push's values are sent as, checked before memory is taken for them.

    Raises:
        KedgeError: UNSUPPORTED_DTYPE, COMPRESSION_UNSAFE or SIZE_MISMATCH.
    """
    dtype = wire.gradient_dtype_from_wire(header.dtype)
    compressed.check_safe(config.optimizer, dtype)
    compressed.check_size(dtype, header.size_bytes, config.manifest.element_count)
    return dtype


class Pull(NamedTuple):
    """Which weights are asked for."""

    weights: Weights
    dtype: str
    min_step: int
    wait_seconds: float
    if_newer_than: int | None

    def is_answered_by(self, step: int) -> bool:
        """Whether it need not be told of the weights of this step."""
        return self.if_newer_than is not None and step <= self.if_newer_than


def pull(spec: optimizer_service_pb2.PullSpec) -> Pull:
    """What a pull asks for.

    Raises:
        KedgeError: INVALID_CONFIGURATION or UNSUPPORTED_DTYPE.
    """
    if spec.weights not in _WEIGHTS:
        raise invalid("weights", f"weights is {spec.weights}: this server does not know that number")
    return Pull(
        _WEIGHTS[spec.weights],
        wire.dtype_from_wire(spec.dtype, default="float32"),
        spec.min_step,
        wire.duration_from_wire(spec, "wait") or 0.0,
        spec.if_newer_than if spec.HasField("if_newer_than") else None,
    )


def weights_header(
    snapshot: Snapshot, weights: Weights, *, dtype: str, size_bytes: int, digest: bytes
) -> optimizer_service_pb2.WeightsHeader:
    """The header of a stream of weights."""
    return optimizer_service_pb2.WeightsHeader(
        step=snapshot.step,
        lookahead_sync_count=snapshot.lookahead_sync_count,
        weights=_WEIGHTS_TO_WIRE[weights],
        dtype=wire.dtype_to_wire(dtype),
        size_bytes=size_bytes,
        manifest_digest=digest,
    )


def push_result(result: PushResult, run: RunEngine) -> optimizer_service_pb2.PushResult:
    """A contribution's result, and what it survives by now."""
    durable_step, level = run.store.durable_step, run.store.level
    if level == "checkpoint" and (result.outcome != "applied" or result.step > durable_step):
        level = "memory"
    return optimizer_service_pb2.PushResult(
        sequence=result.sequence,
        outcome=f"PUSH_OUTCOME_{result.outcome.upper()}",
        reason=result.reason,
        message=result.message,
        step=result.step,
        staleness=result.staleness,
        durability=durability_to_wire(level),
        durable_step=durable_step,
    )


def checkpoint(info: CheckpointInfo, run_name: str) -> checkpoint_service_pb2.Checkpoint:
    """A checkpoint."""
    message = checkpoint_service_pb2.Checkpoint(
        name=f"{run_name}/checkpoints/{info.checkpoint_id}",
        step=info.step,
        size_bytes=info.size_bytes,
        metrics=dict(info.metrics),
    )
    message.create_time.FromNanoseconds(round(info.created_at_seconds * 1e9))
    return message


def metrics(given: Mapping[str, float]) -> dict[str, float]:
    """What a checkpoint is to be judged by.

    Raises:
        KedgeError: INVALID_CONFIGURATION.
    """
    if len(given) > _MAX_METRICS:
        raise invalid("metrics", f"metrics has {len(given)} entries: it must have at most {_MAX_METRICS}")
    for name, value in given.items():
        if not 1 <= len(name) <= METRIC_NAME_LENGTH:
            problem = f"a metric's name has {len(name)} characters: it must have 1 to {METRIC_NAME_LENGTH}"
            raise invalid("metrics", problem)
        if not math.isfinite(value):
            raise invalid("metrics", f"metrics[{name!r}] is {value}: it must be finite")
    return dict(given)


def run(engine: RunEngine, *, with_manifest: bool) -> run_pb2.Run:
    """A run as it stands."""
    config = engine.config
    state = engine.state()
    message = run_pb2.Run(
        name=config.name,
        parameter_count=config.manifest.element_count,
        optimizer=wire.optimizer_to_wire(config.optimizer),
        aggregation=policy_to_wire(engine.policy),
        state=_state(state, config.name),
        groups=[group_to_wire(group) for group in config.groups],
        changes=_last_changes(state.changes),
        admission=admission_to_wire(engine.admission),
        durability=durability_to_wire(config.durability),
        checkpointing=checkpoints_to_wire(config.checkpoints),
    )
    message.create_time.FromNanoseconds(round(config.created_at_seconds * 1e9))
    if with_manifest:
        message.manifest.CopyFrom(wire.manifest_to_wire(config.manifest))
    return message


def event(happened: Event, run_name: str) -> run_pb2.Event:
    """Something that happened to a run."""
    message = run_pb2.Event(
        number=happened.number,
        kind=f"EVENT_KIND_{happened.kind.upper()}",
        step=happened.step,
        worker=f"{run_name}/workers/{happened.worker_id}" if happened.worker_id else "",
        epoch=happened.epoch,
        reason=happened.reason,
        message=happened.message,
        contribution_count=happened.contribution_count,
        loss=happened.loss,
        aggregation=policy_to_wire(happened.policy) if happened.policy else None,
        skipped_counts={kind.upper(): count for kind, count in happened.skipped_counts.items()},
        checkpoint=happened.checkpoint,
    )
    message.time.FromNanoseconds(round(happened.time_seconds * 1e9))
    return message


def _check_sizes(header: run_service_pb2.CreateRunHeader) -> None:
    """Refuses a run whose description would not fit into one message."""
    manifest_bytes = header.manifest.ByteSize()
    if manifest_bytes > _MAX_MANIFEST_BYTES:
        raise KedgeError(
            "MANIFEST_INVALID",
            f"the manifest of {len(header.manifest.tensors)} tensors takes {manifest_bytes} bytes, at most "
            f"{_MAX_MANIFEST_BYTES} are taken: give fewer tensors, or shorter names",
            tensor="",
        )
    groups_bytes = sum(group.ByteSize() for group in header.groups)
    if groups_bytes > _MAX_GROUPS_BYTES:
        message = f"groups take {groups_bytes} bytes: it must be at most {_MAX_GROUPS_BYTES}"
        raise invalid("groups", message)


def _last_changes(changes: tuple[RecordedChange, ...]) -> list[run_pb2.HyperparameterChange]:
    """As many of the newest as fit, oldest first."""
    room = _MAX_CHANGES_BYTES
    messages: list[run_pb2.HyperparameterChange] = []
    for made in reversed(changes):
        message = change_to_wire(made.group, made.change, step=made.step)
        room -= message.ByteSize()
        if room < 0:
            break
        messages.insert(0, message)
    return messages


def _state(state: RunState, run_name: str) -> run_pb2.RunState:
    message = run_pb2.RunState(
        step=state.step,
        lookahead_sync_count=state.lookahead_sync_count,
        learning_rate=state.learning_rate,
        workers=[
            _worker(lease, remaining, run_name)
            for lease, remaining in zip(state.leases, state.lease_remaining_seconds, strict=True)
        ],
        applied_count=state.applied_count,
        rejected_counts=state.rejected_counts,
        loss=state.loss,
        waiting_for=state.waiting_for,
        durable_step=state.durable_step,
        storage_problem=state.storage_problem,
    )
    if state.contribution_count:
        message.round.contribution_count = state.contribution_count
        message.round.required_count = state.required_count
    return message


def _worker(lease: Lease, remaining_seconds: float, run_name: str) -> run_pb2.Worker:
    return run_pb2.Worker(
        name=f"{run_name}/workers/{lease.worker_id}",
        epoch=lease.epoch,
        lease_remaining=wire.duration_to_wire(remaining_seconds),
        last_sequence=lease.ledger.last_sequence,
        applied_count=lease.applied_count,
        rejected_count=lease.rejected_count,
        last_staleness=max(0, lease.last_staleness),
        last_loss=lease.last_loss,
        clock=lease.clock,
    )
