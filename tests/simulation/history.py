"""What has happened to a run, and what must hold of it whatever the policy: looked at after every event."""

from collections import Counter
from collections.abc import Mapping
from random import Random

from kedge.policies import BoundedStaleness, Buffered, Synchronous
from kedge_server.core.contributions import Contribution, Round
from kedge_server.core.coordinator import Coordinator
from kedge_server.core.events import Event, EventLog
from kedge_server.core.leases import Lease
from kedge_server.core.values import ContributionHeader, PushResult

from .model import Gradient, is_cohort


class SimulatedContribution(Contribution):
    """A contribution that carries the simulation's gradient."""

    def __init__(self, header: ContributionHeader, gradient: Gradient) -> None:
        super().__init__(header)
        self.gradient = gradient

        self.number = 0
        """They are numbered as they came."""
        self.is_kept = False
        """Whether it is written by itself, or will be, since its worker is told that it is held."""

    @property
    def key(self) -> tuple[str, int, int]:
        return key_of(self)


def key_of(contribution: Contribution) -> tuple[str, int, int]:
    header = contribution.header
    return header.worker_id, header.epoch, header.sequence


def gradient_of(contribution: Contribution) -> Gradient:
    assert isinstance(contribution, SimulatedContribution)
    return contribution.gradient


class Rounds:
    """The rounds that have closed, and each contribution's place in them."""

    def __init__(self) -> None:
        self.closed: list[Round] = []
        self.last_step = 0
        self.step_of: dict[int, int] = {}
        """By the value of the contribution."""
        self._keys: set[tuple[str, int, int]] = set()

    def add(self, closed: Round) -> None:
        assert closed.step == self.last_step + 1, "steps are numbered without a gap"
        self.last_step = closed.step
        self.closed.append(closed)
        for contribution in closed.contributions:
            key, value = key_of(contribution), gradient_of(contribution).value
            assert value not in self.step_of, f"{key} is in steps {self.step_of[value]} and {closed.step}"
            assert key not in self._keys, f"a sequence is in two rounds: {key}"
            assert contribution.result is None, f"{key} had a result before its round closed: {contribution.result}"
            self._keys.add(key)
            self.step_of[value] = closed.step
        _check_round(closed)

    def forget_after(self, count: int, step: int) -> None:
        """The server was killed: only so many were written, and the last of them made this step."""
        for closed in self.closed[count:]:
            for contribution in closed.contributions:
                self._keys.remove(key_of(contribution))
                del self.step_of[gradient_of(contribution).value]
        del self.closed[count:]
        self.last_step = step


class Promises:
    """What workers were told of their contributions, by whichever server: it is never taken back."""

    def __init__(self) -> None:
        self._results: dict[tuple[str, int, int], PushResult] = {}
        self._held: set[tuple[str, int, int]] = set()

    def gave(self, contribution: Contribution) -> None:
        """A worker is told the result."""
        assert contribution.result is not None
        known = self._results.setdefault(key_of(contribution), contribution.result)
        assert known == contribution.result, f"it was {known}, and now it is {contribution.result}"

    def deferred(self, contribution: Contribution) -> None:
        """A worker is told that its contribution is held: it may never come again."""
        self._held.add(key_of(contribution))

    def check(self, fates: dict[tuple[str, int, int], str]) -> None:
        """Whether the run still knows all of them."""
        for key in self._held:
            assert key in fates, f"{key} was held, and is lost"
        for key, result in self._results.items():
            fate = f"step {result.step}" if result.outcome == "applied" else result.reason
            assert fates.get(key) == fate, f"{key} was said to be {fate}, and is {fates.get(key)}"


def _check_round(closed: Round) -> None:
    policy, count, unfit_count = closed.policy, len(closed.contributions), closed.unfit_count
    assert is_cohort(count, unfit_count, policy), f"{policy} made a step of {count}, {unfit_count} kept out"
    if isinstance(policy, Synchronous):
        names = {contribution.header.worker_id for contribution in closed.contributions}
        assert len(names) == count, "a worker is in a round twice"
        assert count <= policy.quorum, f"{count} contributions of a quorum of {policy.quorum}"
        assert all(contribution.header.base_step == closed.step - 1 for contribution in closed.contributions)
    elif isinstance(policy, Buffered):
        assert count == policy.size or (closed.close_reason == "POLICY_CHANGED" and count < policy.size)
    else:
        assert count == 1


