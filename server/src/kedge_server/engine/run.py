"""One run alive: its coordinator, its open round, its pipeline, and what keeps it.

A contribution goes through `submit`: admission, round, pipeline, result. The coordinator decides and never computes;
the writer computes and never decides; the store keeps what was decided; this stands between them, and lets callers
wait. Invariants: the coordinator's `closed_step` counts rounds closed and `snapshot.step` those applied, and the first
is never behind the second; every contribution in a closed round gets its result after its step is applied and as
durable as the run's level asks for.
"""

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import structlog

from kedge.optim.controls import Change, RateState, RecordedChange
from kedge.policies import Admission, Policy
from kedge.wire.errors import KedgeError
from kedge_server.core.admission import Inspection
from kedge_server.core.answers import Answers
from kedge_server.core.commits import Commit, Held, Judgement, Restored, Ticked, Updated
from kedge_server.core.contributions import Contribution, Round
from kedge_server.core.coordinator import Bounds, Coordinator
from kedge_server.core.image import HeldKey, RunImage
from kedge_server.core.leases import Lease
from kedge_server.core.stored import Arrays, Capture, CheckpointInfo
from kedge_server.core.values import ContributionHeader, PushResult
from kedge_server.engine.clock import Clock
from kedge_server.engine.contributions import PendingContribution, pending
from kedge_server.engine.device import DeviceThread, Writer
from kedge_server.engine.durability import RunStore
from kedge_server.engine.feed import Feed
from kedge_server.engine.pipeline import Pipeline
from kedge_server.engine.publication import OPEN, Publication
from kedge_server.engine.snapshots import Snapshot, Weights
from kedge_server.engine.staging import StagingBuffer
from kedge_server.engine.tuning import Tuning
from kedge_server.engine.waiting import within

_log = structlog.get_logger("kedge.run")


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


