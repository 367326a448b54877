"""One run alive: its leases, its open round, its ledger, and the queue to its writer.

A contribution goes through `submit`: admission, round, queue, update, result. The loop decides and never computes; the
writer computes and never decides. Invariants: `closed_step` counts rounds closed and `snapshot.step` those applied, and
the first is never behind the second; every contribution in a closed round gets its result after its step is applied.
"""

import asyncio
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import structlog

from kedge.optim import Group, Optimizer
from kedge.optim.controls import Change, RateState, RecordedChange
from kedge.policies import Policy
from kedge.wire.errors import KedgeError
from kedge.wire.manifest import Manifest
from kedge_server.core import admission, rounds
from kedge_server.core.values import ContributionHeader, PushResult
from kedge_server.engine.clock import Clock
from kedge_server.engine.contributions import Contribution, Round
from kedge_server.engine.device import DeviceThread, Writer
from kedge_server.engine.leases import Lease, LeaseTable
from kedge_server.engine.snapshots import Snapshot, Weights
from kedge_server.engine.staging import StagingBuffer
from kedge_server.engine.tuning import Tuning

_log = structlog.get_logger("kedge.run")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What a run is created with, and stays."""

    name: str
    manifest: Manifest
    optimizer: Optimizer
    policy: Policy
    groups: tuple[Group, ...] = ()
    created_at_seconds: float
    """Seconds since the epoch."""
    request_id: str


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


class RunEngine:
    """A run. Belongs to the loop that it was made on.

    Args:
        config: what it is.
        writer: its state on the device.
        snapshot: the weights of step 0.
        device: the thread that the writer runs on.
        clock: the time.
        worker_limit: how many workers may hold a lease.
        first_epoch: greater than any epoch that an earlier run of the same name granted.
    """

    def __init__(
        self,
        config: RunConfig,
        writer: Writer,
        snapshot: Snapshot,
        *,
        device: DeviceThread,
        clock: Clock,
        worker_limit: int,
        first_epoch: int,
    ) -> None:
        self.config = config
        self.snapshot = snapshot
        self.closed_step = snapshot.step
        self._writer = writer
        self._device = device
        self._clock = clock
        self._leases = LeaseTable(config.name, worker_limit=worker_limit, first_epoch=first_epoch)
        self._tuning = Tuning(config.name, config.optimizer.spec(), config.groups)
        self._is_formed = False
        self._round = Round()
        self._queue: deque[Round] = deque()
        self._applying: asyncio.Task[None] | None = None
        self._advanced = asyncio.Event()
        self._end: KedgeError | None = None
        self._cancel_timer: Callable[[], None] = lambda: None
        self._applied_count = 0
        self._rejected_counts: Counter[str] = Counter()
        self._loss: float | None = None

    # Membership

    def join(self, worker_id: str, *, epoch: int, duration_seconds: float) -> Lease:
        """Grants a lease.

        Raises:
            KedgeError: TOO_MANY_WORKERS.
        """
        self._require_alive()
        lease = self._leases.join(
            worker_id, epoch=epoch, duration_seconds=duration_seconds, now_seconds=self._clock.now()
        )
        _log.info("worker joined", run=self.config.name, worker=worker_id, epoch=epoch, live=len(self._leases))
        self._look_again()
        return lease

    def heartbeat(self, worker_id: str, epoch: int) -> Lease:
        """Renews a lease.

        Raises:
            KedgeError: WORKER_NOT_FOUND, LEASE_EXPIRED or WORKER_SUPERSEDED.
        """
        self._require_alive()
        self._expire_leases()
        lease = self._leases.find(worker_id, epoch)
        self._leases.require_live(lease)
        self._leases.renew(lease, self._clock.now())
        self._look_again()
        return lease

    def leave(self, worker_id: str, epoch: int) -> None:
        """Ends a lease."""
        if self._leases.leave(worker_id, epoch):
            _log.info("worker left", run=self.config.name, worker=worker_id, epoch=epoch, live=len(self._leases))
            self._look_again()

    # Hyperparameters

    def set_hyperparameters(self, group: str, change: Change, *, request_id: str) -> int:
        """Changes what the rounds that close from now on are applied with, once for each request.

        Returns:
            The next step to be made, which is made with it.

        Raises:
            KedgeError: INVALID_CONFIGURATION.
        """
        self._require_alive()
        return self._tuning.change(group, change, step=self.closed_step + 1, request_id=request_id)

    def tick_schedule(self, group: str, to: int | None, *, request_id: str) -> RateState:
        """Ticks a schedule by hand, once for each request.

        Raises:
            KedgeError: INVALID_CONFIGURATION.
        """
        self._require_alive()
        return self._tuning.tick(group, to, request_id=request_id)

    # Contributions

    def check(self, header: ContributionHeader) -> None:
        """Checks a contribution while its gradient is received, so that what cannot be taken is not carried on.

        That it is on its way is a sign of life: it renews the lease.

        Raises:
            KedgeError: see `core.admission.check_header`, `LeaseTable.find`, `Ledger.find`.
        """
        self._require_alive()
        lease = self._leases.find(header.worker_id, header.epoch)
        if lease.ledger.find(header.sequence) is None:
            self._require_takeable(lease, header)
            self._leases.renew(lease, self._clock.now())

    def submit(
        self, header: ContributionHeader, gradient: StagingBuffer, inspection: admission.Inspection
    ) -> Contribution:
        """Takes a contribution that has arrived whole: this is the commit point. Owns the buffer from now on.

        Returns:
            The contribution, or the one that was recorded before under the same sequence.

        Raises:
            KedgeError: see `check`.
        """
        try:
            self._require_alive()
            self._expire_leases()
            lease = self._leases.find(header.worker_id, header.epoch)
            known = lease.ledger.find(header.sequence)
            if known is None:
                self._require_takeable(lease, header)
                return self._take(lease, header, gradient, inspection)
        except KedgeError:
            gradient.release()
            raise
        gradient.release()
        return known

    async def result(self, contribution: Contribution, wait_seconds: float | None) -> PushResult:
        """What became of a contribution, after waiting so long for its round to close; None waits without end."""
        waiting_in = contribution.round
        if (
            waiting_in is not None
            and not waiting_in.closed.is_set()
            and not await _within(waiting_in.closed, wait_seconds)
        ):
            return PushResult(
                contribution.header.sequence,
                "deferred",
                "WAITING_FOR_QUORUM",
                "the contribution is held in a round that is still open; "
                f"{self._decide().required_count} contributions close it",
                self.closed_step,
                contribution.staleness,
            )
        return await asyncio.shield(contribution.result)

    # Reading

    async def wait_for_step(self, min_step: int, wait_seconds: float | None) -> Snapshot:
        """The newest snapshot, once it is of this step or a later one.

        Raises:
            KedgeError: STEP_NOT_REACHED, or what ended the run.
        """
        deadline = None if wait_seconds is None else self._clock.now() + wait_seconds
        while self.snapshot.step < min_step:
            self._require_alive()
            remaining = None if deadline is None else deadline - self._clock.now()
            if not await _within(self._advanced, remaining):
                raise KedgeError(
                    "STEP_NOT_REACHED",
                    f"{self.config.name} is at step {self.snapshot.step} and did not reach step {min_step} in time",
                    step=self.snapshot.step,
                    min_step=min_step,
                )
        return self.snapshot

    def require_weights(self, weights: Weights) -> None:
        """Refuses slow weights where there are none.

        Raises:
            KedgeError: NO_SLOW_WEIGHTS.
        """
        if weights != "fast" and self.snapshot.slow is None:
            raise KedgeError(
                "NO_SLOW_WEIGHTS",
                f"{self.config.name} has no Lookahead, so no slow weights: pull the fast ones",
                run=self.config.name,
            )

    def state(self) -> RunState:
        """Where the run stands now."""
        now = self._clock.now()
        leases = self._leases.live
        return RunState(
            step=self.snapshot.step,
            lookahead_sync_count=self.snapshot.lookahead_sync_count,
            learning_rate=self._tuning.controls.learning_rate,
            leases=leases,
            lease_remaining_seconds=[max(0.0, lease.expires_at_seconds - now) for lease in leases],
            contribution_count=len(self._round.contributions),
            required_count=self._decide().required_count,
            applied_count=self._applied_count,
            rejected_counts=dict(self._rejected_counts),
            loss=self._loss,
            changes=self._tuning.controls.changes,
            waiting_for=rounds.waiting_for(self._facts(), self.config.policy),
        )

    def end(self, error: KedgeError) -> None:
        """Ends the run: whatever waits in it fails with this error, and whatever comes later."""
        if self._end is not None:
            return
        self._end = error
        self._cancel_timer()
        for contribution in self._round.contributions:
            contribution.fail(error)
            contribution.release()
        self._round.closed.set()
        self._advanced.set()

    async def drain(self) -> None:
        """Returns when every closed round has been applied."""
        while self._applying is not None:
            await asyncio.wait([self._applying])

    # The round

    def _require_alive(self) -> None:
        if self._end is not None:
            raise self._end.with_traceback(None)

    def _require_takeable(self, lease: Lease, header: ContributionHeader) -> None:
        self._leases.require_live(lease)
        admission.check_header(header, manifest_digest=self.config.manifest.digest, step=self.closed_step)

    def _take(
        self, lease: Lease, header: ContributionHeader, gradient: StagingBuffer, inspection: admission.Inspection
    ) -> Contribution:
        contribution = Contribution(
            header, self.closed_step - header.base_step, asyncio.get_running_loop().create_future(), gradient=gradient
        )
        standing = admission.Standing(self.closed_step, self._has_contributed(header.worker_id))
        rejection = admission.judge(header, standing=standing, policy=self.config.policy, inspection=inspection)
        lease.ledger.record(header.sequence, contribution)
        lease.last_staleness, lease.last_loss = contribution.staleness, header.loss
        self._leases.renew(lease, self._clock.now())
        if rejection is not None:
            self._reject(lease, contribution, rejection)
        else:
            self._add_to_round(contribution)
        return contribution

    def _reject(self, lease: Lease, contribution: Contribution, rejection: admission.Rejection) -> None:
        contribution.release()
        lease.rejected_count += 1
        self._rejected_counts[rejection.reason] += 1
        contribution.settle(
            PushResult(
                contribution.header.sequence,
                "rejected",
                rejection.reason,
                rejection.message,
                self.closed_step,
                contribution.staleness,
            )
        )

    def _add_to_round(self, contribution: Contribution) -> None:
        if not self._round.contributions:
            self._round.opened_at_seconds = self._clock.now()
        contribution.round = self._round
        self._round.contributions.append(contribution)
        self._look_again()

    def _has_contributed(self, worker_id: str) -> bool:
        return any(held.header.worker_id == worker_id for held in self._round.contributions)

    def _facts(self) -> rounds.RoundFacts:
        contributors = {held.header.worker_id for held in self._round.contributions}
        return rounds.RoundFacts(
            contribution_count=len(self._round.contributions),
            opened_at_seconds=self._round.opened_at_seconds,
            live_count=len(self._leases),
            awaited_count=sum(lease.worker_id not in contributors for lease in self._leases.live),
            is_formed=self._is_formed,
        )

    def _decide(self) -> rounds.Decision:
        return rounds.decide(self._clock.now(), self._facts(), self.config.policy)

    def _look_again(self) -> None:
        """Does what time, membership and contributions have made due, and sets the timer for what comes next."""
        if self._end is not None:
            return
        self._expire_leases()
        self._is_formed = rounds.is_formed(self._is_formed, len(self._leases), self.config.policy)
        decision = self._decide()
        if decision.close and self._round.contributions:
            self._close_round(decision.reason)
            decision = self._decide()
        moments = [at for at in (self._leases.next_expiry_seconds, decision.look_again_at_seconds) if at is not None]
        self._cancel_timer()
        if moments:
            self._cancel_timer = self._clock.call_at(min(moments), self._look_again)

    def _expire_leases(self) -> None:
        for lease in self._leases.expire(self._clock.now()):
            _log.warning(
                "lease expired", run=self.config.name, worker=lease.worker_id, epoch=lease.epoch, live=len(self._leases)
            )

    def _close_round(self, reason: str) -> None:
        self._round.close_reason = reason
        told = [c.header for c in self._round.contributions if c.header.loss is not None]
        loss = rounds.mean_loss([(header.loss, header.example_count) for header in told])
        self._round.values = self._tuning.next_step(loss, sum(header.example_count for header in told))
        self.closed_step += 1
        self._queue.append(self._round)
        self._round.closed.set()
        self._round = Round()
        if self._applying is None:
            self._applying = asyncio.create_task(self._apply_closed_rounds())

    async def _apply_closed_rounds(self) -> None:
        try:
            while self._queue:
                await self._apply(self._queue.popleft())
        except Exception as error:
            self._fail(error)
            _log.exception("update failed", run=self.config.name, step=self.snapshot.step + 1)
        finally:
            self._applying = None

    async def _apply(self, closed: Round) -> None:
        # In the order of the workers' names, so that the sum does not depend on who came first.
        held = sorted(closed.contributions, key=lambda c: c.header.worker_id)
        factors = rounds.mean_weights(
            [c.header.example_count for c in held], [c.staleness for c in held], self.config.policy
        )
        gradients = [c.gradient.array for c in held if c.gradient is not None]
        try:
            self.snapshot = await self._device.run(self._writer.apply, gradients, factors, closed.values)
        except BaseException as error:
            for contribution in held:
                contribution.fail(_run_failed(self.config.name, error))
            raise
        finally:
            for contribution in held:
                contribution.release()
        self._publish(held, closed.close_reason)

    def _publish(self, held: list[Contribution], reason: str) -> None:
        step = self.snapshot.step
        self._applied_count += len(held)
        self._loss = rounds.mean_loss([(c.header.loss, c.header.example_count) for c in held])
        for c in held:
            self._leases.count_applied(c.header.worker_id, c.header.epoch)
            c.settle(PushResult(c.header.sequence, "applied", reason, f"part of step {step}", step, c.staleness))
        advanced, self._advanced = self._advanced, asyncio.Event()
        advanced.set()

    def _fail(self, error: BaseException) -> None:
        failure = _run_failed(self.config.name, error)
        for closed in self._queue:
            for contribution in closed.contributions:
                contribution.fail(failure)
                contribution.release()
        self._queue.clear()
        self.end(failure)


def _run_failed(run: str, error: BaseException) -> KedgeError:
    return KedgeError(
        "RUN_FAILED",
        f"an update of {run} failed ({type(error).__name__}); its optimizer state is lost: "
        "pull the weights of its last step, and create it anew",
        run=run,
    )


async def _within(event: asyncio.Event, wait_seconds: float | None) -> bool:
    """Waits for an event at most so long, and says whether it came."""
    if wait_seconds is not None and wait_seconds <= 0:
        return event.is_set()
    try:
        await asyncio.wait_for(event.wait(), wait_seconds)
    except TimeoutError:
        return False
    return True
