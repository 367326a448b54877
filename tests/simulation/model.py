"""What a coordinator has to answer and to do, said a second time and as plainly as possible.

It knows the policies from their description, keeps everything for ever, and looks at everything anew each time.
"""

import statistics
from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

from kedge.policies import (
    Admission,
    Asynchronous,
    BoundedStaleness,
    Buffered,
    Policy,
    Synchronous,
    fewest_contributions,
)
from kedge_server.core.values import ContributionHeader

LEDGER_WINDOW = 64
NORM_WINDOW = 16
NORMS_TO_JUDGE_BY = 8
GREATEST_SQUARE = 3.4028235e38
VALUE_REASONS = {"NON_FINITE_GRADIENT", "GRADIENT_TOO_LARGE", "NORM_ABOVE_LIMIT", "NORM_OUTLIER"}


class Gradient(NamedTuple):
    """What takes the place of a gradient: an integer that no other has, and what admission learns of it."""

    value: int
    norm: float = 1.0
    is_finite: bool = True


class Entry(NamedTuple):
    """A contribution in the model."""

    header: ContributionHeader
    gradient: Gradient

    @property
    def key(self) -> tuple[str, int, int]:
        return self.header.worker_id, self.header.epoch, self.header.sequence


class Judged(NamedTuple):
    """A contribution that was recorded, and what its worker was to the run then."""

    entry: Entry
    number: int
    """They are numbered as they came."""
    clock: int
    bad_count: int
    norm: float | None
    """None where there is none to be remembered."""
    is_outlier: bool


class Joined(NamedTuple):
    """A worker took a lease."""

    name: str
    epoch: int
    duration_seconds: float
    clock: int
    bad_count: int


class Ended(NamedTuple):
    """A lease ended."""

    name: str
    epoch: int
    is_evicted: bool = False
    blocked_until: float | None = None
    request_id: str = ""


class Rejected(NamedTuple):
    """A contribution was rejected."""

    judged: Judged
    reason: str


Fact = Joined | Ended | Rejected
"""What outlives a server, and is nobody's request."""


class ModelRound(NamedTuple):
    """A round that has closed."""

    reason: str
    unfit_count: int
    values: list[int]


@dataclass
class Member:
    """A worker that lives."""

    name: str
    epoch: int
    duration_seconds: float
    joined_at: float
    expires_at: float
    clock: int
    norms: list[float] = field(default_factory=list)
    is_outlier: bool = False
    """Whether the last of its norms was one."""


