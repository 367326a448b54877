"""The values that pass between the layers."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

Outcome = Literal["applied", "rejected", "deferred"]


class PushResult(NamedTuple):
    """What became of a contribution, and why."""

    sequence: int
    outcome: Outcome
    reason: str
    """For a rejected one a reason of the catalogue; else what closed the round, or keeps it open."""
    message: str
    step: int
    """The step that it went into, or the run's step."""
    staleness: int


@dataclass(frozen=True, kw_only=True)
class ContributionHeader:
    """What a worker says of a contribution before its gradient comes."""

    worker_id: str
    epoch: int
    sequence: int
    base_step: int
    manifest_digest: bytes
    example_count: int
    loss: float | None
