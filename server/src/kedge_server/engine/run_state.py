"""What a run is asked to change, and what it says of itself."""

from typing import NamedTuple

from kedge.optim.controls import Change, RecordedChange
from kedge.policies import Admission, Policy
from kedge_server.core.leases import Lease


class RunUpdate(NamedTuple):
    """What changes of a live run. What is None stays."""

    group: str = ""
    hyperparameters: Change | None = None
    """Those of the group."""
    policy: Policy | None = None
    admission: Admission | None = None


class RunState(NamedTuple):
    """Where a run stands."""

    step: int
    lookahead_sync_count: int
    learning_rate: float
    leases: list[Lease]
    lease_remaining_seconds: list[float]
    contribution_count: int
    """Contributions held in the open round."""
    required_count: int
    applied_count: int
    rejected_counts: dict[str, int]
    loss: float | None
    changes: tuple[RecordedChange, ...]
    """Those of the hyperparameters that were made by hand."""
    waiting_for: str
    durable_step: int
    storage_problem: str
