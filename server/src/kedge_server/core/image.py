"""What a run is, apart from its arrays, after the commits that its journal holds.

The live server applies each commit to its image once the journal has it; a server that is started anew applies them to
the image of a checkpoint, and gets the same. Invariant: an image depends on nothing but the commits and their times. It
decides nothing, refuses nothing, and is never ahead of what is durable.

Times are seconds since 1970, since they outlive the server: whoever goes on from an image has a clock of its own.
"""

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from kedge.optim.controls import Controls, RateState
from kedge.policies import Admission, Policy
from kedge_server.core.admission import NormHistory
from kedge_server.core.answers import Answers
from kedge_server.core.cohort import Cohort
from kedge_server.core.commits import (
    Commit,
    Created,
    Ended,
    Held,
    Joined,
    Judgement,
    Rejected,
    Restored,
    RunConfig,
    Stepped,
    Ticked,
    Updated,
)
from kedge_server.core.contributions import Contribution
from kedge_server.core.leases import Lease, LeaseTable, LeaseTableState
from kedge_server.core.values import ContributionHeader, PushResult

_REMEMBERED_EPOCHS = 4096
"""Ended leases that are remembered: as many as a live table does where it may have twice the workers of the default."""

HeldKey = tuple[str, int, int]
"""Worker, epoch, sequence."""


class EntryState(NamedTuple):
    """One entry of a ledger."""

    sequence: int
    base_step: int
    example_count: int
    loss: float | None
    staleness: int
    result: PushResult | None
    """None of a contribution that is held."""


class LeaseState(NamedTuple):
    """One epoch of one worker."""

    worker_id: str
    epoch: int
    duration_seconds: float
    clock: int
    bad_count: int
    applied_count: int
    rejected_count: int
    last_staleness: int
    last_loss: float | None
    eviction_cause: str | None
    last_sequence: int
    holes: tuple[int, ...]
    entries: tuple[EntryState, ...]
    owner: str = ""


class ImageState(NamedTuple):
    """An image as plain values, for a checkpoint."""

    config: RunConfig
    next_index: int
    """Of the journal: the first commit that is not in it."""
    policy: Policy
    admission: Admission
    controls: Controls
    step: int
    applied_count: int
    rejected_counts: dict[str, int]
    loss: float | None
    is_formed: bool
    slowest_clock: int
    barrier_step: int
    first_epoch: int
    live: tuple[LeaseState, ...]
    ended: tuple[LeaseState, ...]
    last_epochs: dict[str, int]
    last_forgotten_epoch: int
    blocks: tuple[tuple[str, float, str], ...]
    norms: tuple[tuple[str, tuple[float, ...], bool], ...]
    held: tuple[HeldKey, ...]
    """The contributions of the open round whose workers know of it, as they came."""
    held_entries: tuple[EntryState, ...]
    """The same, since a ledger, or the table of leases, may have forgotten them."""
    updates: tuple[tuple[str, int], ...]
    ticks: tuple[tuple[str, RateState], ...]
    evictions: tuple[tuple[str, None], ...]
    restores: tuple[tuple[str, int], ...]
    unfit: tuple[str, ...] = ()
    """Who has sent for the open round what was rejected for its values."""
    late_unfit: tuple[str, ...] = ()
    """Those of them who have done so since it holds a contribution."""
    journal_sum: int | None = None
    """Of a checkpoint: the sum of the journal's last record that is in it."""


