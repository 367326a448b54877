"""A contribution in the engine: its gradient in a staging buffer, its place in a round, its result to come."""

import asyncio
from dataclasses import dataclass, field

from kedge.optim.controls import StepValues
from kedge_server.core.values import ContributionHeader, PushResult
from kedge_server.engine.staging import StagingBuffer


@dataclass
class Round:
    """The contributions that become one step. Open until `close_reason` is there."""

    contributions: list["Contribution"] = field(default_factory=list)
    opened_at_seconds: float | None = None
    close_reason: str = ""
    closed: asyncio.Event = field(default_factory=asyncio.Event)
    values: tuple[StepValues, ...] = ()
    """The hyperparameters of the step, as they were when it closed."""


@dataclass(eq=False)
class Contribution:
    """One pushed gradient, from its arrival to its result."""

    header: ContributionHeader
    staleness: int
    result: "asyncio.Future[PushResult]"
    round: Round | None = None
    """The round it waits in; None for a rejected one."""
    gradient: StagingBuffer | None = None
    """Its gradient; None when rejected, and once applied."""

    def settle(self, result: PushResult) -> None:
        """Gives everyone who waits the result. The round is let go: the ledger keeps results, not rounds."""
        self.round = None
        if not self.result.done():
            self.result.set_result(result)

    def fail(self, error: Exception) -> None:
        """Gives everyone who waits an error."""
        if not self.result.done():
            self.result.set_exception(error)
            self.result.exception()  # a contribution that nobody waits for is no defect to warn of

    def release(self) -> None:
        """Gives its buffer back."""
        if self.gradient is not None:
            self.gradient.release()
            self.gradient = None
