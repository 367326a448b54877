"""One run of the fake server. Without locks and without a clock of its own."""

from collections import Counter
from datetime import UTC, datetime

import numpy as np

from kedge.policies import Admission, Checkpoints, Policy, Synchronous
from kedge.testing import rounds
from kedge.testing.admission import Norms, Objection, most_sent_outliers, objection_to
from kedge.testing.clocks import Gap, gap_of, slowest_awaited
from kedge.testing.events import EventLog
from kedge.testing.ledger import Entry
from kedge.testing.members import Member, Members
from kedge.testing.model import Held, Model
from kedge.testing.rounds import Circumstances, Round
from kedge.transport import Lease, NewRun, Push, PushResult, RoundStatus, RunInfo, RunStatus
from kedge.transport.values import EventKind, Outcome
from kedge.wire.errors import KedgeError


class FakeRun:
    """A run. `now` is the same clock's reading in every call.

    Attributes:
        new: what it was created from.
        policy: how contributions become steps now.
        admission: which gradients it takes now.
        model: its weights.
        members: its workers.
        events: what happened to it.
        evictions_answered: the ids of the requests for one, each of which is answered once.
    """

    def __init__(self, new: NewRun, weights: np.ndarray) -> None:
        self.new = new
        self.name = f"runs/{new.run_id}"
        self.policy: Policy = new.aggregation
        self.admission: Admission = new.admission
        self.model = Model(new, weights)
        self.members = Members()
        self.events = EventLog()
        self.evictions_answered: set[str] = set()
        self._create_time = datetime.now(UTC)
        self._formed_at: float | None = None
        self._round = Round()
        self._slowest_clock: int | None = None
        self._barrier = self.newest
        self._workers_awaited = ""
        self._applied_count = 0
        self._rejected_counts: Counter[str] = Counter()

    @property
    def step(self) -> int:
        """The number of updates applied."""
        return self.newest.step

    @property
    def newest(self) -> Held:
        """The weights of this step."""
        return self.model.newest

    # Workers

    def join(self, lease: Lease, now: float) -> None:
        """Takes a worker in, in the place of one of the same name.

        Raises:
            KedgeError: WORKER_EVICTED while the name is blocked.
        """
        self.members.check_admitted(lease.worker, now)
        superseded = self.members.join(lease, now)
        if superseded is not None:
            message = f"another process joined under its name, in epoch {lease.epoch}"
            self._tell_of("evicted", superseded.lease, "WORKER_SUPERSEDED", message)
        self._tell_of("joined", lease)
        self.advance(now)

    def leave(self, lease: Lease, now: float) -> None:
        """Lets a worker go, if it still holds this lease."""
        if self.members.leave(lease) is not None:
            self._tell_of("left", lease)
        self.advance(now)

    def evict(self, worker: str, cause: str, block_seconds: float, now: float) -> None:
        """Sends a worker away.

        Raises:
            KedgeError: WORKER_NOT_FOUND.
        """
        member = self.members.evict(worker, cause, now + block_seconds)
        self._tell_of("evicted", member.lease, "WORKER_EVICTED", cause)
        self.advance(now)

    def gap(self, worker: str | None) -> Gap | None:
        """How far a worker is ahead of the slowest; None where that does not matter."""
        return gap_of(worker, self.members, self.policy)

    def weights_for(self, worker: str | None) -> Held:
        """The fast weights for a worker (None: for anyone), if nothing holds it back."""
        gap = self.gap(worker)
        return self.newest if gap is None or gap.bound else self._barrier

    # Contributions

    def contribute(self, push: Push, gradient: np.ndarray, now: float) -> Entry:
        """Records a contribution, or finds the record of a repeated one.

        Args:
            push: the contribution.
            gradient: float64 of shape [n], as it came over the wire.
            now: seconds.

        Raises:
            KedgeError: whatever keeps it from being recorded.
        """
        known = self.members.find(push.lease)
        entry = known.ledger.find(push.sequence) if known is not None else None
        if entry is not None:
            return entry
        member = self.members.renew(push.lease, now)
        self._check(push)
        entry = Entry(push, gradient, self.step - push.base_step)
        member.ledger.record(entry)
        member.last = entry
        self._judge(entry, member, now)
        self.advance(now)
        return entry

    @property
    def holding_reason(self) -> str:
        """Why what the open round holds waits."""
        return rounds.holding_reason(self._round, self._circumstances)

    def advance(self, now: float) -> None:
        """Does what is due at `now`: ends leases and the round, and tells of it."""
        for member in self.members.expire(now):
            self._tell_of("evicted", member.lease, "LEASE_EXPIRED", "its lease ran out without a heartbeat")
        has_quorum = isinstance(self.policy, Synchronous) and len(self.members.live) >= self.policy.quorum
        if self._formed_at is None and has_quorum:
            self._formed_at = now
        reason = rounds.closing_reason(self._round, self._circumstances, now)
        if reason is not None:
            self._close(reason)
        if not self.members.live:  # only now: what the last one had contributed is still made a step of
            self._formed_at = None
        self._note_slowest()
        self._note_workers_awaited()

    # Changes by hand

    def set_aggregation(self, policy: Policy, now: float) -> None:
        """Chooses another policy: the open round ends as the old one says."""
        if policy == self.policy:
            return
        if self._round.entries:
            self._close("POLICY_CHANGED")
        self.policy = policy
        self._formed_at = None
        for member in self.members.live.values():
            member.clock = 0
        self._barrier = self.newest
        self._tell("aggregation_changed", aggregation=policy)
        self.advance(now)

    # What it says of itself

    def info(self, now: float, *, with_manifest: bool) -> RunInfo:
        """What the server says of it."""
        manifest = self.new.manifest
        return RunInfo(
            name=self.name,
            create_time=self._create_time,
            parameter_count=manifest.element_count,
            optimizer=self.new.optimizer,
            aggregation=self.policy,
            admission=self.admission,
            groups=self.new.groups,
            changes=self.model.controls.changes,
            status=self._status(now),
            manifest=manifest if with_manifest else None,
            durability="memory",
            checkpoints=self.new.checkpoints or Checkpoints(),
        )

    def _status(self, now: float) -> RunStatus:
        live, held = self.members.live, len(self._round.entries)
        return RunStatus(
            step=self.step,
            lookahead_sync_count=self.model.lookahead_sync_count,
            learning_rate=self.model.controls.learning_rate,
            workers=tuple(live[name].status(now) for name in sorted(live)),
            round=RoundStatus(held, rounds.required_count(self._round, self._circumstances)) if held else None,
            applied_count=self._applied_count,
            rejected_counts=dict(self._rejected_counts),
            loss=self.model.loss,
            waiting_for=self._waiting_for(),
        )

    def _waiting_for(self) -> str:
        about = self._circumstances
        return (
            rounds.workers_awaited(self._round, about)
            or rounds.contributions_awaited(self._round, about)
            or slowest_awaited(self.members, self.policy)
        )

    # What becomes of contributions

    @property
    def _circumstances(self) -> Circumstances:
        joined_at = {name: member.joined_at for name, member in self.members.live.items()}
        return Circumstances(self.policy, joined_at, self._formed_at)

    @property
    def _norms(self) -> list[Norms]:
        return [member.norms for member in self.members.live.values()]

    def _check(self, push: Push) -> None:
        if push.example_count < 1:
            message = f"example_count is {push.example_count}: it must be at least 1"
            raise KedgeError("INVALID_EXAMPLE_COUNT", message, example_count=push.example_count)
        if push.base_step > self.step:
            raise KedgeError(
                "BASE_STEP_AHEAD",
                f"base_step is {push.base_step}, the run is at step {self.step}: send the step of the weights",
                base_step=push.base_step,
                step=self.step,
            )

    def _judge(self, entry: Entry, member: Member, now: float) -> None:
        gap = self.gap(entry.push.lease.worker)
        unfit = objection_to(entry.gradient, self.admission, self._norms)
        objection = unfit or self._untimely(entry, gap)
        member.norms.add(entry.gradient, unfit)
        if gap is not None and not gap.is_over:
            member.clock += 1
        if objection is None:
            member.unfit_in_a_row = 0
            self._round.add(entry, now)
            return
        self._reject(entry, objection)
        if unfit is not None:
            self._round.note_unfit(entry.push.lease.worker)
            self._count_unfit(member, unfit, now)

    def _untimely(self, entry: Entry, gap: Gap | None) -> Objection | None:
        """What there is against a contribution of good values, if anything."""
        limit = rounds.staleness_limit(self.policy)
        if limit is not None and entry.staleness > limit:
            return Objection("STALE_GRADIENT", f"it is {entry.staleness} steps old, the limit is {limit}: pull")
        if isinstance(self.policy, Synchronous) and entry.push.lease.worker in self._round.contributors:
            return Objection("ALREADY_CONTRIBUTED", f"the round after step {self.step} has one of this worker: pull")
        if gap is not None and gap.is_over:
            return Objection("AHEAD_OF_BOUND", f"{gap}: pull, which waits for the others")
        return None

    def _count_unfit(self, member: Member, objection: Objection, now: float) -> None:
        """Sends a worker away of which too many gradients in a row were rejected for their values."""
        if objection.reason == "NORM_OUTLIER" and most_sent_outliers(self._norms):
            return
        member.unfit_in_a_row += 1
        limit, count = self.admission.quarantine_after, member.unfit_in_a_row
        if limit is not None and count >= limit:
            were = "gradient was" if count == 1 else "gradients in a row were"
            cause = f"quarantined: {count} {were} rejected, the last as {objection.reason}"
            self.evict(member.lease.worker, cause, self.admission.quarantine_seconds, now)

    def _close(self, reason: str) -> None:
        """Makes a step of the round, or refuses it."""
        lacking = rounds.lacking(self._round, self._circumstances)
        ended, self._round = self._round, Round()
        if lacking:
            count = len(ended.entries)
            message = f"the round ended ({reason}) with {count} contributions, its combination needs {lacking} more"
            for entry in ended.entries:
                self._reject(entry, Objection("COHORT_TOO_SMALL", message))
        else:
            self._apply(ended, reason)

    def _apply(self, ended: Round, reason: str) -> None:
        entries = ended.entries
        has_synced = self.model.apply(ended, self.policy)
        self._applied_count += len(entries)
        message = f"part of step {self.step}"
        for entry in entries:
            self._settle(entry, "applied", reason, message).applied_count += 1
        self._tell("step", reason=reason, contribution_count=len(entries), loss=self.model.loss)
        if has_synced:
            self._tell("lookahead_sync")

    def _reject(self, entry: Entry, objection: Objection) -> None:
        self._settle(entry, "rejected", *objection).rejected_count += 1
        self._rejected_counts[objection.reason] += 1
        self._tell_of("rejected", entry.push.lease, *objection)

    def _settle(self, entry: Entry, outcome: Outcome, reason: str, message: str) -> Member:
        """Records what became of a contribution; the answer is whose it was."""
        entry.result = PushResult(outcome, reason, self.step, entry.staleness, message)
        member = self.members.find(entry.push.lease)
        assert member is not None, "only members contribute"
        return member

    # What is told

    def _tell(self, kind: EventKind, **fields: object) -> None:
        self.events.add(kind, self.step, **fields)

    def _tell_of(self, kind: EventKind, lease: Lease, reason: str = "", message: str = "") -> None:
        self._tell(kind, worker=lease.worker, epoch=lease.epoch, reason=reason, message=message)

    def _note_slowest(self) -> None:
        """With bound 0 everyone gets the weights of the moment when the slowest clock last rose."""
        if self.members.slowest_clock != self._slowest_clock:
            self._slowest_clock = self.members.slowest_clock
            self._barrier = self.newest

    def _note_workers_awaited(self) -> None:
        awaited = rounds.workers_awaited(self._round, self._circumstances)
        if awaited != self._workers_awaited:
            self._workers_awaited = awaited
            if awaited:
                self._tell("waiting", message=awaited)
