"""A contribution in the engine: its gradient in a staging buffer, and those who wait for its result."""

import asyncio
from collections.abc import Iterable, Mapping

from kedge.wire.errors import KedgeError
from kedge_server.core.commits import Judgement
from kedge_server.core.contributions import Contribution
from kedge_server.core.image import HeldKey
from kedge_server.core.values import ContributionHeader, PushResult
from kedge_server.engine.staging import StagingBuffer


class PendingContribution(Contribution):
    """One pushed gradient, from its arrival to its result.

    Ledgers keep many that are settled, which therefore hold nothing but what was said of them.

    Args:
        header: what its worker says of it.
        gradient: its gradient, owned from now on; given back when it is rejected, or applied.
    """

    __slots__ = ("_closed", "_gradient", "_is_owner", "_outcome", "is_kept")

    def __init__(self, header: ContributionHeader, gradient: StagingBuffer) -> None:
        super().__init__(header)
        self._closed: asyncio.Event | None = asyncio.Event()
        self._outcome: asyncio.Future[PushResult] | None = asyncio.get_running_loop().create_future()
        self._gradient: StagingBuffer | None = gradient
        self._is_owner = True
        self.is_kept = False
        """Whether storage has it, or will have: because its worker is told that it is held."""

    @classmethod
    def settled(cls, contribution: Contribution) -> "PendingContribution":
        """One of which an earlier server has said what became of it."""
        made = cls.__new__(cls)
        Contribution.__init__(made, contribution.header, contribution.staleness, contribution.result)
        made._closed = made._outcome = made._gradient = None
        made.is_kept, made._is_owner = True, False
        return made

    @property
    def closed(self) -> asyncio.Event:
        """Set when its round is no longer open. It is there until the result is."""
        assert self._closed is not None, "nobody waits for the round of a contribution that is settled"
        return self._closed

    @property
    def outcome(self) -> asyncio.Future[PushResult]:
        """The result, or the error in its place. On the loop only."""
        if self._outcome is not None:
            return self._outcome
        assert self.result is not None, "it was settled"
        settled: asyncio.Future[PushResult] = asyncio.get_running_loop().create_future()
        settled.set_result(self.result)
        return settled

    @property
    def gradient(self) -> StagingBuffer:
        """Its gradient, which is there as long as it is held or being applied."""
        assert self._gradient is not None, "a contribution in a round has its gradient"
        return self._gradient

    def on_closed(self) -> None:
        """Wakes those who wait for its round."""
        self.closed.set()

    def on_result(self, result: PushResult) -> None:
        """Gives everyone who waits the result, and the buffer back."""
        self.release()
        self.closed.set()
        if not self.outcome.done():
            self.outcome.set_result(result)
            self._closed = self._outcome = None  # who waits has them

    def fail(self, error: Exception) -> None:
        """Gives everyone who waits an error, and the buffer back."""
        self.release()
        if self.result is not None:
            return
        self.closed.set()
        if not self.outcome.done():
            self.outcome.set_exception(error)
            self.outcome.exception()  # a contribution that nobody waits for is no defect to warn of

    def release(self) -> None:
        """Gives the buffer back, unless someone else owns it."""
        if self._gradient is not None and self._is_owner:
            self._gradient.release()
        self._gradient = None

    def hand_over(self) -> StagingBuffer:
        """Its buffer, for an owner that gives it back."""
        self._is_owner = False
        return self.gradient


def pending(contribution: Contribution) -> PendingContribution:
    """A contribution that came into the coordinator through the engine, as what it is."""
    assert isinstance(contribution, PendingContribution), "the coordinator has what came through the engine"
    return contribution


def made_of(held: Mapping[HeldKey, StagingBuffer], contribution: Contribution) -> Contribution:
    """What the engine keeps of a contribution of an earlier server.

    Args:
        held: the gradients of those that are held.
        contribution: as the image has it.
    """
    header = contribution.header
    if contribution.result is not None:
        return PendingContribution.settled(contribution)
    made = PendingContribution(header, held[header.identity])
    made.staleness, made.is_kept = contribution.staleness, True
    made.judgement = Judgement.of_held(header, contribution.staleness)
    return made


def fail_all(contributions: Iterable[Contribution], error: KedgeError) -> None:
    """Gives everyone who waits for one of these an error."""
    for contribution in contributions:
        pending(contribution).fail(error)


def run_failed(run: str, error: BaseException) -> KedgeError:
    """What is said of the contributions of a run that an update has ended."""
    return KedgeError(
        "RUN_FAILED",
        f"an update of {run} failed ({type(error).__name__}); its state in memory is lost: start the server anew if "
        "the run is kept on disk; else pull the weights of its last step, and create it anew",
        run=run,
    )


def as_failure(run: str, error: BaseException) -> KedgeError:
    """What is said to those who wait for what will not be: the server's own word, as that it ends, or RUN_FAILED."""
    return error.with_traceback(None) if isinstance(error, KedgeError) else run_failed(run, error)


def going_back(run: str) -> KedgeError:
    """What is said to who comes while a run goes back to a checkpoint."""
    message = f"{run} is going back to a checkpoint: call again after 0.1 s"
    return KedgeError("QUEUE_FULL", message, retry_after_seconds=0.1, limit=0)