class RunEngine:
    """A run. Belongs to the loop that it was made on.

    Args:
        image: what it is, and where it stands, apart from its weights.
        writer: its state on the device.
        snapshot: the weights of that state.
        store: what keeps it.
        held: the gradients of the contributions that the image holds, owned from now on.
        device: the thread that the writer runs on.
        clock: the time.
        bounds: what bounds it.
        kept_events: how many events are kept for those who watch.
    """

    def __init__(
        self,
        image: RunImage,
        writer: Writer,
        snapshot: Snapshot,
        *,
        store: RunStore,
        held: Mapping[HeldKey, StagingBuffer],
        device: DeviceThread,
        clock: Clock,
        bounds: Bounds,
        kept_events: int,
    ) -> None:
        self.config = config = image.config
        self._store = store
        self._clock = clock
        self._publication = Publication(config.name, snapshot, clock)
        self.feed = Feed(config.name, kept_events, lambda: self.snapshot.step)
        self._coordinator = Coordinator(
            config.name,
            digest=config.manifest.digest,
            policy=image.policy,
            admission=image.admission,
            bounds=bounds,
            first_epoch=config.first_epoch,
            tell=self.feed.tell,
            commit=self._commit,
        )
        self._pipeline = Pipeline(writer, device, store, on_applied=self._on_applied, on_failed=self._on_failed)
        self._tuning = Tuning(config.name, image.controls)
        self._updates = Answers(image.updates.state())
        self._ticks = Answers(image.ticks.state())
        self._evictions = Answers(image.evictions.state())
        self._restores = Answers(image.restores.state())
        self._is_going_back = False
        self._checkpointing: asyncio.Task[None] | None = None
        self._kept_at_end: list[PendingContribution] = []
        self._gate: object = None
        self._end: KedgeError | None = None
        self._timer_at_seconds: float | None = None
        self._cancel_timer: Callable[[], None] = lambda: None
        self._resume(image, held)

    def _resume(self, image: RunImage, held: Mapping[HeldKey, StagingBuffer]) -> None:
        self._coordinator.resume(
            image,
            make=partial(_made_of, held),
            now_seconds=self._clock.now(),
            time_seconds=time.time(),
        )
        if not self._publication.serves(self._coordinator.barrier_step):
            self._coordinator.forget_barrier()
        self._follow()

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
            KedgeError: TOO_MANY_WORKERS or WORKER_EVICTED; STORAGE_FULL or STORAGE_UNAVAILABLE.
        """
        self._require_storable()
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
        self._require_storable()
        self._evictions.answer(request_id, lambda: self._evict(worker_id, cause, block_seconds, request_id))

    def _evict(self, worker_id: str, cause: str, block_seconds: float | None, request_id: str) -> None:
        lease = self._coordinator.evict(
            worker_id, cause, block_seconds=block_seconds, now_seconds=self._clock.now(), request_id=request_id
        )
        for contribution in self._coordinator.held:
            if (contribution.header.worker_id, contribution.header.epoch) == (worker_id, lease.epoch):
                pending(contribution).closed.set()  # its worker is to hear of it
        self._follow()

    # Changes

    def update(self, update: RunUpdate, *, request_id: str) -> int:
        """Changes a live run, once for each request. Rounds that are closed keep what they closed with.

        Returns:
            The next step to be made.

        Raises:
            KedgeError: INVALID_CONFIGURATION; then nothing has changed.
        """
        self._require_storable()
        return self._updates.answer(request_id, lambda: self._update(update, request_id))

    def _update(self, update: RunUpdate, request_id: str) -> int:
        if update.hyperparameters is not None:
            step = self._coordinator.closed_step + 1
            self._tuning.change(update.group, update.hyperparameters, step=step)
            # By itself, since a change of policy may close a round, which is made with these values.
            self._commit(Updated("", step, update.group, update.hyperparameters))
        if update.admission is not None:
            self._coordinator.set_admission(update.admission)
        if update.policy is not None:
            self._coordinator.set_policy(update.policy, self._clock.now())
            self._follow()
        step = self._coordinator.closed_step + 1
        self._commit(Updated(request_id, step, policy=update.policy, admission=update.admission))
        return step

    def tick_schedule(self, group: str, to: int | None, *, request_id: str) -> RateState:
        """Ticks a schedule by hand, once for each request.

        Raises:
            KedgeError: INVALID_CONFIGURATION.
        """
        self._require_storable()
        return self._ticks.answer(request_id, lambda: self._tick(group, to, request_id))

    def _tick(self, group: str, to: int | None, request_id: str) -> RateState:
        rate = self._tuning.tick(group, to)
        self._commit(Ticked(request_id, group, rate.tick))
        return rate

    # Contributions

    def check(self, header: ContributionHeader) -> None:
        """Checks a contribution while its gradient is received, so that what cannot be taken is not carried on.

        Raises:
            KedgeError: see `Coordinator.check`; STORAGE_FULL or STORAGE_UNAVAILABLE.
        """
        self._require_alive()
        try:
            if not self._coordinator.check(header, self._clock.now()):
                self._require_storable()
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
            if not self._coordinator.check(header, self._clock.now()):
                self._require_storable()
            taken = self._coordinator.submit(contribution, inspection, self._clock.now())
        except KedgeError:
            contribution.release()
            raise
        finally:
            self._follow()
        if taken is not contribution:
            contribution.release()
        return pending(taken)

    async def result(self, contribution: PendingContribution, wait_seconds: float | None) -> PushResult:
        """What became of a contribution, after waiting so long for its round to close; None waits without end.

        Raises:
            KedgeError: STORAGE_FULL or STORAGE_UNAVAILABLE: it is recorded, but that cannot be acknowledged now.
        """
        if contribution.result is not None:
            if contribution.result.outcome != "applied":
                await self._store.acknowledge()
            return contribution.result
        is_buffered = self._coordinator.decide(self._clock.now()).reason == "BUFFERED"
        if contribution.is_held:
            await within(contribution.closed, 0 if is_buffered else wait_seconds)
        if contribution.is_held and self._end is None:
            deferred = self._deferred(contribution)
            self._keep(contribution)
            await self._store.acknowledge()
            return deferred
        outcome = contribution.outcome
        await self._store.until(outcome)
        return outcome.result()

    def _keep(self, contribution: PendingContribution) -> None:
        """Has a contribution stored by itself, because its worker is told that it is held and need not come again."""
        if not contribution.is_kept:
            contribution.is_kept = True
            assert contribution.judgement is not None, "what is held was judged"
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
            durable_step=self._store.durable_step,
            storage_problem="" if self._store.problem is None else self._store.problem.message,
        )

    # Durability

    @property
    def store(self) -> RunStore:
        """What keeps it."""
        return self._store

    async def acknowledge(self) -> None:
        """Waits until all that was done so far is as durable as the run's level asks for.

        Raises:
            KedgeError: STORAGE_FULL or STORAGE_UNAVAILABLE, at once when it cannot be; it will be when it can.
        """
        await self._store.acknowledge()

    async def checkpoint(self, metrics: Mapping[str, float]) -> CheckpointInfo:
        """Takes a checkpoint, unless there is one of this step and none with metrics is asked for.

        Raises:
            KedgeError: DURABILITY_UNAVAILABLE, STORAGE_FULL or STORAGE_UNAVAILABLE.
        """
        self._require_alive()
        newest = next(iter(self._store.checkpoints()), None)
        if not metrics and newest is not None and newest.step == self.snapshot.step:
            return newest
        return await self._checkpoint(metrics)

    def checkpoint_if_due(self) -> None:
        """Begins to take a checkpoint if it is time for one."""
        if self._checkpointing is None and self._end is None and self._store.checkpoint_is_due():
            self._checkpointing = asyncio.create_task(self._checkpoint_when_due())

    async def restore(self, checkpoint_id: str, *, request_id: str) -> int:
        """Goes on from a checkpoint, once for each request: every lease ends, and the open round is refused.

        Returns:
            Its step.

        Raises:
            KedgeError: CHECKPOINT_NOT_FOUND, CHECKPOINT_DAMAGED, DURABILITY_UNAVAILABLE, STORAGE_FULL or
                STORAGE_UNAVAILABLE; then nothing has changed.
        """
        self._require_storable()
        known = self._restores.find(request_id)
        if known is not None:
            return known
        checkpoint = await self._store.load(checkpoint_id)
        self._is_going_back = True
        try:
            while self._pipeline.is_busy:
                await self._pipeline.drain()
            self._require_alive()
            step = await self._go_back(checkpoint.image, checkpoint.arrays, checkpoint_id, request_id)
        finally:
            self._is_going_back = False
        await self._store.acknowledge()
        return step

    async def _go_back(self, image: RunImage, arrays: Arrays, checkpoint_id: str, request_id: str) -> int:
        self._coordinator.begin_at(image, self._clock.now())
        self._tuning.controls = controls = image.controls
        self._commit(Restored(request_id, checkpoint_id, image.step))
        self._restores.remember(request_id, image.step)
        snapshot = await self._pipeline.do(
            lambda: lambda writer: writer.go_back(arrays, controls.values(), step=image.step)
        )
        self._publication.publish(snapshot)
        self.feed.tell("restored", checkpoint=f"{self.config.name}/checkpoints/{checkpoint_id}")
        self._follow()
        return image.step

    async def _checkpoint(self, metrics: Mapping[str, float]) -> CheckpointInfo:
        info = await self._store.save(self._capture, metrics)
        self.feed.tell("checkpoint", checkpoint=f"{self.config.name}/checkpoints/{info.checkpoint_id}")
        return info

    async def _checkpoint_when_due(self) -> None:
        try:
            await self._checkpoint({})
        except KedgeError as error:
            _log.warning("checkpoint failed; it is tried again", run=self.config.name, cause=error.message)
        finally:
            self._checkpointing = None

    async def _capture(self) -> Capture:
        return await self._pipeline.do(self._begin_capture)

    def _begin_capture(self) -> Callable[[Writer], Capture]:
        image = self._store.image_state()
        leases = self._coordinator.leases
        gradients: dict[HeldKey, np.ndarray] = {}
        for worker_id, epoch, sequence in image.held:
            contribution = leases.find(worker_id, epoch).ledger.find(sequence)
            assert contribution is not None, "what is held is in its ledger"
            gradients[worker_id, epoch, sequence] = pending(contribution).gradient.array

        def capture(writer: Writer) -> Capture:
            return Capture(image, writer.capture(), {key: array.copy() for key, array in gradients.items()})

        return capture

    # The end

    def end(self, error: KedgeError) -> None:
        """Ends the run: whatever waits in it fails with this error, and whatever comes later."""
        if self._end is not None:
            return
        self._end = error
        self._cancel_timer()
        # Storage may be reading these, and a last checkpoint will.
        self._kept_at_end = [held for held in map(pending, self._coordinator.held) if held.is_kept]
        _fail(self._coordinator.held, error)
        self._publication.end(error)
        self.feed.end(error)

    async def drain(self) -> None:
        """Returns when every closed round has been applied."""
        await self._pipeline.drain()

    async def close(self, *, hurry: bool) -> None:
        """Lets storage finish, with a last checkpoint unless it hurries. Only after `end`."""
        await self._pipeline.drain()
        if not hurry and self._store.level != "memory" and self._store.problem is None:
            await self._checkpoint_at_end()
        await self._store.close(hurry=hurry)
        self._release_kept()

    async def delete(self) -> None:
        """Deletes what is stored of it. Only after `end`."""
        await self._store.delete()
        self._release_kept()

    async def _checkpoint_at_end(self) -> None:
        newest = next(iter(self._store.checkpoints()), None)
        if newest is not None and newest.step == self.snapshot.step:
            return
        try:
            await self._store.save(self._capture, {})
        except KedgeError as error:
            _log.warning("no checkpoint at the end", run=self.config.name, cause=error.message)

    def _release_kept(self) -> None:
        for contribution in self._kept_at_end:
            contribution.release()
        self._kept_at_end = []

    def _require_alive(self) -> None:
        if self._end is not None:
            raise self._end.with_traceback(None)

    def _require_storable(self) -> None:
        self._require_alive()
        if self._store.problem is not None:
            raise self._store.problem.with_traceback(None)
        if self._is_going_back:
            raise KedgeError(
                "QUEUE_FULL",
                f"{self.config.name} is going back to a checkpoint: call again after 0.1 s",
                retry_after_seconds=0.1,
                limit=0,
            )

    # What follows a change

    def _follow(self) -> None:
        """Does what the coordinator's decisions ask for: rounds to the writer, waiting pulls, the timer."""
        if self._end is not None:
            return
        for closed in self._coordinator.take_closed():
            self._pipeline.add(closed, self._tuning.next_step(*closed.loss()))
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

    def _commit(self, commit: Commit) -> None:
        self._store.commit(commit)

    # The pipeline

    def _on_applied(self, closed: Round, snapshot: Snapshot) -> None:
        is_sync = snapshot.lookahead_sync_count > self.snapshot.lookahead_sync_count
        self._publication.publish(snapshot)
        self._coordinator.applied(closed, is_lookahead_sync=is_sync)
        self._follow()
        self.checkpoint_if_due()

    def _on_failed(self, rounds: Sequence[Round], error: BaseException) -> None:
        if self._end is None:
            _log.error("update failed", run=self.config.name, step=self.snapshot.step + 1, exc_info=error)
        failure = _run_failed(self.config.name, error)
        for closed in rounds:
            _fail(closed.contributions, failure)
        self.end(failure)


def _made_of(held: Mapping[HeldKey, StagingBuffer], contribution: Contribution) -> Contribution:
    """What the engine keeps of a contribution of an earlier server."""
    header = contribution.header
    if contribution.result is not None:
        return PendingContribution.settled(contribution)
    made = PendingContribution(header, held[header.worker_id, header.epoch, header.sequence])
    made.staleness, made.is_kept = contribution.staleness, True
    made.judgement = Judgement.of_held(header, contribution.staleness)
    return made


def _fail(contributions: Iterable[Contribution], error: KedgeError) -> None:
    for contribution in contributions:
        pending(contribution).fail(error)


def _run_failed(run: str, error: BaseException) -> KedgeError:
    return KedgeError(
        "RUN_FAILED",
        f"an update of {run} failed ({type(error).__name__}); its optimizer state is lost: "
        "pull the weights of its last step, and create it anew",
        run=run,
    )
