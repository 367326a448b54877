"""A coordinator behind a network, as a run's engine uses it, and every answer compared with the model's."""

import itertools
from collections import deque
from collections.abc import Callable
from random import Random
from typing import NamedTuple

from kedge.policies import Admission, BoundedStaleness, Policy, Synchronous
from kedge.wire.errors import KedgeError
from kedge_server.core.admission import Inspection
from kedge_server.core.contributions import Round
from kedge_server.core.coordinator import Bounds, Coordinator
from kedge_server.core.values import ContributionHeader

from .history import Clocks, Rounds, SimulatedContribution, Told, gradient_of
from .loop import Loop
from .model import Entry, Gradient, Model

DIGEST = b"digest"
MODULUS = (1 << 61) - 1

Reply = Callable[[object], None]


class Weights(NamedTuple):
    """What a pull is answered with."""

    step: int
    value: int


class Setup(NamedTuple):
    """What a simulated run is made with."""

    policy: Policy
    admission: Admission
    bounds: Bounds
    apply_seconds: float
    """The device takes up to so long for a step."""
    timer_delay_seconds: float
    """Timers are up to so late."""


class Server:
    """One run. Gradients are integers, and a step takes them from the weights.

    Attributes:
        weights: of each applied step.
        apply_seconds: the device takes up to so long for a step.
        is_applying: whether closed rounds are still to be applied.
        judged_at: the clock that each contribution was computed at, by its value.
    """

    def __init__(self, loop: Loop, random: Random, setup: Setup) -> None:
        self.loop, self._random, self._setup = loop, random, setup
        self.told, self.rounds, self.clocks = Told(random), Rounds(), Clocks()
        self.model = Model(setup.policy, setup.admission, setup.bounds.workers, setup.bounds.contributions)
        self.coordinator = Coordinator(
            "runs/r",
            digest=DIGEST,
            policy=setup.policy,
            admission=setup.admission,
            bounds=setup.bounds,
            first_epoch=1,
            tell=self.told.tell,
        )
        self.weights = [Weights(0, 0)]
        self.apply_seconds = setup.apply_seconds
        self.judged_at: dict[int, int] = {}
        self.recorded: dict[tuple[str, int, int], SimulatedContribution] = {}
        self.waiting_pulls: dict[object, tuple[str, float, Reply]] = {}
        self._waiting_pushes: dict[SimulatedContribution, list[Reply]] = {}
        self._queue: deque[Round] = deque()
        self.is_applying = False
        self._timer_at = float("inf")
        self._epochs = itertools.count(1)
        self._times_empty = 0
        self._is_touched = False

    # What messages ask for

    def join(self, name: str, duration_seconds: float, reply: Reply) -> None:
        epoch, now = next(self._epochs), self.loop.now
        expected = self.model.join(name, epoch, duration_seconds, now)
        self._compare(
            expected,
            lambda: self.coordinator.join(name, epoch=epoch, duration_seconds=duration_seconds, now_seconds=now),
        )
        reply(expected or epoch)

    def heartbeat(self, name: str, epoch: int, reply: Reply) -> None:
        expected = self.model.heartbeat(name, epoch, self.loop.now)
        self._compare(expected, lambda: self.coordinator.heartbeat(name, epoch, self.loop.now))
        reply(expected)

    def leave(self, name: str, epoch: int) -> None:
        self.model.leave(name, epoch, self.loop.now)
        self._compare("", lambda: self.coordinator.leave(name, epoch, self.loop.now))

    def check(self, header: ContributionHeader) -> None:
        expected = self.model.check(header, self.loop.now)
        self._compare(expected, lambda: self.coordinator.check(header, self.loop.now))

    def push(self, header: ContributionHeader, gradient: Gradient, reply: Reply) -> None:
        contribution = SimulatedContribution(header, gradient)
        known = self.recorded.get(contribution.key)
        member = self.model.live.get(header.worker_id)
        expected = self.model.submit(Entry(header, gradient), self.loop.now)
        clock = member.clock if member is not None else 0
        taken = self._compare(
            expected, lambda: self.coordinator.submit(contribution, _inspection(gradient), self.loop.now)
        )
        if expected:
            reply(expected)
            return
        assert taken is (known or contribution), "a repeated sequence gets the contribution that was recorded"
        if known is None:
            self.recorded[contribution.key] = contribution
            self.judged_at[gradient.value] = clock - 1
        self._answer_push(known or contribution, reply)

    def pull(self, caller: object, name: str, reply: Reply) -> None:
        self._is_touched = True
        self.waiting_pulls[caller] = (name, self.loop.now, reply)

    # What the operator does

    def evict(self, name: str, block_seconds: float | None) -> None:
        expected, now = self.model.evict(name, block_seconds, self.loop.now), self.loop.now
        self._compare(
            expected, lambda: self.coordinator.evict(name, "chaos", block_seconds=block_seconds, now_seconds=now)
        )

    def set_policy(self, policy: Policy) -> None:
        self._is_touched = True
        is_new = policy != self.model.policy
        self.model.set_policy(policy, self.loop.now)
        self.coordinator.set_policy(policy, self.loop.now)
        if is_new:
            self.clocks.begin_anew(self.coordinator.closed_step)

    def set_admission(self, admission: Admission) -> None:
        self.model.admission = admission
        self.coordinator.set_admission(admission)

    # After every event

    def follow(self) -> None:
        """What the engine does after every change; and whether all is as it must be."""
        if not self._is_touched:
            return
        self._is_touched = False
        for closed in self.coordinator.take_closed():
            self._compare_round(closed)
            self._queue.append(closed)
        self._apply_next()
        self._check()
        self._answer_pulls()
        due = self.coordinator.due_at_seconds
        if due is not None and due < self._timer_at:
            self._timer_at = due
            delay = self._setup.timer_delay_seconds * self._random.random()
            self.loop.after(max(due + delay - self.loop.now, 0.0), self._on_timer)

    def finish(self) -> None:
        """Settles the accounts, when everything that closed has been applied."""
        assert not self.is_applying
        self.told.finish()
        recorded = {c.gradient.value for c in self.recorded.values()}
        rejected = {c.gradient.value for c in self.recorded.values() if c.result and c.result.outcome == "rejected"}
        applied, held = self.rounds.step_of.keys(), {gradient_of(c).value for c in self.coordinator.held}
        assert recorded == applied | rejected | held
        assert len(recorded) == len(applied) + len(rejected) + len(held), "a contribution has two fates"
        assert self.coordinator.applied_count == len(applied)
        assert self.coordinator.rejected_counts.total() == len(rejected)
        assert self.coordinator.rejected_counts == self.told.rejected
        assert self.coordinator._pending_count == len(held)
        assert self.told.counts["step"] == len(self.rounds.closed)
        for contribution in self.recorded.values():
            self._check_fate(contribution)

    # Within

    def _compare(self, expected: str, call: Callable[[], object]) -> object:
        """Calls the coordinator, which must answer as the model."""
        self._is_touched = True
        answer, reason, about = None, "", ""
        try:
            answer = call()
        except KedgeError as error:
            reason, about = error.reason, str(error)
        assert reason == expected, about
        return answer

    def _compare_round(self, closed: Round) -> None:
        self.rounds.add(closed)
        assert len(self.model.rounds) >= closed.step, f"a round closed that should not: {closed.close_reason}"
        expected = self.model.rounds[closed.step - 1]
        values = [gradient_of(c).value for c in closed.contributions]
        assert (closed.close_reason, closed.unfit_count, values) == expected
        if isinstance(closed.policy, BoundedStaleness):
            self.clocks.took(self._clock_of(closed), closed.step)

    def _clock_of(self, closed: Round) -> int:
        value = gradient_of(closed.contributions[0]).value
        return self.judged_at[value]

    def _check(self) -> None:
        model, coordinator = self.model, self.coordinator
        assert len(model.rounds) == coordinator.closed_step == len(self.rounds.closed), "a round did not close"
        assert [gradient_of(c).value for c in coordinator.held] == [entry.gradient.value for entry in model.held]
        if not self._setup.timer_delay_seconds and self._timer_at > self.loop.now:
            assert not model.why_ended(self.loop.now), "nobody was woken when the round ran out of time"
            self._check_what_is_said()
        live = coordinator.leases.live
        assert len(live) == len(model.live)
        for lease in live:
            member = model.live[lease.worker_id]
            assert (lease.epoch, lease.clock, lease.expires_at_seconds) == (
                member.epoch,
                member.clock,
                member.expires_at,
            )
        assert {lease.worker_id: lease.epoch for lease in live} == self.told.members, "the events say otherwise"
        assert coordinator._pending_count == model.pending_count
        if self.told.times_empty > self._times_empty:
            self._times_empty = self.told.times_empty
            self.clocks.begin_anew(coordinator.closed_step)
        self.clocks.check(coordinator, live)

    def _check_what_is_said(self) -> None:
        """Nobody waits in silence."""
        model, coordinator = self.model, self.coordinator
        if not isinstance(model.policy, Synchronous) or not model.live:
            return
        said = coordinator.waiting_for()
        assert said or not (model.held or model.lacks_workers)
        if model.held:
            reason = "WAITING_FOR_COHORT" if model.waits_for_cohort else "WAITING_FOR_QUORUM"
            assert coordinator.decide(self.loop.now).reason == reason

    def _apply_next(self) -> None:
        if self._queue and not self.is_applying:
            self.is_applying = True
            self.loop.after(self.apply_seconds * self._random.random(), self._apply)

    def _apply(self) -> None:
        self._is_touched = True
        closed, self.is_applying = self._queue.popleft(), False
        total = sum(gradient_of(c).value for c in closed.contributions)
        self.weights.append(Weights(closed.step, (self.weights[-1].value - total) % MODULUS))
        self.told.applied_step = closed.step
        self.model.pending_count -= len(closed.contributions)
        self.coordinator.applied(closed, is_lookahead_sync=closed.step % 5 == 0)

    def _on_timer(self) -> None:
        self._is_touched = True
        self._timer_at = float("inf")
        self.model.advance(self.loop.now)
        self.coordinator.advance(self.loop.now)

    def _answer_push(self, contribution: SimulatedContribution, reply: Reply) -> None:
        if contribution.result is not None:
            reply(contribution.result)
        elif self.coordinator.decide(self.loop.now).reason == "BUFFERED":
            reply("BUFFERED")
        else:
            self._waiting_pushes.setdefault(contribution, []).append(reply)

    def _answer_pulls(self) -> None:
        for contribution in [c for c in self._waiting_pushes if c.result is not None]:
            for reply in self._waiting_pushes.pop(contribution):
                reply(contribution.result)
        for caller, (name, _, reply) in list(self.waiting_pulls.items()):
            weights = self._weights_for(name)
            if weights is not None:
                del self.waiting_pulls[caller]
                self.clocks.pulled(name, weights.step, self.coordinator)
                reply(weights)

    def _weights_for(self, name: str) -> Weights | None:
        gate = self.coordinator.pull_gate(name)
        member, policy = self.model.live.get(name), self.model.policy
        is_ahead = (
            member is not None
            and isinstance(policy, BoundedStaleness)
            and member.clock - self.model.slowest > policy.bound
        )
        assert gate.is_open != is_ahead
        if is_ahead or len(self.weights) <= gate.min_step:
            return None
        return self.weights[gate.min_step] if gate.is_exact else self.weights[-1]

    def _check_fate(self, contribution: SimulatedContribution) -> None:
        fate, result = self.model.fates[contribution.key], contribution.result
        if fate == "held":
            assert result is None
        elif fate.startswith("step"):
            assert result is not None
            assert (result.outcome, f"step {result.step}") == ("applied", fate)
        else:
            assert result is not None
            assert (result.outcome, result.reason) == ("rejected", fate)


def _inspection(gradient: Gradient) -> Inspection:
    inspection = Inspection()
    inspection.sum_of_squares = gradient.norm**2
    inspection.non_finite_element = None if gradient.is_finite else 3
    return inspection
