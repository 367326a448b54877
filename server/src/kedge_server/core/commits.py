"""What changes a run durably, as plain values: what its journal holds, in the order in which it happened.

A commit says what was decided and never has to be decided again; `RunImage` is what comes of them.
"""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from kedge.optim import Group, Optimizer
from kedge.optim.controls import Change, Controls, StepValues
from kedge.policies import Admission, Checkpoints, Durability, Policy
from kedge.wire.manifest import Manifest
from kedge_server.core.values import ContributionHeader, PushResult


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What a run is created with, and stays."""

    name: str
    """runs/{run}."""
    manifest: Manifest
    optimizer: Optimizer
    groups: tuple[Group, ...] = ()
    created_at_seconds: float
    """Seconds since 1970."""
    request_id: str = ""
    durability: Durability = "memory"
    checkpoints: Checkpoints = field(default_factory=Checkpoints)
    block_elements: int
    """The length of a block of its state. It goes with the run, since the order of some sums depends on it."""
    first_epoch: int
    """Greater than any epoch that an earlier run of the same name granted."""


class ArraySpec(NamedTuple):
    """One array of a state that is laid out as bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]


class Progress(NamedTuple):
    """Where a run stands that does not begin with step 0."""

    step: int
    applied_count: int
    loss: float | None
    controls: Controls


class Created(NamedTuple):
    """The run was created. The payload is its state: the arrays one after the other."""

    config: RunConfig
    policy: Policy
    admission: Admission
    arrays: tuple[ArraySpec, ...]
    """`weights` alone, flat, for a run that begins with step 0."""
    progress: Progress | None = None


class Joined(NamedTuple):
    """A worker took a lease; one that it held ended."""

    worker_id: str
    epoch: int
    duration_seconds: float
    bad_count: int = 0
    """Those in a row that its last lease hands on. What ended that row may be written later."""
    owner: str = ""
    """Whose credentials it was joined with; "" where nobody was asked."""


class Ended(NamedTuple):
    """A lease ended: it was given back, ran out, or its worker was sent away."""

    worker_id: str
    epoch: int
    eviction_cause: str | None = None
    """None if it was not sent away."""
    block_seconds: float | None = None
    """For how long from then on nobody may join under its name; None: not blocked."""
    request_id: str = ""


class Judgement(NamedTuple):
    """A contribution, and what it did to its worker's lease."""

    worker_id: str
    epoch: int
    sequence: int
    base_step: int
    example_count: int
    loss: float | None
    staleness: int
    norm: float | None
    """Of the gradient; None if it is not finite."""
    is_outlier: bool
    clock: int
    """The lease's, afterwards."""
    bad_count: int
    """The lease's, afterwards."""

    @property
    def identity(self) -> tuple[str, int, int]:
        """Which contribution it is: worker, epoch and sequence."""
        return self.worker_id, self.epoch, self.sequence

    @classmethod
    def of_held(cls, header: ContributionHeader, staleness: int) -> "Judgement":
        """That of a contribution which is held already: what it did to the lease is known."""
        return cls(
            *header.identity,
            base_step=header.base_step,
            example_count=header.example_count,
            loss=header.loss,
            staleness=staleness,
            norm=None,
            is_outlier=False,
            clock=0,
            bad_count=0,
        )


class Held(NamedTuple):
    """A contribution is held in the open round, and its worker knows. The payload is its gradient."""

    judgement: Judgement


class Rejected(NamedTuple):
    """A contribution was rejected, on arrival or with the round that held it."""

    judgement: Judgement
    result: PushResult
    is_for_values: bool = False
    """Whether the gradient itself was unfit: then the open round does not wait for its worker."""


class Stepped(NamedTuple):
    """A round became a step. The payload is what was applied: the gradient of the round, float32."""

    step: int
    reason: str
    """What closed the round."""
    judgements: tuple[Judgement, ...]
    """All contributions of the round."""
    loss: float | None
    loss_example_count: int
    """The examples that the loss is the mean of."""
    values: tuple[StepValues, ...]
    """The hyperparameters that it was made with, for each parameter group."""


class Updated(NamedTuple):
    """Someone changed the live run. What is None stayed."""

    request_id: str
    step: int
    """The next step then: the first that is made with it."""
    group: str = ""
    hyperparameters: Change | None = None
    policy: Policy | None = None
    admission: Admission | None = None


class Ticked(NamedTuple):
    """Someone ticked a schedule by hand."""

    request_id: str
    group: str
    tick: int
    """The ticks so far, with this one."""


class Restored(NamedTuple):
    """The run goes on from one of its checkpoints."""

    request_id: str
    checkpoint_id: str
    step: int


Commit = Created | Joined | Ended | Held | Rejected | Stepped | Updated | Ticked | Restored

CommitKind = Literal["Created", "Joined", "Ended", "Held", "Rejected", "Stepped", "Updated", "Ticked", "Restored"]
