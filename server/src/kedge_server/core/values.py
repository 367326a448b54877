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


@dataclass(frozen=True, kw_only=True, slots=True)
class ContributionHeader:
    """What a worker says of a contribution before its gradient comes."""

    worker_id: str
    epoch: int
    sequence: int
    base_step: int
    manifest_digest: bytes
    example_count: int
    loss: float | None

    @property
    def identity(self) -> tuple[str, int, int]:
        """Which contribution it is: worker, epoch and sequence."""
        return self.worker_id, self.epoch, self.sequence


class Combine(NamedTuple):
    """How a round's contributions are combined."""

    kind: Literal["mean", "trimmed_mean", "median"]
    """mean: the weighted sum. trimmed_mean: the mean of what is left without the least and the greatest values.
    median: the middle value, or the mean of the middle two."""
    trim_count: int = 0
    """The values that a trimmed mean leaves out at each end, of each element."""

    @property
    def required_count(self) -> int:
        """The fewest contributions that it is defined for. How many make it worth its name is not decided here."""
        return 2 * self.trim_count + 1

    def left_out(self, contribution_count: int) -> int:
        """The sorted values that count for nothing at each end."""
        return (contribution_count - 1) // 2 if self.kind == "median" else self.trim_count


MEAN = Combine("mean")
