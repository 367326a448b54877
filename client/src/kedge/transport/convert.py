"""Between the transport's values and protobuf messages."""

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any, get_args

from google.protobuf.timestamp_pb2 import Timestamp

from kedge.transport.status import internal_error
from kedge.transport.values import (
    Checkpoint,
    Event,
    EventKind,
    Lease,
    NewRun,
    Outcome,
    PullRequest,
    Push,
    PushResult,
    RoundStatus,
    RunInfo,
    RunStatus,
    RunUpdate,
    WatchStart,
    WorkerStatus,
)
from kedge.v1 import checkpoint_service_pb2, optimizer_service_pb2, run_pb2, run_service_pb2, tensor_pb2
from kedge.wire import convert
from kedge.wire.compressed import payload_bytes
from kedge.wire.groups import change_from_wire, group_to_wire, groups_from_wire
from kedge.wire.manifest import Manifest
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

_OUTCOMES: dict[int, Outcome] = {
    optimizer_service_pb2.PUSH_OUTCOME_APPLIED: "applied",
    optimizer_service_pb2.PUSH_OUTCOME_REJECTED: "rejected",
    optimizer_service_pb2.PUSH_OUTCOME_DEFERRED: "deferred",
}

_WEIGHTS = {
    "fast": tensor_pb2.WEIGHTS_FAST,
    "slow": tensor_pb2.WEIGHTS_SLOW,
    "fast_and_slow": tensor_pb2.WEIGHTS_FAST_AND_SLOW,
}


_EVENT_KINDS: dict[int, EventKind] = {
    run_pb2.EventKind.Value(f"EVENT_KIND_{kind.upper()}"): kind for kind in get_args(EventKind)
}


def create_header(run: NewRun, dtype: str) -> run_service_pb2.CreateRunHeader:
    """The first message of a creation."""
    return run_service_pb2.CreateRunHeader(
        run_id=run.run_id,
        manifest=convert.manifest_to_wire(run.manifest),
        optimizer=convert.optimizer_to_wire(run.optimizer),
        aggregation=policy_to_wire(run.aggregation),
        request_id=run.request_id,
        dtype=convert.dtype_to_wire(dtype),
        size_bytes=run.manifest.size_bytes(dtype),
        groups=[group_to_wire(group) for group in run.groups],
        admission=admission_to_wire(run.admission),
        durability=durability_to_wire(run.durability),
        checkpointing=None if run.checkpoints is None else checkpoints_to_wire(run.checkpoints),
    )


def push_header(push: Push, manifest: Manifest) -> optimizer_service_pb2.PushHeader:
    """The first message of a contribution."""
    return optimizer_service_pb2.PushHeader(
        worker=push.lease.worker,
        epoch=push.lease.epoch,
        sequence=push.sequence,
        base_step=push.base_step,
        manifest_digest=manifest.digest,
        example_count=push.example_count,
        dtype=convert.dtype_to_wire(push.dtype),
        size_bytes=payload_bytes(push.arrays, push.dtype),
        loss=push.loss,
        wait=convert.duration_to_wire(push.wait_seconds),
        pull=pull_spec(push.pull) if push.pull else None,
    )


def pull_spec(request: PullRequest) -> optimizer_service_pb2.PullSpec:
    """Which weights are wanted."""
    return optimizer_service_pb2.PullSpec(
        weights=_WEIGHTS[request.weights],
        dtype=convert.dtype_to_wire(request.dtype),
        min_step=request.min_step,
        wait=convert.duration_to_wire(request.wait_seconds),
        if_newer_than=request.if_newer_than,
    )


def update_request(run: str, update: RunUpdate, request_id: str) -> run_service_pb2.UpdateRunRequest:
    """What changes of a live run."""
    return run_service_pb2.UpdateRunRequest(
        name=run,
        request_id=request_id,
        aggregation=None if update.aggregation is None else policy_to_wire(update.aggregation),
        admission=None if update.admission is None else admission_to_wire(update.admission),
    )


def watch_request(run: str, start: WatchStart) -> run_service_pb2.WatchRunRequest:
    """Where to begin watching."""
    return run_service_pb2.WatchRunRequest(
        name=run,
        from_step=start.from_step,
        after_number=start.after_number,
        server_generation=start.server_generation,
    )


