"""One run alive: its coordinator, its open round, its pipeline, and what keeps it.

A contribution goes through `submit`: admission, round, pipeline, result. The coordinator decides and never computes;
the writer computes and never decides; the store keeps what was decided; this stands between them, and lets callers
wait. Invariants: the coordinator's `closed_step` counts rounds closed and `snapshot.step` those applied, and the first
is never behind the second; every contribution in a closed round gets its result after its step is applied and as
durable as the run's level asks for.
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from functools import partial

import structlog

from kedge.optim.controls import RateState
from kedge.policies import Admission, Policy
from kedge.wire.errors import KedgeError
from kedge_server.core.admission import Inspection
from kedge_server.core.answers import Answers
from kedge_server.core.commits import Commit, Rejected, Restored, Ticked, Updated
from kedge_server.core.contributions import Round
from kedge_server.core.coordinator import Bounds, Coordinator
from kedge_server.core.image import HeldKey, RunImage
from kedge_server.core.leases import Lease
from kedge_server.core.stored import Arrays, CheckpointInfo
from kedge_server.core.values import ContributionHeader, PushResult
from kedge_server.engine.checkpointer import Checkpointer
from kedge_server.engine.clock import Alarm, Clock
from kedge_server.engine.contributions import PendingContribution, as_failure, fail_all, going_back, made_of, pending
from kedge_server.engine.device import DeviceThread, Writer
from kedge_server.engine.durability import RunStore
from kedge_server.engine.feed import Feed
from kedge_server.engine.held import HeldBuffers
from kedge_server.engine.lasting import lasting
from kedge_server.engine.outcomes import Outcomes
from kedge_server.engine.pipeline import Pipeline
from kedge_server.engine.publication import OPEN, Publication
from kedge_server.engine.run_state import RunState, RunUpdate
from kedge_server.engine.snapshots import Snapshot, Weights
from kedge_server.engine.staging import StagingBuffer
from kedge_server.engine.tuning import Tuning

_log = structlog.get_logger("kedge.run")


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
        self._held = HeldBuffers(is_stored=store.level != "memory")
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
        self._checkpointer = Checkpointer(store, self._pipeline, self.feed, gradients=self._held.gradients)
        self._outcomes = Outcomes(self._coordinator, store, self._held, clock)
        self._tuning = Tuning(config.name, image.controls)
        self._updates = Answers(image.updates.state())
        self._ticks = Answers(image.ticks.state())
        self._evictions = Answers(image.evictions.state())
        self._restores = Answers(image.restores.state())
        self._is_going_back = False
        self._restoring = asyncio.Lock()
        self._gate: object = None
        self._end: KedgeError | None = None
        self._alarm = Alarm(clock, self._on_timer)
        self._resume(image, held)

    def _resume(self, image: RunImage, held: Mapping[HeldKey, StagingBuffer]) -> None:
        self._coordinator.resume(
            image,
            make=partial(made_of, held),
            now_seconds=self._clock.now(),
            time_seconds=time.time(),
        )
        self._held.take_over_all(self._coordinator.held)
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

    def join(self, worker_id: str, *, epoch: int, duration_seconds: float, owner: str = "") -> Lease:
        """Grants a lease, to be used by this owner only.

        Raises:
            KedgeError: TOO_MANY_WORKERS, WORKER_EVICTED or WRONG_IDENTITY; STORAGE_FULL or STORAGE_UNAVAILABLE.
        """
        self._require_storable()
        lease = self._coordinator.join(
            worker_id, epoch=epoch, duration_seconds=duration_seconds, now_seconds=self._clock.now(), owner=owner
        )
        self._follow()
        return lease

    def require_owner(self, worker_id: str, owner: str, epoch: int | None = None) -> None:
        """Refuses whoever did not join as this worker; see `LeaseTable.require_owner`."""
        self._coordinator.leases.require_owner(worker_id, owner, epoch)

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
        """What became of a contribution; see `Outcomes.result`."""
        return await self._outcomes.result(contribution, wait_seconds)

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
        """Refuses slow weights where there are none; see `Publication.require_weights`."""
        self._publication.require_weights(weights)

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
        """Waits until all that was done so far is as durable as the run's level asks for; see `RunStore`."""
        await self._store.acknowledge()

    async def checkpoint(self, metrics: Mapping[str, float]) -> CheckpointInfo:
        """Takes a checkpoint, unless there is one of this step and none with metrics is asked for.

        Raises:
            KedgeError: DURABILITY_UNAVAILABLE, STORAGE_FULL or STORAGE_UNAVAILABLE.
        """
        self._require_alive()
        return await self._checkpointer.take(metrics)

    def checkpoint_if_due(self) -> None:
        """Begins to take a checkpoint if it is time for one."""
        if self._end is None:
            self._checkpointer.take_if_due()

    async def restore(self, checkpoint_id: str, *, request_id: str) -> int:
        """Goes on from a checkpoint, once for each request: every lease ends, and the open round is refused.

        Returns:
            Its step.

        Raises:
            KedgeError: CHECKPOINT_NOT_FOUND, CHECKPOINT_DAMAGED, DURABILITY_UNAVAILABLE, STORAGE_FULL or
                STORAGE_UNAVAILABLE; then nothing has changed.
        """
        return await lasting(self._restore(checkpoint_id, request_id))

    async def _restore(self, checkpoint_id: str, request_id: str) -> int:
        async with self._restoring:
            known = self._restores.find(request_id)
            if known is None:
                return await self._restore_now(checkpoint_id, request_id)
        await self._store.acknowledge()
        return known

    async def _restore_now(self, checkpoint_id: str, request_id: str) -> int:
        self._require_storable()
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
        if not self._store.keeps_gradients:  # without a journal it is the checkpoint that says where the run stands
            await self._checkpointer.take({})
        return step

    async def _go_back(self, image: RunImage, arrays: Arrays, checkpoint_id: str, request_id: str) -> int:
        self._coordinator.begin_at(image, self._clock.now())
        self._tuning.controls = controls = image.controls
        ticket = self._store.go_back(Restored(request_id, checkpoint_id, image.step), image)
        self._restores.remember(request_id, image.step)
        try:
            snapshot = await self._pipeline.do(
                lambda: lambda writer: writer.go_back(arrays, controls.values(), step=image.step), ticket
            )
        except Exception as error:
            self._on_failed([], error)
            raise as_failure(self.config.name, error) from error
        self._publication.publish(snapshot)
        self.feed.tell("restored", checkpoint=self._store.checkpoint_name(checkpoint_id))
        self._follow()
        return image.step

    # The end

    def end(self, error: KedgeError) -> None:
        """Ends the run: whatever waits in it fails with this error, and whatever comes later."""
        if self._end is not None:
            return
        self._end = error
        self._alarm.set(None)
        fail_all(self._coordinator.held, error)
        self._publication.end(error)
        self.feed.end(error)

    async def drain(self) -> None:
        """Returns when every closed round has been applied."""
        await self._pipeline.drain()

    async def close(self, *, hurry: bool) -> None:
        """Applies what is closed, and lets storage finish, with a last checkpoint; in a hurry neither. After `end`."""
        if not hurry:
            await self.drain()
        await self._checkpointer.finish(hurry=hurry)
        await self._store.close(hurry=hurry)
        self._held.close()

    async def delete(self) -> None:
        """Deletes what is stored of it. Only after `end`."""
        try:
            await self._store.delete()
        finally:
            self._held.close()

    def _require_alive(self) -> None:
        if self._end is not None:
            raise self._end.with_traceback(None)

    def _require_storable(self) -> None:
        self._require_alive()
        if self._store.problem is not None:
            raise self._store.problem.with_traceback(None)
        if self._is_going_back:
            raise going_back(self.config.name)

    # What follows a change

    def _follow(self) -> None:
        """Does what the coordinator's decisions ask for: rounds to the writer, waiting pulls, the timer."""
        if self._end is not None:
            return
        for closed in self._coordinator.take_closed():
            self._pipeline.add(closed, self._tuning.next_step(*closed.loss()))
        self._look_at_gates()
        self._alarm.set(self._coordinator.due_at_seconds)

    def _on_timer(self) -> None:
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
        ticket = self._store.commit(commit)
        if isinstance(commit, Rejected):
            ticket.when_written(partial(self._held.give_back, commit.judgement.identity))

    # The pipeline

    def _on_applied(self, closed: Round, snapshot: Snapshot) -> None:
        is_sync = snapshot.lookahead_sync_count > self.snapshot.lookahead_sync_count
        self._publication.publish(snapshot)
        self._coordinator.applied(closed, is_lookahead_sync=is_sync)
        for contribution in closed.contributions:
            self._held.give_back(contribution.header.identity)
        self._follow()
        self.checkpoint_if_due()

    def _on_failed(self, rounds: Sequence[Round], error: BaseException) -> None:
        if self._end is None:
            _log.error("update failed", run=self.config.name, step=self.snapshot.step + 1, exc_info=error)
        failure = self._end or as_failure(self.config.name, error)
        contributions = [contribution for closed in rounds for contribution in closed.contributions]
        self._held.take_over_all(contributions)  # the journal may be reading them
        fail_all(contributions, failure)
        self._store.abandon(failure)
        self._checkpointer.stop()
        self.end(failure)
