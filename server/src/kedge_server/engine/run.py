"""One run alive: its coordinator, its open round, and the queue to its writer.

A contribution goes through `submit`: admission, round, queue, update, result. The coordinator decides and never
computes; the writer computes and never decides; this stands between them, and lets callers wait. Invariants: the
coordinator's `closed_step` counts rounds closed and `snapshot.step` those applied, and the first is never behind the
second; every contribution in a closed round gets its result after its step is applied.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import structlog

from kedge.optim import Group, Optimizer
from kedge.optim.controls import Change, RateState, RecordedChange, StepValues
from kedge.policies import Admission, Policy
from kedge.wire.errors import KedgeError
from kedge.wire.manifest import Manifest
from kedge_server.core import rounds
from kedge_server.core.admission import Inspection
from kedge_server.core.contributions import Contribution, Round
from kedge_server.core.coordinator import Bounds, Coordinator
from kedge_server.core.leases import Lease
from kedge_server.core.values import ContributionHeader, PushResult
from kedge_server.engine.clock import Clock
from kedge_server.engine.contributions import PendingContribution
from kedge_server.engine.device import DeviceThread, Writer
from kedge_server.engine.feed import Feed
from kedge_server.engine.publication import OPEN, Publication
from kedge_server.engine.snapshots import Snapshot, Weights
from kedge_server.engine.staging import StagingBuffer
from kedge_server.engine.tuning import Answers, Tuning
from kedge_server.engine.waiting import within

_log = structlog.get_logger("kedge.run")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What a run is created with, and stays."""

    name: str
    manifest: Manifest
    optimizer: Optimizer
    groups: tuple[Group, ...] = ()
    created_at_seconds: float
    """Seconds since the epoch."""
    request_id: str


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