class RunImage:
    """What comes of a run's commits. Made by `create` or `of`.

    Attributes:
        config: what it was created with.
        next_index: of the journal: the first commit that is not in it.
        step: the applied step.
        held: the contributions of the open round whose workers know of it, as they came.
        unfit: who has sent for the open round what was rejected for its values.
        late_unfit: those of them who have done so since it holds a contribution.
    """

    def __init__(self, config: RunConfig, policy: Policy, admission: Admission, controls: Controls) -> None:
        self.config = config
        self.next_index = 1
        self.policy = policy
        self.admission = admission
        self.controls = controls
        self.step = 0
        self.applied_count = 0
        self.rejected_counts: Counter[str] = Counter()
        self.loss: float | None = None
        self.cohort = Cohort()
        self.leases = LeaseTable(
            config.name, worker_limit=0, first_epoch=config.first_epoch, ended_limit=_REMEMBERED_EPOCHS
        )
        self.norms = NormHistory()
        self.held: dict[HeldKey, Contribution] = {}
        self.unfit: tuple[str, ...] = ()
        self.late_unfit: tuple[str, ...] = ()
        self.updates: Answers[int] = Answers()
        self.ticks: Answers[RateState] = Answers()
        self.evictions: Answers[None] = Answers()
        self.restores: Answers[int] = Answers()

    @classmethod
    def create(cls, created: Created) -> "RunImage":
        """That of a new run."""
        config, progress = created.config, created.progress
        controls = Controls.begin(config.optimizer.spec(), config.groups) if progress is None else progress.controls
        image = cls(config, created.policy, created.admission, controls)
        if progress is not None:
            image.step, image.applied_count, image.loss = progress.step, progress.applied_count, progress.loss
            image.cohort.barrier_step = progress.step
        image.next_index = 2
        return image

    @property
    def last_epoch(self) -> int:
        """No epoch of the run is greater."""
        table = self.leases.state()
        return max(self.config.first_epoch, table.last_forgotten_epoch, *table.last_epochs.values(), 0)

    # Commits

    def apply(self, commit: Commit, time_seconds: float) -> None:
        """Takes the next commit."""
        match commit:
            case Joined():
                self._join(commit, time_seconds)
            case Ended():
                self._end(commit, time_seconds)
            case Held():
                self._record(commit.judgement, None)
            case Rejected():
                self._reject(commit)
            case Stepped():
                self._step(commit)
            case Updated():
                self._update(commit)
            case Ticked():
                self.controls = self.controls.ticked(commit.group, commit.tick)
                self.ticks.remember(commit.request_id, self.controls.rate_state(commit.group))
            case Restored() | Created():
                raise AssertionError("a run begins anew with these: see `go_back` and `create`")
        self.next_index += 1
        self.cohort.gather(self.leases, self.policy, time_seconds)
        self.cohort.disperse(self.leases)
        self.cohort.note_slowest(self.leases, self.step)

    def go_back(self, restored: Restored, to: "RunImage") -> None:
        """Goes on from an earlier image: its weights, schedules and counts; who is a worker is a matter of now."""
        self.next_index += 1
        self.step, self.controls, self.loss = to.step, to.controls, to.loss
        self.applied_count, self.rejected_counts = to.applied_count, Counter(to.rejected_counts)
        self.held.clear()
        self._open_round()
        self.norms = NormHistory()
        self.leases.end_all()
        self.cohort = Cohort(barrier_step=self.step)
        self.restores.remember(restored.request_id, restored.step)

    def _join(self, joined: Joined, time_seconds: float) -> None:
        if self.leases.of_worker(joined.worker_id) is not None:
            self.norms.forget(joined.worker_id)
        self.leases.grant(
            joined.worker_id,
            epoch=joined.epoch,
            duration_seconds=joined.duration_seconds,
            now_seconds=time_seconds,
            owner=joined.owner,
        ).bad_count = joined.bad_count

    def _end(self, ended: Ended, time_seconds: float) -> None:
        self.evictions.remember(ended.request_id, None)
        lease = self.leases.remembered(ended.worker_id, ended.epoch)
        if lease is None or not self.leases.is_live(lease):
            return
        self.norms.forget(ended.worker_id)
        if ended.eviction_cause is None:
            self.leases.leave(ended.worker_id, ended.epoch)
            return
        until = None if ended.block_seconds is None else time_seconds + ended.block_seconds
        self.leases.evict(lease, ended.eviction_cause, until)

    def _update(self, updated: Updated) -> None:
        if updated.hyperparameters is not None:
            self.controls = self.controls.changed(updated.group, updated.hyperparameters, step=updated.step)
        if updated.admission is not None:
            self.admission = updated.admission
        if updated.policy is not None and updated.policy != self.policy:
            self.policy = updated.policy
            self._open_round()
            self.cohort.begin_anew(self.leases, self.step)
        self.updates.remember(updated.request_id, updated.step)

    # Contributions

    def _step(self, stepped: Stepped) -> None:
        self.step = stepped.step
        self._open_round()
        self.controls = self.controls.after_step(stepped.loss, stepped.loss_example_count)
        self.applied_count += len(stepped.judgements)
        self.loss = stepped.loss
        for judgement in stepped.judgements:
            result = applied_result(judgement.sequence, stepped.reason, stepped.step, judgement.staleness)
            self._record(judgement, result)
            self.leases.count_applied(judgement.worker_id, judgement.epoch)

    def _reject(self, rejected: Rejected) -> None:
        self.rejected_counts[rejected.result.reason] += 1
        self._note_unfit(rejected)
        self._record(rejected.judgement, rejected.result)
        self.leases.count_rejected(rejected.judgement.worker_id, rejected.judgement.epoch)

    def _open_round(self) -> None:
        self.unfit = self.late_unfit = ()

    def _note_unfit(self, rejected: Rejected) -> None:
        worker_id = rejected.judgement.worker_id
        if rejected.result.reason == "COHORT_TOO_SMALL":  # the round was refused, and another is open
            self._open_round()
        if not rejected.is_for_values:
            return
        self.unfit = _with_last(self.unfit, worker_id)
        if self.held:
            self.late_unfit = _with_last(self.late_unfit, worker_id)

    def _record(self, judgement: Judgement, result: PushResult | None) -> None:
        key = judgement.identity
        known = self.held.pop(key, None)
        if known is not None:
            known.result = result
            return
        contribution = Contribution(_header(judgement), judgement.staleness, result)
        if result is None:
            contribution.is_held = True
            self.held[key] = contribution
        lease = self.leases.remembered(judgement.worker_id, judgement.epoch)
        if lease is None:
            return
        is_newest = judgement.sequence > lease.ledger.last_sequence
        if judgement.norm is not None and self.leases.is_live(lease):
            self.norms.add(judgement.worker_id, judgement.norm, is_outlier=judgement.is_outlier if is_newest else None)
        if is_newest:
            lease.last_staleness, lease.last_loss = judgement.staleness, judgement.loss
            lease.clock, lease.bad_count = judgement.clock, judgement.bad_count
        lease.ledger.restore(judgement.sequence, contribution)

    # As plain values

    def state(self) -> ImageState:
        """All of it. Nothing of it changes afterwards."""
        table, cohort = self.leases.state(), self.cohort
        return ImageState(
            config=self.config,
            next_index=self.next_index,
            policy=self.policy,
            admission=self.admission,
            controls=self.controls,
            step=self.step,
            applied_count=self.applied_count,
            rejected_counts=dict(self.rejected_counts),
            loss=self.loss,
            is_formed=cohort.is_formed,
            slowest_clock=cohort.slowest_clock,
            barrier_step=cohort.barrier_step,
            first_epoch=table.first_epoch,
            live=tuple(map(_lease_state, table.live)),
            ended=tuple(map(_lease_state, table.ended)),
            last_epochs=table.last_epochs,
            last_forgotten_epoch=table.last_forgotten_epoch,
            blocks=table.blocks,
            norms=self.norms.state(),
            held=tuple(self.held),
            unfit=self.unfit,
            late_unfit=self.late_unfit,
            held_entries=tuple(_entry_state(key[2], entry) for key, entry in self.held.items()),
            updates=self.updates.state(),
            ticks=self.ticks.state(),
            evictions=self.evictions.state(),
            restores=self.restores.state(),
        )

    @classmethod
    def of(cls, state: ImageState) -> "RunImage":
        """The image that has this state."""
        image = cls(state.config, state.policy, state.admission, state.controls)
        image.next_index = state.next_index
        image.step = state.step
        image.applied_count = state.applied_count
        image.rejected_counts = Counter(state.rejected_counts)
        image.loss = state.loss
        image.cohort = Cohort(state.is_formed, 0.0, state.slowest_clock, state.barrier_step)
        image.leases.resume(
            LeaseTableState(
                first_epoch=state.first_epoch,
                live=tuple(map(_lease, state.live)),
                ended=tuple(map(_lease, state.ended)),
                last_epochs=state.last_epochs,
                last_forgotten_epoch=state.last_forgotten_epoch,
                blocks=state.blocks,
            )
        )
        image.norms.resume(state.norms)
        image.unfit, image.late_unfit = state.unfit, state.late_unfit
        image.held = image._held_of(state.held, state.held_entries)
        image.updates, image.ticks = Answers(state.updates), Answers(state.ticks)
        image.evictions, image.restores = Answers(state.evictions), Answers(state.restores)
        return image

    def copy_on_clock(
        self, make: Callable[[Contribution], Contribution], *, now_seconds: float, time_seconds: float
    ) -> "RunImage":
        """The same on a clock of its own, with all live leases renewed.

        Args:
            make: what is to be kept of a contribution.
            now_seconds: the time of that clock.
            time_seconds: the same moment in seconds since 1970.
        """
        copy = RunImage.of(self.state())
        table = copy.leases.state()
        for lease in (*table.live, *table.ended):
            lease.joined_at_seconds, lease.expires_at_seconds = now_seconds, now_seconds + lease.duration_seconds
            lease.ledger.replace_entries(make)
        copy.held = {key: copy._made(key, entry, make) for key, entry in copy.held.items()}
        blocks = tuple((worker, until - time_seconds + now_seconds, cause) for worker, until, cause in table.blocks)
        copy.leases.resume(table._replace(blocks=blocks))
        return copy

    def _made(self, key: HeldKey, entry: Contribution, make: Callable[[Contribution], Contribution]) -> Contribution:
        """What was made of an entry that a ledger has, or what is made of it now."""
        lease = self.leases.remembered(*key[:2])
        known = None if lease is None else lease.ledger.kept(key[2])
        return known or make(entry)

    def _held_of(self, keys: tuple[HeldKey, ...], entries: tuple[EntryState, ...]) -> dict[HeldKey, Contribution]:
        held: dict[HeldKey, Contribution] = {}
        for key, entry in zip(keys, entries, strict=True):
            lease = self.leases.remembered(*key[:2])
            known = None if lease is None else lease.ledger.kept(key[2])
            held[key] = known or _contribution(key[0], key[1], entry)
        return held


