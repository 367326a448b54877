"""How contributions become steps, as plain values: the aggregation policies of a run."""

from dataclasses import KW_ONLY, dataclass
from typing import Literal

__all__ = ["Asynchronous", "Policy", "Synchronous"]


_MAX_SECONDS = 315_576_000_000.0  # what a message can say


@dataclass(frozen=True)
class Synchronous:
    """A step is the mean, weighted by `example_count`, of the first `quorum` contributions, at most one a worker.

    Once `quorum` workers have been alive at one time, a round also closes when every live worker has contributed: a
    lost worker delays it by its lease at most.

    Attributes:
        quorum: the contributions that close a round, >= 1. More workers than that are backup workers.
        timeout_seconds: a round that has a contribution closes after this time with those that it has; None: it waits.
    """

    quorum: int
    _: KW_ONLY
    timeout_seconds: float | None = None

    def __post_init__(self) -> None:
        """Checks every field."""
        if isinstance(self.quorum, bool) or not isinstance(self.quorum, int):
            raise TypeError(f"quorum is {self.quorum!r}: it must be a whole number")
        if not 1 <= self.quorum < 1 << 32:
            raise ValueError(f"quorum is {self.quorum!r}: it must be at least 1")
        if self.timeout_seconds is not None and not (0 < self.timeout_seconds <= _MAX_SECONDS):
            raise ValueError(
                f"timeout_seconds is {self.timeout_seconds!r}: it must be None, or above 0 and at most 10,000 years"
            )


@dataclass(frozen=True)
class Asynchronous:
    """A step is one contribution.

    Attributes:
        max_staleness: a staler contribution is rejected as STALE_GRADIENT; None: no bound.
        scaling: "none", or "inverse": a contribution counts 1 / (1 + staleness).
    """

    max_staleness: int | None = None
    scaling: Literal["none", "inverse"] = "none"

    def __post_init__(self) -> None:
        """Checks every field."""
        if self.max_staleness is not None and not (isinstance(self.max_staleness, int) and self.max_staleness >= 0):
            raise ValueError(
                f"max_staleness is {self.max_staleness!r}: it must be None or a whole number of steps >= 0"
            )
        if self.scaling not in ("none", "inverse"):
            raise ValueError(f"scaling is {self.scaling!r}: it must be 'none' or 'inverse'")


Policy = Synchronous | Asynchronous