@dataclass
class Model:
    policy: Policy
    admission: Admission
    worker_limit: int
    contribution_limit: int
    closed_step: int = 0
    pending_count: int = 0
    formed_at: float | None = None
    opened_at: float = 0.0
    live: dict[str, Member] = field(default_factory=dict)
    last_epochs: dict[str, int] = field(default_factory=dict)
    evicted: set[tuple[str, int]] = field(default_factory=set)
    blocked_until: dict[str, float] = field(default_factory=dict)
    last_sequences: dict[tuple[str, int], int] = field(default_factory=dict)
    fates: dict[tuple[str, int, int], str] = field(default_factory=dict)
    """Of each recorded contribution: "held", "step 7", or why it was rejected."""
    bad_counts: dict[str, int] = field(default_factory=dict)
    """How many of a name's contributions in a row were bad, whatever its lease."""
    held: list[Entry] = field(default_factory=list)
    unfit: set[str] = field(default_factory=set)
    late_unfit: set[str] = field(default_factory=set)
    rounds: list[ModelRound] = field(default_factory=list)
    judged: dict[tuple[str, int, int], Judged] = field(default_factory=dict)
    judged_count: int = 0
    applied_count: int = 0
    rejected_counts: Counter[str] = field(default_factory=Counter)
    said: list[Fact] = field(default_factory=list)
    """What is to be written, until it is taken from here."""

    def blank(self) -> "Model":
        """One of a run that is made like this one is now."""
        return Model(self.policy, self.admission, self.worker_limit, self.contribution_limit)

    # Membership

    def join(self, name: str, epoch: int, duration_seconds: float, now: float) -> str:
        self.advance(now)
        if now < self.blocked_until.get(name, 0.0):
            return "WORKER_EVICTED"
        if name not in self.live and len(self.live) >= self.worker_limit:
            return "TOO_MANY_WORKERS"
        clock = self.live[name].clock if name in self.live else self.slowest
        self.live.pop(name, None)
        self.live[name] = Member(name, epoch, duration_seconds, now, now + duration_seconds, clock)
        self.last_epochs[name] = epoch
        self.last_sequences[name, epoch] = 0
        self.said.append(Joined(name, epoch, duration_seconds, clock, self.bad_counts.get(name, 0)))
        self.advance(now)
        return ""

    def heartbeat(self, name: str, epoch: int, now: float) -> str:
        self.advance(now)
        reason = self._why_not_live(name, epoch)
        if not reason:
            self._renew(name, now)
        return reason

    def leave(self, name: str, epoch: int, now: float) -> None:
        if not self._why_not_live(name, epoch):
            del self.live[name]
            self.said.append(Ended(name, epoch))
        self.advance(now)

    def evict(self, name: str, block_seconds: float | None, now: float, request_id: str = "") -> str:
        self.advance(now)
        if name not in self.live:
            return "WORKER_NOT_FOUND"
        self._send_away(name, block_seconds, now, request_id)
        self.advance(now)
        return ""

    @property
    def slowest(self) -> int:
        return min((member.clock for member in self.live.values()), default=0)

    # Contributions

    def check(self, header: ContributionHeader, now: float) -> str:
        self.advance(now)
        key = header.worker_id, header.epoch, header.sequence
        reason = self._why_no_sequence(key)
        if reason or key in self.fates:
            return reason
        reason = self._why_not_takeable(header)
        if not reason:
            self._renew(header.worker_id, now)
        return reason

    def submit(self, entry: Entry, now: float) -> str:
        """Why it cannot be taken; empty if it is recorded, now or before."""
        self.advance(now)
        reason = self._why_no_sequence(entry.key)
        if reason or entry.key in self.fates:
            return reason
        reason = self._why_not_takeable(entry.header)
        if not reason:
            self._record(entry, now)
            self.advance(now)
        return reason

    def set_policy(self, policy: Policy, now: float) -> None:
        if policy == self.policy:
            return
        self.advance(now)
        if self.held:
            self._end_round("POLICY_CHANGED")
        self.unfit.clear()
        self.late_unfit.clear()
        self.policy, self.formed_at = policy, None
        for member in self.live.values():
            member.clock = 0
        self.advance(now)

    def go_back(self, to: "Model") -> None:
        """Goes on from an earlier state of the run."""
        self._refuse(self.held, "STALE_GRADIENT")
        self.said += [Ended(name, member.epoch) for name, member in sorted(self.live.items())]
        self.go_back_to(to)

    def go_back_to(self, to: "Model") -> None:
        """What the run is afterwards, whatever it was."""
        self.live.clear()
        self.held, self.unfit, self.late_unfit = [], set(), set()
        self.formed_at = None
        self.rounds, self.closed_step = list(to.rounds), to.closed_step
        self.applied_count, self.rejected_counts = to.applied_count, Counter(to.rejected_counts)

    # Time

    def advance(self, now: float) -> None:
        self._expire(now)
        if self.formed_at is None and isinstance(self.policy, Synchronous) and len(self.live) >= self.policy.quorum:
            self.formed_at = now
        reason = self.why_ended(now)
        if reason:
            self._end_round(reason)
        if not self.live:
            self.formed_at = None

    def why_ended(self, now: float) -> str:
        """Why the open round ends now; empty if it does not."""
        count, policy = len(self.held), self.policy
        if not count:
            return ""
        if isinstance(policy, Buffered):
            return "BUFFER_FULL" if count >= policy.size else ""
        if not isinstance(policy, Synchronous):
            return "EACH_CONTRIBUTION"
        if count >= policy.quorum:
            return "QUORUM_REACHED"
        if self.waits_for_cohort and is_cohort(count, self.unfit_count, policy):
            return "ALL_LIVE_CONTRIBUTED"
        is_late = policy.timeout_seconds is not None and now >= self.opened_at + policy.timeout_seconds
        return "TIMEOUT" if is_late else ""

    @property
    def contributors(self) -> set[str]:
        return {entry.header.worker_id for entry in self.held}

    @property
    def unfit_count(self) -> int:
        """The live workers of which the open round has nothing but bad ones."""
        is_counted = isinstance(self.policy, Synchronous)
        return len((self.unfit & self.live.keys()) - self.contributors) if is_counted else 0

    @property
    def waits_for_cohort(self) -> bool:
        """Whether nothing but too small a cohort can keep an open round from ending."""
        if self.formed_at is None:
            return False
        since = max(self.opened_at, self.formed_at)
        awaited = {name for name, member in self.live.items() if member.joined_at <= since} - self.contributors
        is_anyone_fit = bool(self.contributors - self.unfit)
        return not awaited - (self.unfit if is_anyone_fit else self.late_unfit)

    @property
    def lacks_workers(self) -> bool:
        """Whether those who live have to wait until others join."""
        policy = self.policy
        if not isinstance(policy, Synchronous):
            return False
        return self.formed_at is None or len(self.live) < fewest_contributions(policy.combine, policy.trim_count)

    # Within

    def _expire(self, now: float) -> None:
        for name in [name for name, member in self.live.items() if member.expires_at <= now]:
            self.said.append(Ended(name, self.live.pop(name).epoch))

    def _renew(self, name: str, now: float) -> None:
        member = self.live[name]
        member.expires_at = now + member.duration_seconds

    def _send_away(self, name: str, block_seconds: float | None, now: float, request_id: str = "") -> None:
        epoch, until = self.live.pop(name).epoch, None if block_seconds is None else now + block_seconds
        self.evicted.add((name, epoch))
        if until is not None:
            self.blocked_until[name] = until
        self.said.append(Ended(name, epoch, True, until, request_id))

    def _why_not_live(self, name: str, epoch: int) -> str:
        if name in self.live and self.live[name].epoch == epoch:
            return ""
        if (name, epoch) in self.evicted:
            return "WORKER_EVICTED"
        return "WORKER_SUPERSEDED" if epoch < self.last_epochs[name] else "LEASE_EXPIRED"

    def _why_no_sequence(self, key: tuple[str, int, int]) -> str:
        last, sequence = self.last_sequences[key[:2]], key[2]
        if sequence > last + 1 or sequence < 1:
            return "SEQUENCE_GAP"
        return "SEQUENCE_FORGOTTEN" if sequence <= last - LEDGER_WINDOW else ""

    def _why_not_takeable(self, header: ContributionHeader) -> str:
        reason = self._why_not_live(header.worker_id, header.epoch)
        if reason:
            return reason
        if header.base_step > self.closed_step:
            return "BASE_STEP_AHEAD"
        return "QUEUE_FULL" if self.pending_count >= self.contribution_limit else ""

    def _record(self, entry: Entry, now: float) -> None:
        name = entry.header.worker_id
        member = self.live[name]
        reason = self._why_unfit(entry.gradient) or self._why_untimely(entry.header, member)
        self._note_norm(member, entry.gradient, reason)
        key = name, member.epoch
        self.last_sequences[key] = max(self.last_sequences[key], entry.header.sequence)
        self._renew(name, now)
        if isinstance(self.policy, BoundedStaleness) and member.clock - self.slowest <= self.policy.bound:
            member.clock += 1
        is_counted = self._count_bad(name, reason)
        norm = entry.gradient.norm if self._has_norm(entry.gradient) else None
        self.judged_count += 1
        self.judged[entry.key] = Judged(
            entry, self.judged_count, member.clock, self.bad_counts.get(name, 0), norm, reason == "NORM_OUTLIER"
        )
        self.fates[entry.key] = reason or "held"
        if not reason:
            self._take(entry, now)
            return
        self._reject(entry, reason)
        if reason in VALUE_REASONS:
            self.unfit.add(name)
            if self.held:
                self.late_unfit.add(name)
            self._forget_unfit()
        limit = self.admission.quarantine_after
        if is_counted and limit is not None and self.bad_counts[name] >= limit:
            self._send_away(name, self.admission.quarantine_seconds, now)

    def _forget_unfit(self) -> None:
        """Names that come and go do not pile up."""
        if len(self.unfit) > self.worker_limit:
            self.unfit &= self.contributors | self.live.keys()
            self.late_unfit &= self.unfit

    def _take(self, entry: Entry, now: float) -> None:
        self.pending_count += 1
        if not self.held:
            self.opened_at = now
        self.held.append(entry)

    def _reject(self, entry: Entry, reason: str) -> None:
        self.fates[entry.key] = reason
        self.rejected_counts[reason] += 1
        self.said.append(Rejected(self.judged[entry.key], reason))

    def _refuse(self, entries: list[Entry], reason: str) -> None:
        self.pending_count -= len(entries)
        for entry in entries:
            self._reject(entry, reason)

    def _count_bad(self, name: str, reason: str) -> bool:
        """Counts it if it is bad, and says whether it is."""
        if not reason:
            self.bad_counts[name] = 0
        outliers = [member.is_outlier for member in self.live.values() if member.norms]
        is_common = reason == "NORM_OUTLIER" and sum(outliers) > len(outliers) / 2
        if reason not in VALUE_REASONS or is_common:
            return False
        self.bad_counts[name] = self.bad_counts.get(name, 0) + 1
        return True

    def _has_norm(self, gradient: Gradient) -> bool:
        return gradient.is_finite and 0 < gradient.norm**2 <= GREATEST_SQUARE

    def _note_norm(self, member: Member, gradient: Gradient, reason: str) -> None:
        if self._has_norm(gradient):
            member.norms = [*member.norms, gradient.norm][-NORM_WINDOW:]
            member.is_outlier = reason == "NORM_OUTLIER"

    def _why_unfit(self, gradient: Gradient) -> str:
        if not gradient.is_finite:
            return "NON_FINITE_GRADIENT"
        if gradient.norm**2 > GREATEST_SQUARE:
            return "GRADIENT_TOO_LARGE"
        admission = self.admission
        if admission.max_norm is not None and gradient.norm > admission.max_norm:
            return "NORM_ABOVE_LIMIT"
        known = [member.norms for member in self.live.values() if member.norms]
        if admission.outlier_factor is None or sum(map(len, known)) < NORMS_TO_JUDGE_BY:
            return ""
        usual = statistics.median([statistics.median(norms) for norms in known])
        return "NORM_OUTLIER" if gradient.norm > admission.outlier_factor * usual else ""

    def _why_untimely(self, header: ContributionHeader, member: Member) -> str:
        staleness, policy = self.closed_step - header.base_step, self.policy
        if isinstance(policy, Synchronous):
            if staleness:
                return "STALE_GRADIENT"
            return "ALREADY_CONTRIBUTED" if member.name in self.contributors else ""
        if isinstance(policy, Asynchronous | Buffered):
            is_stale = policy.max_staleness is not None and staleness > policy.max_staleness
            return "STALE_GRADIENT" if is_stale else ""
        return "AHEAD_OF_BOUND" if member.clock - self.slowest > policy.bound else ""

    def _end_round(self, reason: str) -> None:
        unfit_count = self.unfit_count
        ended, self.held, self.unfit, self.late_unfit = self.held, [], set(), set()
        is_early = reason in ("TIMEOUT", "POLICY_CHANGED")
        if is_early and not is_cohort(len(ended), unfit_count, self.policy):
            self._refuse(ended, "COHORT_TOO_SMALL")
            return
        self.closed_step += 1
        self.rounds.append(ModelRound(reason, unfit_count, [entry.gradient.value for entry in ended]))
        self.fates.update((entry.key, f"step {self.closed_step}") for entry in ended)


def is_cohort(count: int, unfit_count: int, policy: Policy) -> bool:
    """Whether the policy makes a step of so many contributions, beside workers whose bad ones were kept out."""
    if not isinstance(policy, Synchronous | Buffered) or policy.combine == "mean":
        return count >= 1
    needed = fewest_contributions(policy.combine, policy.trim_count)
    is_borne = unfit_count <= policy.trim_count if policy.combine == "trimmed_mean" else unfit_count < count
    return count + (unfit_count if is_borne else 0) >= needed