def _with_last(names: tuple[str, ...], name: str) -> tuple[str, ...]:
    return (*(other for other in names if other != name), name)[-_REMEMBERED_EPOCHS:]


def applied_result(sequence: int, reason: str, step: int, staleness: int) -> PushResult:
    """What is said of a contribution that is part of a step."""
    return PushResult(sequence, "applied", reason, f"part of step {step}", step, staleness)


def _header(judgement: Judgement) -> ContributionHeader:
    return ContributionHeader(
        worker_id=judgement.worker_id,
        epoch=judgement.epoch,
        sequence=judgement.sequence,
        base_step=judgement.base_step,
        manifest_digest=b"",  # it was checked
        example_count=judgement.example_count,
        loss=judgement.loss,
    )


def _lease_state(lease: Lease) -> LeaseState:
    return LeaseState(
        worker_id=lease.worker_id,
        epoch=lease.epoch,
        duration_seconds=lease.duration_seconds,
        clock=lease.clock,
        bad_count=lease.bad_count,
        applied_count=lease.applied_count,
        rejected_count=lease.rejected_count,
        last_staleness=lease.last_staleness,
        last_loss=lease.last_loss,
        eviction_cause=lease.eviction_cause,
        last_sequence=lease.ledger.last_sequence,
        holes=lease.ledger.holes,
        entries=tuple(_entry_state(sequence, entry) for sequence, entry in lease.ledger.entries()),
        owner=lease.owner,
    )


