"""Decides who may contribute to a run, and what becomes of each contribution.

Membership, ledger, admission and rounds of one run, as a state machine: it computes no gradient, waits for nothing, and
knows no time but what it is told. Invariants: a contribution that is taken is in exactly one round, and every round is
closed, as the next step, or refused; whatever is rejected is in none; sequences are recorded once.
"""

import math
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from kedge.policies import Admission, BoundedStaleness, Policy, Synchronous
from kedge.wire.errors import KedgeError
from kedge_server.core import admission as admitting
from kedge_server.core import rounds
from kedge_server.core.cohort import Cohort
from kedge_server.core.commits import Commit, Ended, Joined, Judgement, Rejected
from kedge_server.core.contributions import Contribution, Round
from kedge_server.core.events import Tell
from kedge_server.core.image import RunImage, applied_result
from kedge_server.core.leases import Lease, LeaseTable
from kedge_server.core.rounds import PullGate
from kedge_server.core.values import ContributionHeader, PushResult


class Bounds(NamedTuple):
    """What bounds a run, whatever its peers send."""

    workers: int
    """Leases held at once."""
    contributions: int
    """Contributions taken and not applied yet."""


class Coordinator:
    """The decisions of one run.

    Attributes:
        policy: how contributions become steps.
        admission: which gradients are taken.
        leases: its workers.
        closed_step: the rounds that have closed as steps.
        due_at_seconds: when time alone may make something due, for `advance`; None: never.
        applied_count: contributions that are part of applied steps.
        rejected_counts: those that were rejected, by reason.
        loss: the mean loss of the last applied step.

    Args:
        run: its name, for messages.
        digest: of its manifest.
        policy: how contributions become steps.
        admission: which gradients are taken.
        bounds: what bounds it.
        first_epoch: greater than any epoch that an earlier run of the same name granted.
        tell: hears of what happens.
        commit: is given each change that outlives the server, but for steps and for what its caller asked for.
    """

    def __init__(
        self,
        run: str,
        *,
        digest: bytes,
        policy: Policy,
        admission: Admission,
        bounds: Bounds,
        first_epoch: int,
        tell: Tell,
        commit: Callable[[Commit], None] = lambda _: None,
    ) -> None:
        self.policy = policy
        self.admission = admission
        self.leases = LeaseTable(run, worker_limit=bounds.workers, first_epoch=first_epoch)
        self.closed_step = 0
        self.due_at_seconds: float | None = None
        self.applied_count = 0
        self.rejected_counts: Counter[str] = Counter()
        self.loss: float | None = None
        self._run = run
        self._digest = digest
        self._bounds = bounds
        self._tell = tell
        self._commit = commit
        self._round = Round(policy)
        self._closed: list[Round] = []
        self._pending_count = 0
        self._cohort = Cohort()
        self._norms = admitting.NormHistory()
        self._missing_workers = ""

    # Membership

    def join(
        self, worker_id: str, *, epoch: int, duration_seconds: float, now_seconds: float, owner: str = ""
    ) -> Lease:
        """Grants a lease.

        Raises:
            KedgeError: TOO_MANY_WORKERS, WORKER_EVICTED or WRONG_IDENTITY.
        """
        self.advance(now_seconds)
        superseded = self.leases.of_worker(worker_id)
        lease = self.leases.join(
            worker_id, epoch=epoch, duration_seconds=duration_seconds, now_seconds=now_seconds, owner=owner
        )
        if superseded is not None:
            self._end_evicted(superseded, "WORKER_SUPERSEDED", "another process has joined under its name")
        self._commit(Joined(worker_id, epoch, duration_seconds, lease.bad_count, owner))
        self._tell("joined", worker_id=worker_id, epoch=epoch)
        self.advance(now_seconds)
        return lease

    def heartbeat(self, worker_id: str, epoch: int, now_seconds: float) -> Lease:
        """Renews a lease.

        Raises:
            KedgeError: WORKER_NOT_FOUND, LEASE_EXPIRED, WORKER_SUPERSEDED or WORKER_EVICTED.
        """
        self._catch_up(now_seconds)
        lease = self.leases.find(worker_id, epoch)
        self.leases.require_live(lease)
        self.leases.renew(lease, now_seconds)
        return lease

    def leave(self, worker_id: str, epoch: int, now_seconds: float) -> None:
        """Ends a lease; one that has ended already stays so."""
        if self.leases.leave(worker_id, epoch):
            self._norms.forget(worker_id)
            self._commit(Ended(worker_id, epoch))
            self._tell("left", worker_id=worker_id, epoch=epoch)
        self.advance(now_seconds)

    def evict(
        self, worker_id: str, cause: str, *, block_seconds: float | None, now_seconds: float, request_id: str = ""
    ) -> Lease:
        """Ends a worker's lease from outside, and answers which it was. What it contributed stays.

        Raises:
            KedgeError: WORKER_NOT_FOUND if it holds no lease.
        """
        self.advance(now_seconds)
        lease = self.leases.of_worker(worker_id)
        if lease is None:
            worker = f"{self._run}/workers/{worker_id}"
            raise KedgeError("WORKER_NOT_FOUND", f"{worker} holds no lease: nothing was ended", worker=worker)
        self._evict(lease, cause, block_seconds, now_seconds, request_id)
        self.advance(now_seconds)
        return lease

    # Contributions

    def check(self, header: ContributionHeader, now_seconds: float) -> bool:
        """Checks a contribution while its gradient is on its way. That it is is a sign of life: it renews the lease.

        Returns:
            Whether it is recorded already.

        Raises:
            KedgeError: QUEUE_FULL; see `admission.check_header`, `LeaseTable.find`, `Ledger.find`.
        """
        self._catch_up(now_seconds)
        lease = self.leases.find(header.worker_id, header.epoch)
        if lease.ledger.find(header.sequence) is not None:
            return True
        self._require_takeable(lease, header)
        self.leases.renew(lease, now_seconds)
        return False

    def submit(self, contribution: Contribution, inspection: admitting.Inspection, now_seconds: float) -> Contribution:
        """Takes a contribution that has arrived whole: this is the commit point.

        Returns:
            The contribution; or the one that was recorded before under the same sequence, and nothing was changed.

        Raises:
            KedgeError: see `check`. Nothing was changed.
        """
        self._catch_up(now_seconds)
        header = contribution.header
        lease = self.leases.find(header.worker_id, header.epoch)
        known = lease.ledger.find(header.sequence)
        if known is not None:
            return known
        self._require_takeable(lease, header)
        self._record(lease, contribution, inspection, now_seconds)
        self.advance(now_seconds)
        return contribution

    def applied(self, closed: Round, *, is_lookahead_sync: bool) -> None:
        """Takes note that a closed round has become a step."""
        reason, step = closed.close_reason, closed.step
        self._pending_count -= len(closed.contributions)
        self.applied_count += len(closed.contributions)
        self.loss, _ = closed.loss()
        for c in closed.contributions:
            self.leases.count_applied(c.header.worker_id, c.header.epoch)
            c.settle(applied_result(c.header.sequence, reason, step, c.staleness))
        self._tell("step", reason=reason, contribution_count=len(closed.contributions), loss=self.loss)
        if is_lookahead_sync:
            self._tell("lookahead_sync")

    def take_closed(self) -> list[Round]:
        """The rounds that have closed since the last call, in the order of their steps."""
        closed, self._closed = self._closed, []
        return closed

    @property
    def held(self) -> list[Contribution]:
        """The contributions of the open round."""
        return self._round.contributions

    # The policy

    def set_policy(self, policy: Policy, now_seconds: float) -> None:
        """Replaces the policy; the open round ends with what it holds, under the old one."""
        if policy == self.policy:
            return
        self.advance(now_seconds)
        if self._round.contributions:
            self._end_round(rounds.decide_at_change(self._facts(), self.policy))
        self.policy, self._round = policy, Round(policy)
        self._cohort.begin_anew(self.leases, self.closed_step)
        self._tell("aggregation_changed", policy=policy)
        self.advance(now_seconds)

    def set_admission(self, admission: Admission) -> None:
        """Replaces the admission, for whatever arrives from now on."""
        self.admission = admission

    # After a new start

    def resume(
        self, image: RunImage, *, make: Callable[[Contribution], Contribution], now_seconds: float, time_seconds: float
    ) -> None:
        """Takes up where the server before this one stood. Live leases are renewed, and the open round opens now.

        Args:
            image: what was durable.
            make: what the caller keeps of a contribution, from the image's.
            now_seconds: the time.
            time_seconds: the same in seconds since 1970.
        """
        copy = image.copy_on_clock(make, now_seconds=now_seconds, time_seconds=time_seconds)
        self.leases.resume(copy.leases.state())
        self._norms, self._cohort = copy.norms, copy.cohort
        self._cohort.formed_at_seconds = now_seconds
        self.closed_step, self.applied_count, self.loss = copy.step, copy.applied_count, copy.loss
        self.rejected_counts = copy.rejected_counts
        for worker_id in copy.unfit:
            self._round.note_unfit(worker_id)
        for held in copy.held.values():
            self._round.add(held, now_seconds)
        for worker_id in copy.late_unfit:
            self._round.note_unfit(worker_id)
        self._pending_count = len(self._round.contributions)
        self.advance(now_seconds)

    def begin_at(self, image: RunImage, now_seconds: float) -> None:
        """Goes on from an earlier state of the run: the open round is refused, and every lease ends."""
        ended, self._round = self._round, Round(self.policy)
        if ended.contributions:
            self._refuse_as(ended, "the run goes on from an earlier checkpoint: pull and recompute", "STALE_GRADIENT")
        for lease in self.leases.end_all():
            self._commit(Ended(lease.worker_id, lease.epoch))
            self._end_evicted(lease, "LEASE_EXPIRED", "the run goes on from a checkpoint")
        self.closed_step, self.applied_count, self.loss = image.step, image.applied_count, image.loss
        self.rejected_counts = Counter(image.rejected_counts)
        self._norms, self._cohort = admitting.NormHistory(), Cohort(barrier_step=image.step)
        self.advance(now_seconds)

    def forget_barrier(self) -> None:
        """Goes on without the barrier's weights, which nobody has any more: those of now stand for them."""
        self._cohort.barrier_step = self.closed_step

    # Reading

    @property
    def barrier_step(self) -> int:
        """Under `BoundedStaleness`, the closed step when the slowest worker's clock last rose."""
        return self._cohort.barrier_step

    @property
    def slowest_clock(self) -> int:
        """Under `BoundedStaleness`, the least clock of a live worker."""
        return self._cohort.slowest_clock

    def pull_gate(self, worker_id: str) -> PullGate:
        """What a worker's pull of fast weights has to wait for."""
        lease = self.leases.of_worker(worker_id)
        if lease is None or not isinstance(self.policy, BoundedStaleness):
            return PullGate(True)
        facts = rounds.PullFacts(lease.clock, self._cohort.slowest_clock)
        is_open, _ = rounds.may_pull(facts, self.policy)
        bound = self.policy.bound
        return PullGate(is_open, self._cohort.barrier_step, is_exact=bound == 0, facts=facts, bound=bound)

    def require_not_evicted(self, worker_id: str, epoch: int) -> None:
        """Lets every epoch through but one that was sent away.

        Raises:
            KedgeError: WORKER_EVICTED.
        """
        lease = self.leases.find(worker_id, epoch)
        if lease.eviction_cause is not None:
            self.leases.require_live(lease)

    @property
    def is_lockstep(self) -> bool:
        """Whether the workers' pulls are of exactly the barrier's step."""
        return isinstance(self.policy, BoundedStaleness) and self.policy.bound == 0

    def decide(self, now_seconds: float) -> rounds.Decision:
        """What is decided on the open round now."""
        return rounds.decide(now_seconds, self._facts(), self.policy)

    def waiting_for(self) -> str:
        """What the run waits for, in words; empty when it keeps nobody waiting."""
        if not isinstance(self.policy, BoundedStaleness):
            return rounds.waiting_for(self._facts(), self.policy)
        return self._cohort.waiting_for(self._run, self.leases, self.policy.bound)

    # Time

    def advance(self, now_seconds: float) -> None:
        """Does what time, membership and contributions have made due. Every change ends with it."""
        self._expire(now_seconds)
        self._cohort.gather(self.leases, self.policy, now_seconds)
        facts = self._facts()
        decision = rounds.decide(now_seconds, facts, self.policy)
        if decision.close and self._round.contributions:
            self._end_round(decision)
            facts = self._facts()
            decision = rounds.decide(now_seconds, facts, self.policy)
        # Only now: what the last worker that went had contributed is a round of a formed run.
        self._cohort.disperse(self.leases)
        self._cohort.note_slowest(self.leases, self.closed_step)
        self._say_what_is_missing(facts)
        moments = [self.leases.next_expiry_seconds, decision.look_again_at_seconds]
        self.due_at_seconds = min((moment for moment in moments if moment is not None), default=None)

    def _catch_up(self, now_seconds: float) -> None:
        """Does what time alone has made due since the last change."""
        if self.due_at_seconds is not None and now_seconds >= self.due_at_seconds:
            self.advance(now_seconds)

    def _expire(self, now_seconds: float) -> None:
        for lease in self.leases.expire(now_seconds):
            self._commit(Ended(lease.worker_id, lease.epoch))
            self._end_evicted(lease, "LEASE_EXPIRED", f"its lease of {lease.duration_seconds:g} s ran out")

    def _say_what_is_missing(self, facts: rounds.RoundFacts) -> None:
        missing = rounds.missing_workers(facts, self.policy)
        if missing and missing != self._missing_workers:
            self._tell("waiting", message=missing)
        self._missing_workers = missing

    def _end_evicted(self, lease: Lease, reason: str, message: str) -> None:
        self._norms.forget(lease.worker_id)
        self._tell("evicted", worker_id=lease.worker_id, epoch=lease.epoch, reason=reason, message=message)

    def _evict(
        self, lease: Lease, cause: str, block_seconds: float | None, now_seconds: float, request_id: str = ""
    ) -> None:
        until = None if block_seconds is None else now_seconds + block_seconds
        self.leases.evict(lease, cause, until)
        self._commit(Ended(lease.worker_id, lease.epoch, cause, block_seconds, request_id))
        self._end_evicted(lease, "WORKER_EVICTED", cause)

    # The round

    def _facts(self) -> rounds.RoundFacts:
        return rounds.RoundFacts(
            contribution_count=len(self._round.contributions),
            opened_at_seconds=self._round.opened_at_seconds,
            live_count=len(self.leases),
            awaited_count=self._awaited_count(),
            is_formed=self._cohort.is_formed,
            unfit_count=self._unfit_count(),
        )

    def _awaited_count(self) -> int:
        """The workers that the round waits for. Who joined since it was opened may come late, or go again."""
        heard_of = self._round.worker_ids | self._round.excused_worker_ids
        opened_at = self._round.opened_at_seconds
        since = math.inf if opened_at is None else max(opened_at, self._cohort.formed_at_seconds)
        return sum(
            lease.joined_at_seconds <= since for name, lease in self.leases.by_worker.items() if name not in heard_of
        )

    def _unfit_count(self) -> int:
        if not isinstance(self.policy, Synchronous):
            return 0
        return len((self._round.unfit_worker_ids & self.leases.by_worker.keys()) - self._round.worker_ids)

    def _require_takeable(self, lease: Lease, header: ContributionHeader) -> None:
        self.leases.require_live(lease)
        admitting.check_header(header, manifest_digest=self._digest, step=self.closed_step)
        admitting.check_room(self._run, self._pending_count, self._bounds.contributions)

    def _record(
        self, lease: Lease, contribution: Contribution, inspection: admitting.Inspection, now_seconds: float
    ) -> None:
        header = contribution.header
        contribution.staleness = self.closed_step - header.base_step
        standing = self._standing(lease)
        rules = admitting.Rules(self.policy, self.admission, self._norms)
        rejection = admitting.judge(header, inspection, standing=standing, rules=rules)
        if inspection.rejection() is None:
            is_outlier = rejection is not None and rejection.reason == "NORM_OUTLIER"
            self._norms.add(lease.worker_id, inspection.norm, is_outlier=is_outlier)
        lease.ledger.record(header.sequence, contribution)
        lease.last_staleness, lease.last_loss = contribution.staleness, header.loss
        lease.clock += standing.bound is not None and not standing.is_ahead
        lease.bad_count = self._bad_count_after(lease, rejection)
        self.leases.renew(lease, now_seconds)
        contribution.judgement = Judgement(
            *header.identity,
            base_step=header.base_step,
            example_count=header.example_count,
            loss=header.loss,
            staleness=contribution.staleness,
            norm=inspection.norm if inspection.rejection() is None else None,
            is_outlier=rejection is not None and rejection.reason == "NORM_OUTLIER",
            clock=lease.clock,
            bad_count=lease.bad_count,
        )
        if rejection is not None:
            self._reject(contribution, rejection)
            if rejection.is_for_values:
                self._note_unfit(lease, rejection, now_seconds)
            return
        self._pending_count += 1
        self._round.add(contribution, now_seconds)

    def _standing(self, lease: Lease) -> admitting.Standing:
        bound = self.policy.bound if isinstance(self.policy, BoundedStaleness) else None
        has_contributed = lease.worker_id in self._round.worker_ids
        return admitting.Standing(self.closed_step, has_contributed, lease.clock, self._cohort.slowest_clock, bound)

    def _reject(self, contribution: Contribution, rejection: admitting.Rejection) -> None:
        header = contribution.header
        self.rejected_counts[rejection.reason] += 1
        self.leases.count_rejected(header.worker_id, header.epoch)
        judgement, step = contribution.judgement, self.closed_step
        assert judgement is not None, "it was judged"
        result = PushResult(
            header.sequence, "rejected", rejection.reason, rejection.message, step, contribution.staleness
        )
        self._commit(Rejected(judgement, result, rejection.is_for_values))
        contribution.settle(result)
        self._tell(
            "rejected",
            worker_id=header.worker_id,
            epoch=header.epoch,
            reason=rejection.reason,
            message=rejection.message,
        )

    def _note_unfit(self, lease: Lease, rejection: admitting.Rejection, now_seconds: float) -> None:
        """Lets the round go on without a worker that sent what cannot be taken; one that only does so is sent away."""
        self._round.note_unfit(lease.worker_id)
        if len(self._round.unfit_worker_ids) > self._bounds.workers:
            self._round.forget_unfit_but(self._round.worker_ids | self.leases.by_worker.keys())
        if self._norms.are_at_fault(rejection):
            return
        if self.admission.quarantine_after is None or lease.bad_count < self.admission.quarantine_after:
            return
        cause = f"quarantined: {lease.bad_count} gradients in a row were rejected, the last as {rejection.reason}"
        self._evict(lease, cause, self.admission.quarantine_seconds, now_seconds)

    def _bad_count_after(self, lease: Lease, rejection: admitting.Rejection | None) -> int:
        if rejection is None:
            return 0
        return lease.bad_count + (rejection.is_for_values and not self._norms.are_at_fault(rejection))

    def _end_round(self, decision: rounds.Decision) -> None:
        unfit_count = self._unfit_count()
        ended, self._round = self._round, Round(self.policy)
        if decision.refuse:
            self._refuse(ended)
            return
        self.closed_step += 1
        ended.close(decision.reason, self.closed_step, unfit_count=unfit_count)
        self._closed.append(ended)

    def _refuse(self, ended: Round) -> None:
        count, needed = len(ended.contributions), rounds.smallest_cohort(ended.policy)
        message = (
            f"the round ended with {count} of the {needed} contributions that its combination needs: nothing was "
            "changed; join more workers, or choose another combine"
        )
        self._refuse_as(ended, message, "COHORT_TOO_SMALL")

    def _refuse_as(self, ended: Round, message: str, reason: str) -> None:
        self._pending_count -= len(ended.contributions)
        for contribution in ended.contributions:
            self._reject(contribution, admitting.Rejection(reason, message))
