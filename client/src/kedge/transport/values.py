"""The plain values that pass between the SDK and a transport. No protobuf, no gRPC."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal, NamedTuple

import numpy as np

from kedge.optim import Group, Optimizer
from kedge.optim.controls import RecordedChange
from kedge.policies import Admission, Checkpoints, Durability, Policy
from kedge.wire.manifest import Manifest

WeightsKind = Literal["fast", "slow", "fast_and_slow"]
"""Which weights: the fast ones, the slow ones, or both of one step."""

Outcome = Literal["applied", "rejected", "deferred"]


@dataclass(frozen=True)
class RoundStatus:
    """The round that is open.

    Attributes:
        contribution_count: contributions held.
        required_count: how many close it, given the workers alive.
    """

    contribution_count: int
    required_count: int


@dataclass(frozen=True)
class WorkerStatus:
    """A worker that holds a lease.

    Attributes:
        name: `runs/{run}/workers/{worker}`.
        epoch: the lease's epoch; it grows with every join.
        lease_remaining_seconds: how long the lease still holds without a heartbeat.
        last_sequence: the sequence of its last recorded contribution; 0 before the first.
        applied_count: contributions applied in this epoch.
        rejected_count: contributions rejected in this epoch.
        last_staleness: the staleness of its last contribution, in steps.
        last_loss: the loss that came with its last contribution, if one did.
        clock: under `BoundedStaleness`, its contributions since it joined, counted from the slowest worker's then.
    """

    name: str
    epoch: int
    lease_remaining_seconds: float
    last_sequence: int
    applied_count: int
    rejected_count: int
    last_staleness: int
    last_loss: float | None
    clock: int = 0


@dataclass(frozen=True)
class RunStatus:
    """Where a run stands, at one moment.

    Attributes:
        step: the number of fast updates applied: the version of the weights.
        lookahead_sync_count: the lookahead syncs among them; 0 without Lookahead.
        learning_rate: that of the next step, outside the groups that have their own.
        workers: those that hold a lease, by name.
        round: the open round, if a contribution waits in it.
        applied_count: contributions applied so far.
        rejected_counts: contributions rejected so far, by reason.
        loss: the mean loss of the last step's contributions, over those that sent one.
        waiting_for: what the run waits for, in words; empty when it keeps nobody waiting.
        durable_step: the step that it would go on from if the server's process ended now; 0 if it is kept in memory.
        storage_problem: why nothing can be stored at the moment, so that pushes are refused; empty when it can.
    """

    step: int
    lookahead_sync_count: int
    learning_rate: float
    workers: tuple[WorkerStatus, ...]
    round: RoundStatus | None
    applied_count: int
    rejected_counts: Mapping[str, int]
    loss: float | None
    waiting_for: str
    durable_step: int = 0
    storage_problem: str = ""


@dataclass(frozen=True)
class RunInfo:
    """A run as the server reports it.

    Attributes:
        name: `runs/{run}`.
        create_time: when it was created, by the server's clock.
        parameter_count: the number of elements of all its tensors.
        optimizer: as it was created.
        aggregation: how contributions become steps.
        admission: which gradients it takes.
        groups: its parameter groups, as it was created.
        changes: the changes of hyperparameters that were made by hand, oldest first; of many the last 32.
        status: where it stands.
        manifest: its tensors; None in a list of runs.
        durability: what an acknowledged push survives.
        checkpoints: when checkpoints are taken, and which are kept.
    """

    name: str
    create_time: datetime
    parameter_count: int
    optimizer: Optimizer
    aggregation: Policy
    admission: Admission
    groups: tuple[Group, ...]
    changes: tuple[RecordedChange, ...]
    status: RunStatus
    manifest: Manifest | None
    durability: Durability = "memory"
    checkpoints: Checkpoints = field(default_factory=Checkpoints)


@dataclass(frozen=True)
class Checkpoint:
    """A durable state of a run.

    Attributes:
        name: `runs/{run}/checkpoints/{checkpoint}`.
        step: the step that it is of.
        create_time: when it was taken, by the server's clock.
        size_bytes: the bytes of its files.
        metrics: what it is judged by: "loss", if its step had one, and what was given to `Run.checkpoint`.
    """

    name: str
    step: int
    create_time: datetime
    size_bytes: int
    metrics: Mapping[str, float]


class PushResult(NamedTuple):
    """What became of a contribution."""

    outcome: Outcome
    """"applied": it is part of a step. "rejected": it changed nothing and never will. "deferred": its round is open."""
    reason: str
    """Why: for "rejected" a reason of docs/errors.md, else what closed the round or keeps it open."""
    step: int
    """The step that it went into if applied, else the run's step."""
    staleness: int
    """The run's step when it was judged, less its base_step."""
    message: str
    """The same for people, with what to do."""
    durability: Durability = "memory"
    """What this result survives from now on: the run's own level, but "memory" under "checkpoint" until one has it."""
    durable_step: int = 0
    """The step that the run would go on from if the server's process ended now; 0 if it is kept in memory."""


