"""What callers are told of their contributions: once it is known, and as durable as the run's level asks for."""

from kedge.policies import Buffered
from kedge_server.core.commits import Held
from kedge_server.core.coordinator import Coordinator
from kedge_server.core.values import PushResult
from kedge_server.engine.clock import Clock
from kedge_server.engine.contributions import PendingContribution
from kedge_server.engine.durability import RunStore
from kedge_server.engine.held import HeldBuffers
from kedge_server.engine.waiting import within


class Outcomes:
    """The results of one run's contributions. Belongs to one loop.

    Args:
        coordinator: decides on them.
        store: what keeps the run.
        held: the gradients that storage has, too.
        clock: the time.
    """

    def __init__(self, coordinator: Coordinator, store: RunStore, held: HeldBuffers, clock: Clock) -> None:
        self._coordinator = coordinator
        self._store = store
        self._held = held
        self._clock = clock

    async def result(self, contribution: PendingContribution, wait_seconds: float | None) -> PushResult:
        """What became of a contribution, after waiting so long for its round to close; None waits without end.

        Raises:
            KedgeError: STORAGE_FULL or STORAGE_UNAVAILABLE: it is recorded, but that cannot be acknowledged now.
        """
        if contribution.result is not None:
            if contribution.result.outcome != "applied":
                await self._store.acknowledge()
            return contribution.result
        if contribution.is_held:
            is_buffered = isinstance(self._coordinator.policy, Buffered)
            await within(contribution.closed, 0 if is_buffered else wait_seconds)
        if contribution.is_held and not contribution.outcome.done():
            deferred = self._deferred(contribution)
            self._keep(contribution)
            await self._store.acknowledge()
            return deferred
        outcome = contribution.outcome
        await self._store.until(outcome)
        result = outcome.result()
        if result.outcome != "applied":
            await self._store.acknowledge()
        return result

    def _keep(self, contribution: PendingContribution) -> None:
        """Has a contribution stored by itself, because its worker is told that it is held and need not come again."""
        if not contribution.is_kept:
            contribution.is_kept = True
            assert contribution.judgement is not None, "what is held was judged"
            self._held.take_over(contribution)
            self._store.commit(Held(contribution.judgement), [contribution.gradient.array])

    def _deferred(self, contribution: PendingContribution) -> PushResult:
        """What is said of a contribution whose round is open.

        Raises:
            KedgeError: WORKER_EVICTED, to a worker that is not to wait for it any more.
        """
        header = contribution.header
        self._coordinator.require_not_evicted(header.worker_id, header.epoch)
        decision = self._coordinator.decide(self._clock.now())
        return PushResult(
            header.sequence,
            "deferred",
            decision.reason,
            f"the contribution is held in a round that is still open; {decision.required_count} contributions close it",
            self._coordinator.closed_step,
            contribution.staleness,
        )