def _entry_state(sequence: int, entry: Contribution) -> EntryState:
    header = entry.header
    return EntryState(sequence, header.base_step, header.example_count, header.loss, entry.staleness, entry.result)


def _lease(state: LeaseState) -> Lease:
    lease = Lease(
        worker_id=state.worker_id,
        epoch=state.epoch,
        duration_seconds=state.duration_seconds,
        joined_at_seconds=0.0,
        expires_at_seconds=0.0,
        applied_count=state.applied_count,
        rejected_count=state.rejected_count,
        last_staleness=state.last_staleness,
        last_loss=state.last_loss,
        clock=state.clock,
        bad_count=state.bad_count,
        eviction_cause=state.eviction_cause,
        owner=state.owner,
    )
    for entry in state.entries:
        lease.ledger.restore(entry.sequence, _contribution(state.worker_id, state.epoch, entry))
    lease.ledger.resume(state.last_sequence, state.holes)
    return lease


def _contribution(worker_id: str, epoch: int, entry: EntryState) -> Contribution:
    header = ContributionHeader(
        worker_id=worker_id,
        epoch=epoch,
        sequence=entry.sequence,
        base_step=entry.base_step,
        manifest_digest=b"",
        example_count=entry.example_count,
        loss=entry.loss,
    )
    return Contribution(header, entry.staleness, entry.result, is_held=entry.result is None)