class NewRun(NamedTuple):
    """What a run is created from."""

    run_id: str
    manifest: Manifest
    arrays: Sequence[np.ndarray]
    """The initial weights in manifest order, C-contiguous or not."""
    optimizer: Optimizer
    aggregation: Policy
    groups: tuple[Group, ...]
    request_id: str
    """The same in every attempt at one creation."""
    admission: Admission = Admission()
    durability: Durability | None = None
    """None: the server's choice."""
    checkpoints: Checkpoints | None = None
    """None: `Checkpoints()`."""


class Lease(NamedTuple):
    """A worker's right to contribute."""

    worker: str
    """`runs/{run}/workers/{worker}`."""
    epoch: int
    lease_seconds: float
    """How long it holds without a heartbeat."""


class PullRequest(NamedTuple):
    """Which weights are wanted."""

    weights: WeightsKind = "fast"
    dtype: str = "float32"
    """The dtype on the wire, a key of `DTYPES`."""
    min_step: int = 0
    wait_seconds: float = 0.0
    """How long to wait for min_step, and under `BoundedStaleness` for the slowest worker."""
    if_newer_than: int | None = None
    """Leave the weights out if they are of this step or an earlier one."""


class WeightsOfStep(NamedTuple):
    """Weights of one step."""

    step: int
    flat: np.ndarray | None
    """float32, in manifest order, not shared with anyone; fast before slow where both were asked for. None where there
    is nothing newer than asked for."""


class Push(NamedTuple):
    """One contribution."""

    lease: Lease
    sequence: int
    base_step: int
    example_count: int
    loss: float | None
    arrays: Sequence[np.ndarray]
    """The gradient's leaves in manifest order, of any of `DTYPES`."""
    dtype: str
    """The dtype on the wire, a key of `DTYPES`."""
    wait_seconds: float
    """How long to wait for the round to close before the answer is "deferred"."""
    pull: PullRequest | None
    """The weights wanted after the result."""


class RunUpdate(NamedTuple):
    """What changes of a live run. What is None stays."""

    aggregation: Policy | None = None
    admission: Admission | None = None


EventKind = Literal[
    "step",
    "lookahead_sync",
    "joined",
    "left",
    "evicted",
    "rejected",
    "aggregation_changed",
    "waiting",
    "summary",
    "checkpoint",
    "recovered",
    "restored",
]


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened to a run.

    Attributes:
        number: 1 for the run's first event since the server's start, then one more each time; a summary's is that of
            the last one left out.
        time: when, by the server's clock.
        kind: "step": a step was applied. "lookahead_sync": one was part of that step. "joined", "left": a worker took
            or gave back its lease. "evicted": its lease was ended, `reason` says how: LEASE_EXPIRED, WORKER_SUPERSEDED
            or WORKER_EVICTED. "rejected": a contribution was. "aggregation_changed": the run has another aggregation.
            "waiting": it waits for workers to join. "summary": events were left out, because they came faster than
            they were read, or are no longer kept. "checkpoint": one is complete. "recovered": the server was started
            anew, and the run goes on from this step. "restored": it goes on from a checkpoint that someone has chosen,
            and all leases were ended.
        step: the step of the run's weights then. It falls from one event to the next only with "restored", and where
            what a new server goes on from is older.
        worker: `runs/{run}/workers/{worker}`, of "joined", "left", "evicted" and "rejected".
        epoch: the worker's.
        reason: why: of a "step" what closed its round; of "evicted" and "rejected" a reason of docs/errors.md.
        message: the same for people.
        contribution_count: of a "step": the contributions that it was made of.
        loss: of a "step": their mean loss, if they sent any.
        aggregation: of "aggregation_changed": the new one.
        skipped_counts: of a "summary": the events left out, by kind; "unspecified" for those whose kinds are not known
            any more.
        checkpoint: `runs/{run}/checkpoints/{checkpoint}`, of "checkpoint" and "restored".
    """

    number: int
    time: datetime
    kind: EventKind
    step: int
    worker: str = ""
    epoch: int = 0
    reason: str = ""
    message: str = ""
    contribution_count: int = 0
    loss: float | None = None
    aggregation: Policy | None = None
    skipped_counts: Mapping[str, int] = field(default_factory=dict)
    checkpoint: str = ""


class WatchStart(NamedTuple):
    """Where to begin watching. With neither step nor number: with what happens from now on."""

    from_step: int | None = None
    after_number: int | None = None
    server_generation: int = 0
    """With `after_number`: that of the watch that told of it. What happened under another server begins with its first
    event. 0: not checked."""