def events(messages: Iterable[run_pb2.Event]) -> list[Event]:
    """Events, without those of a kind that only a newer server knows."""
    return [_event(message, _EVENT_KINDS[message.kind]) for message in messages if message.kind in _EVENT_KINDS]


def push_result(message: optimizer_service_pb2.PushResult, push: Push) -> PushResult:
    """What became of `push`.

    Raises:
        KedgeError: INTERNAL if it is the answer to something else.
    """
    outcome = _OUTCOMES.get(message.outcome)
    if outcome is None or message.sequence != push.sequence:
        raise internal_error(
            f"the answer to sequence {push.sequence} has sequence {message.sequence} and outcome {message.outcome}"
        )
    return PushResult(
        outcome,
        message.reason,
        message.step,
        message.staleness,
        message.message,
        durability_from_wire(message.durability) or "memory",
        message.durable_step,
    )


def lease(message: run_service_pb2.JoinRunResponse) -> Lease:
    """A lease as JoinRun grants it."""
    return Lease(message.worker, message.epoch, convert.duration_from_wire(message, "lease") or 0.0)


def checkpoint(message: checkpoint_service_pb2.Checkpoint) -> Checkpoint:
    """A checkpoint."""
    return Checkpoint(
        name=message.name,
        step=message.step,
        create_time=_time(message.create_time),
        size_bytes=message.size_bytes,
        metrics=dict(message.metrics),
    )


def run_info(message: run_pb2.Run) -> RunInfo:
    """A run; its manifest is None where the view has none."""
    return RunInfo(
        name=message.name,
        create_time=_time(message.create_time),
        parameter_count=message.parameter_count,
        optimizer=convert.optimizer_from_wire(message.optimizer),
        aggregation=policy_from_wire(message.aggregation),
        admission=admission_from_wire(message.admission),
        groups=groups_from_wire(message.groups),
        changes=tuple(change_from_wire(change) for change in message.changes),
        status=_run_status(message.state),
        manifest=convert.manifest_from_wire(message.manifest) if message.manifest.tensors else None,
        durability=durability_from_wire(message.durability) or "memory",
        checkpoints=checkpoints_from_wire(message.checkpointing),
    )


def _run_status(state: run_pb2.RunState) -> RunStatus:
    held = RoundStatus(state.round.contribution_count, state.round.required_count)
    return RunStatus(
        step=state.step,
        lookahead_sync_count=state.lookahead_sync_count,
        learning_rate=state.learning_rate,
        workers=tuple(_worker_status(worker) for worker in state.workers),
        round=held if state.HasField("round") else None,
        applied_count=state.applied_count,
        rejected_counts=dict(state.rejected_counts),
        loss=_optional(state, "loss"),
        waiting_for=state.waiting_for,
        durable_step=state.durable_step,
        storage_problem=state.storage_problem,
    )


def _worker_status(worker: run_pb2.Worker) -> WorkerStatus:
    return WorkerStatus(
        name=worker.name,
        epoch=worker.epoch,
        lease_remaining_seconds=convert.duration_from_wire(worker, "lease_remaining") or 0.0,
        last_sequence=worker.last_sequence,
        applied_count=worker.applied_count,
        rejected_count=worker.rejected_count,
        last_staleness=worker.last_staleness,
        last_loss=_optional(worker, "last_loss"),
        clock=worker.clock,
    )


def _event(message: run_pb2.Event, kind: EventKind) -> Event:
    return Event(
        number=message.number,
        time=_time(message.time),
        kind=kind,
        step=message.step,
        worker=message.worker,
        epoch=message.epoch,
        reason=message.reason,
        message=message.message,
        contribution_count=message.contribution_count,
        loss=_optional(message, "loss"),
        aggregation=policy_from_wire(message.aggregation) if message.HasField("aggregation") else None,
        skipped_counts={name.lower(): count for name, count in message.skipped_counts.items()},
        checkpoint=message.checkpoint,
    )


def _time(message: Timestamp) -> datetime:
    try:
        return message.ToDatetime(tzinfo=UTC)
    except (ValueError, OverflowError) as error:
        raise internal_error(f"the server sent a time that is none: {error}") from None


def _optional(message: Any, field: str) -> float | None:
    return getattr(message, field) if message.HasField(field) else None