class RunEngine:
    """A run. Belongs to the loop that it was made on.

    Args:
        config: what it is.
        writer: its state on the device.
        snapshot: the weights of step 0.
        policy: how contributions become steps.
        admission: which gradients are taken.
        device: the thread that the writer runs on.
        clock: the time.
        bounds: what bounds it.
        kept_events: how many events are kept for those who watch.
        first_epoch: greater than any epoch that an earlier run of the same name granted.
    """

    def __init__(
        self,
        config: RunConfig,
        writer: Writer,
        snapshot: Snapshot,
        *,
        policy: Policy,
        admission: Admission,
        device: DeviceThread,
        clock: Clock,
        bounds: Bounds,
        kept_events: int,
        first_epoch: int,
    ) -> None:
        self.config = config
        self._writer = writer
        self._device = device
        self._clock = clock
        self._publication = Publication(config.name, snapshot, clock)
        self.feed = Feed(config.name, kept_events, lambda: self.snapshot.step)
        self._coordinator = Coordinator(
            config.name,
            digest=config.manifest.digest,
            policy=policy,
            admission=admission,
            bounds=bounds,
            first_epoch=first_epoch,
            tell=self.feed.tell,
        )
        self._tuning = Tuning(config.name, config.optimizer.spec(), config.groups)
        self._updates: Answers[int] = Answers()
        self._ticks: Answers[RateState] = Answers()
        self._evictions: Answers[None] = Answers()
        self._queue: deque[tuple[Round, tuple[StepValues, ...]]] = deque()
        self._applying: asyncio.Task[None] | None = None
        self._gate: object = None
        self._end: KedgeError | None = None
        self._timer_at_seconds: float | None = None
        self._cancel_timer: Callable[[], None] = lambda: None

    @property
    def snapshot(self) -> Snapshot:
        """The weights of the newest applied step."""
        return self._publication.snapshot

    @property
    def policy(self) -> Policy:
        """How contributions become steps."""
        return self._coordinator.policy

    @property
    def admission(self) -> Admission:
        """Which gradients are taken."""
        return self._coordinator.admission

    # Membership

    def join(self, worker_id: str, *, epoch: int, duration_seconds: float) -> Lease:
        """Grants a lease.

        Raises:
            KedgeError: TOO_MANY_WORKERS or WORKER_EVICTED.
        """
        self._require_alive()
        lease = self._coordinator.join(
            worker_id, epoch=epoch, duration_seconds=duration_seconds, now_seconds=self._clock.now()
        )
        self._follow()
        return lease

    def heartbeat(self, worker_id: str, epoch: int) -> Lease:
        """Renews a lease.

        Raises:
            KedgeError: WORKER_NOT_FOUND, LEASE_EXPIRED, WORKER_SUPERSEDED or WORKER_EVICTED.
        """
        self._require_alive()
        try:
            return self._coordinator.heartbeat(worker_id, epoch, self._clock.now())
        finally:
            self._follow()

    def leave(self, worker_id: str, epoch: int) -> None:
        """Ends a lease."""
        self._coordinator.leave(worker_id, epoch, self._clock.now())
        self._follow()

    def evict(self, worker_id: str, cause: str, block_seconds: float | None, *, request_id: str) -> None:
        """Ends a worker's lease from outside, once for each request; nobody may join under its name for so long.

        Raises:
            KedgeError: WORKER_NOT_FOUND if it holds no lease.
        """
        self._require_alive()
        self._evictions.answer(request_id, lambda: self._evict(worker_id, cause, block_seconds))

    def _evict(self, worker_id: str, cause: str, block_seconds: float | None) -> None:
        lease = self._coordinator.evict(worker_id, cause, block_seconds=block_seconds, now_seconds=self._clock.now())
        for contribution in self._coordinator.held:
            if (contribution.header.worker_id, contribution.header.epoch) == (worker_id, lease.epoch):
                _pending(contribution).closed.set()  # its worker is to hear of it
        self._follow()

    # Changes

    def update(self, update: RunUpdate, *, request_id: str) -> int:
        """Changes a live run, once for each request. Rounds that are closed keep what they closed with.

        Returns:
            The next step to be made.

        Raises:
            KedgeError: INVALID_CONFIGURATION; then nothing has changed.
        """
        self._require_alive()
        return self._updates.answer(request_id, lambda: self._update(update))

    def _update(self, update: RunUpdate) -> int:
        if update.hyperparameters is not None:
            self._tuning.change(update.group, update.hyperparameters, step=self._coordinator.closed_step + 1)
        if update.admission is not None:
            self._coordinator.set_admission(update.admission)
        if update.policy is not None:
            self._coordinator.set_policy(update.policy, self._clock.now())
            self._follow()
        return self._coordinator.closed_step + 1

    def tick_schedule(self, group: str, to: int | None, *, request_id: str) -> RateState:
        """Ticks a schedule by hand, once for each request.

        Raises:
            KedgeError: INVALID_CONFIGURATION.
        """
        self._require_alive()
        return self._ticks.answer(request_id, lambda: self._tuning.tick(group, to))

    # Contributions

    def check(self, header: ContributionHeader) -> None:
        """Checks a contribution while its gradient is received, so that what cannot be taken is not carried on.

        Raises:
            KedgeError: see `Coordinator.check`.
        """
        self._require_alive()
        try:
            self._coordinator.check(header, self._clock.now())
        finally:
            self._follow()

    def submit(
        self, header: ContributionHeader, gradient: StagingBuffer, inspection: Inspection
    ) -> PendingContribution:
        """Takes a contribution that has arrived whole: this is the commit point. Owns the buffer from now on.

        Returns:
            The contribution, or the one that was recorded before under the same sequence.

        Raises:
            KedgeError: see `Coordinator.submit`.
        """
        contribution = PendingContribution(header, gradient)
        try:
            self._require_alive()
            taken = self._coordinator.submit(contribution, inspection, self._clock.now())
        except KedgeError:
            contribution.release()
            raise
        finally:
            self._follow()
        if taken is not contribution:
            contribution.release()
        return _pending(taken)

    async def result(self, contribution: PendingContribution, wait_seconds: float | None) -> PushResult:
        """What became of a contribution, after waiting so long for its round to close; None waits without end."""
        if contribution.result is not None:
            return contribution.result
        is_buffered = self._coordinator.decide(self._clock.now()).reason == "BUFFERED"
        if contribution.is_held:
            await within(contribution.closed, 0 if is_buffered else wait_seconds)
        if contribution.is_held and self._end is None:
            return self._deferred(contribution)
        return await asyncio.shield(contribution.outcome)

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

    # Reading

    async def snapshot_for(self, worker_id: str | None, *, min_step: int, wait_seconds: float | None) -> Snapshot:
        """The weights that a pull is answered with: the newest ones, once they are of this step or a later one.

        Args:
            worker_id: the worker that is to go on with them, and may have to wait for others; None if none is.
            min_step: the least step.
            wait_seconds: how long to wait; None waits without end.

        Raises:
            KedgeError: STEP_NOT_REACHED, WAITING_FOR_SLOWEST, or what ended the run.
        """
        return await self._publication.read(
            lambda: OPEN if worker_id is None else self._coordinator.pull_gate(worker_id),
            min_step=min_step,
            wait_seconds=wait_seconds,
        )

    def serves(self, step: int) -> bool:
        """Whether pulls are still answered with the weights of this step."""
        return self._publication.serves(step)

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
        now, coordinator = self._clock.now(), self._coordinator
        leases = coordinator.leases.live
        return RunState(
            step=self.snapshot.step,
            lookahead_sync_count=self.snapshot.lookahead_sync_count,
            learning_rate=self._tuning.controls.learning_rate,
            leases=leases,
            lease_remaining_seconds=[max(0.0, lease.expires_at_seconds - now) for lease in leases],
            contribution_count=len(coordinator.held),
            required_count=coordinator.decide(now).required_count,
            applied_count=coordinator.applied_count,
            rejected_counts=dict(coordinator.rejected_counts),
            loss=coordinator.loss,
            changes=self._tuning.controls.changes,
            waiting_for=coordinator.waiting_for(),
        )

    # The end

    def end(self, error: KedgeError) -> None:
        """Ends the run: whatever waits in it fails with this error, and whatever comes later."""
        if self._end is not None:
            return
        self._end = error
        self._cancel_timer()
        _fail(self._coordinator.held, error)
        self._publication.end(error)
        self.feed.end(error)

    async def drain(self) -> None:
        """Returns when every closed round has been applied."""
        while self._applying is not None:
            await asyncio.wait([self._applying])

    def _require_alive(self) -> None:
        if self._end is not None:
            raise self._end.with_traceback(None)

    # What follows a change

    def _follow(self) -> None:
        """Does what the coordinator's decisions ask for: rounds to the writer, waiting pulls, the timer."""
        if self._end is not None:
            return
        for closed in self._coordinator.take_closed():
            self._queue.append((closed, self._tuning.next_step(*closed.loss())))
        if self._queue and self._applying is None:
            self._applying = asyncio.create_task(self._apply_closed_rounds())
        self._look_at_gates()
        if self._timer_at_seconds != self._coordinator.due_at_seconds:
            self._set_timer(self._coordinator.due_at_seconds)

    def _set_timer(self, at_seconds: float | None) -> None:
        self._cancel_timer()
        self._timer_at_seconds = at_seconds
        self._cancel_timer = lambda: None
        if at_seconds is not None:
            self._cancel_timer = self._clock.call_at(at_seconds, self._on_timer)

    def _on_timer(self) -> None:
        self._timer_at_seconds = None
        self._coordinator.advance(self._clock.now())
        self._follow()

    def _look_at_gates(self) -> None:
        coordinator = self._coordinator
        self._publication.keep_barrier(coordinator.barrier_step, is_wanted=coordinator.is_lockstep)
        leases = coordinator.leases
        gate = (coordinator.policy, coordinator.barrier_step, coordinator.slowest_clock, leases.change_count)
        if gate != self._gate:
            self._gate = gate
            self._publication.open_gates()

    # The writer

    async def _apply_closed_rounds(self) -> None:
        try:
            while self._queue:
                await self._apply(*self._queue.popleft())
        except Exception as error:
            _log.exception("update failed", run=self.config.name, step=self.snapshot.step + 1)
            self._end_failed(error)
        finally:
            self._applying = None

    async def _apply(self, closed: Round, values: tuple[StepValues, ...]) -> None:
        held = closed.in_order()
        factors = rounds.factors([c.header.example_count for c in held], [c.staleness for c in held], closed.policy)
        gradients = [_pending(c).gradient.array for c in held]
        combine = rounds.combination(closed.policy, len(held))
        sync_count = self.snapshot.lookahead_sync_count
        try:
            snapshot = await self._device.run(self._writer.apply, gradients, factors, values, combine)
        except BaseException as error:
            _fail(held, _run_failed(self.config.name, error))
            raise
        self._publication.publish(snapshot)
        self._coordinator.applied(closed, is_lookahead_sync=snapshot.lookahead_sync_count > sync_count)
        self._follow()

    def _end_failed(self, error: BaseException) -> None:
        failure = _run_failed(self.config.name, error)
        for closed, _ in self._queue:
            _fail(closed.contributions, failure)
        self._queue.clear()
        self.end(failure)


def _pending(contribution: Contribution) -> PendingContribution:
    assert isinstance(contribution, PendingContribution), "the coordinator has what came through `submit`"
    return contribution


def _fail(contributions: Iterable[Contribution], error: KedgeError) -> None:
    for contribution in contributions:
        _pending(contribution).fail(error)


def _run_failed(run: str, error: BaseException) -> KedgeError:
    return KedgeError(
        "RUN_FAILED",
        f"an update of {run} failed ({type(error).__name__}); its optimizer state is lost: "
        "pull the weights of its last step, and create it anew",
        run=run,
    )