class Told:
    """The events, as the run's log keeps them, and what they say of its members."""

    def __init__(self, random: Random, members: Mapping[str, int], applied_step: int) -> None:
        self.applied_step = applied_step
        self.members = dict(members)
        self.counts: Counter[str] = Counter()
        self.rejected: Counter[str] = Counter()
        self.times_empty = 0
        self._random = random
        self._log = EventLog(random.choice([1, 4, 32]))
        self._reader = self._log.read_after(0)
        self._seen: Counter[str] = Counter()
        self._next_number = 1
        self._last_seen_step = 0

    def tell(self, kind: str, *, worker_id: str = "", epoch: int = 0, reason: str = "", **about: object) -> None:
        number = self._log.last_number + 1
        self._log.record(Event(number, 0.0, kind, self.applied_step, worker_id, epoch, reason, **about))
        self.counts[kind] += 1
        if kind == "joined":
            assert worker_id not in self.members, f"{worker_id} joined twice"
            self.members[worker_id] = epoch
        elif kind in ("left", "evicted"):
            assert self.members.pop(worker_id, None) == epoch, f"{worker_id} {kind}, but was not there"
            self.times_empty += not self.members and reason != "WORKER_SUPERSEDED"
        elif kind == "rejected":
            self.rejected[reason] += 1
        if self._random.random() < 0.1:
            self.watch()

    def watch(self) -> None:
        """Reads on; whatever a summary leaves out must be in its counts."""
        for event in self._reader.take(self._random.choice([2, 256])):
            if event.kind == "summary":
                assert sum(event.skipped_counts.values()) == event.number - self._next_number + 1
                self._seen.update(event.skipped_counts)
            else:
                assert event.number == self._next_number, "a watcher missed an event"
                self._seen[event.kind] += 1
            assert event.step >= self._last_seen_step or self.counts["restored"], "the step of an event fell"
            self._next_number, self._last_seen_step = event.number + 1, event.step

    def finish(self) -> None:
        """All that was told has been seen, in person or in a summary."""
        while self._next_number <= self._log.last_number:
            self.watch()
        assert self._seen == self.counts


class Clocks:
    """What bounded staleness promises of each pull."""

    def __init__(self) -> None:
        self._least_step = 0
        self._pulled: dict[str, int] = {}
        """The clock at which a worker may compute now."""
        self._steps: dict[int, int] = {}
        """The step of the weights of all pulls at a clock, in lockstep."""
        self._last_step_of: dict[int, int] = {}
        """The last step made of a contribution that was computed at a clock."""

    def begin_anew(self, step: int) -> None:
        """Nobody is left, or the policy is another one: who pulls from now on gets at least what had closed by then."""
        self._least_step = step
        self._pulled.clear()
        self._steps.clear()
        self._last_step_of.clear()

    def took(self, clock: int, step: int) -> None:
        """A contribution that was computed at this clock became this step."""
        self._last_step_of[clock] = step

    def pulled(self, name: str, step: int, coordinator: Coordinator) -> None:
        policy, leases = coordinator.policy, coordinator.leases
        lease = leases.of_worker(name)
        if not isinstance(policy, BoundedStaleness) or lease is None:
            return
        slowest = min(other.clock for other in leases.live)
        assert lease.clock - slowest <= policy.bound, "a pull passed beyond the bound"
        self._pulled[name] = lease.clock
        computing = [other.clock for other in leases.live if self._pulled.get(other.worker_id) == other.clock]
        assert max(computing) - slowest <= policy.bound
        promised = max(
            (made for clock, made in self._last_step_of.items() if clock < slowest), default=self._least_step
        )
        assert step >= promised, f"weights of step {step} went out, the bound promises those of {promised}"
        if policy.bound == 0:
            assert self._steps.setdefault(lease.clock, step) == step, "workers in lockstep pulled unlike weights"

    def check(self, coordinator: Coordinator, live: list[Lease]) -> None:
        policy = coordinator.policy
        if not isinstance(policy, BoundedStaleness) or not live:
            return
        slowest = min(live, key=lambda lease: lease.clock)
        fastest = max(live, key=lambda lease: lease.clock)
        assert fastest.clock - slowest.clock <= policy.bound + 1
        gate = coordinator.pull_gate(slowest.worker_id)
        assert gate.is_open, "the slowest worker is kept waiting"
        assert gate.min_step <= coordinator.closed_step, "a pull waits for a step that nobody makes"
