"""A coordinator behind a network, as a run's engine uses it, and every answer compared with the model's.

It may be killed at any moment: then the disk is all that is left.
"""

import itertools
from collections import deque
from collections.abc import Callable
from random import Random
from typing import NamedTuple

from kedge.policies import Admission, BoundedStaleness, Policy
from kedge.wire.errors import KedgeError
from kedge_server.core.admission import Inspection
from kedge_server.core.answers import Answers
from kedge_server.core.commits import Commit, Held, Judgement, Restored, Stepped, Updated
from kedge_server.core.contributions import Contribution, Round
from kedge_server.core.coordinator import Bounds, Coordinator
from kedge_server.core.image import RunImage
from kedge_server.core.values import ContributionHeader

from . import facts
from .accounts import check_what_is_said
from .disk import EPOCH_SECONDS, Disk, Ticket, Weights, check_said, go_back
from .history import Clocks, Promises, Rounds, SimulatedContribution, Told, gradient_of
from .likeness import check_likeness
from .loop import Action, Loop
from .model import Entry, Gradient, Model

DIGEST = b"digest"

Reply = Callable[[object], None]


class Setup(NamedTuple):
    """What a simulated run is made with."""

    policy: Policy
    admission: Admission
    bounds: Bounds
    apply_seconds: float
    """The device takes up to so long for a step."""
    timer_delay_seconds: float
    """Timers are up to so late."""
    write_seconds: float = 0.0
    """The disk takes up to so long to write."""
    patience_seconds: float = float("inf")
    """After at most so long a worker is told that its contribution is held."""


class ClosedRound(NamedTuple):
    """A round that is to be applied, and its commit."""

    round: Round
    ticket: Ticket


class Server:
    """One run. Gradients are integers, and a step takes them from the weights.

    Attributes:
        weights: of each applied step.
        apply_seconds: the device takes up to so long for a step.
        is_applying: whether closed rounds are still to be applied.
        is_down: whether it was killed, and is not there again yet.
        judged_at: the clock that each contribution was computed at, by its value.
    """

    def __init__(self, loop: Loop, random: Random, setup: Setup) -> None:
        self.loop, self._random, self._setup = loop, random, setup
        self.rounds, self.clocks, self.promises = Rounds(), Clocks(), Promises()
        self.model = Model(setup.policy, setup.admission, setup.bounds.workers, setup.bounds.contributions)
        self._blank = self.model.blank()
        self.disk = Disk(
            loop, random, policy=setup.policy, admission=setup.admission, write_seconds=setup.write_seconds
        )
        self.apply_seconds = setup.apply_seconds
        self.judged_at: dict[int, int] = {}
        self.gradients: dict[tuple[str, int, int], Gradient] = {}
        self.recorded: dict[tuple[str, int, int], SimulatedContribution] = {}
        self._epochs = itertools.count(1)
        self._life = 0
        self._begin()

    def _begin(self) -> None:
        """A process is started."""
        image, setup = self.disk.image, self._setup
        members = {name: member.epoch for name, member in self.model.live.items()}
        self.told = Told(self._random, members, image.step)
        self.weights = list(self.disk.weights)
        self.coordinator = Coordinator(
            "runs/r",
            digest=DIGEST,
            policy=image.policy,
            admission=image.admission,
            bounds=setup.bounds,
            first_epoch=1,
            tell=self.told.tell,
            commit=self._commit,
        )
        self._evictions = Answers(image.evictions.state())
        self._updates = Answers(image.updates.state())
        self._restores = Answers(image.restores.state())
        self.waiting_pulls: dict[object, tuple[str, float, Reply]] = {}
        self._waiting_pushes: dict[SimulatedContribution, list[Reply]] = {}
        self._queue: deque[ClosedRound] = deque()
        self.is_applying = self.is_down = False
        self._timer_at = float("inf")
        self._times_empty = 0
        self._is_touched = True

    # Crashes

    def crash(self, down_seconds: float) -> None:
        """Kills it; after a while it is started anew."""
        if self.is_down:
            return
        self.is_down, self.is_applying = True, False
        self._life += 1
        self.waiting_pulls.clear()
        self.disk.crash()
        self.loop.after(down_seconds, self._restart)

    def _restart(self) -> None:
        now, before = self.loop.now, self.rounds
        self.model = facts.survivor(self._blank.blank(), self.disk.written, now)
        step_count = sum(isinstance(fact, facts.Stepped) for fact in self.disk.written)
        before.forget_after(step_count, self.model.closed_step)
        self.recorded = {key: known for key, known in self.recorded.items() if key in self.model.fates}
        self._begin()
        self.model.advance(now)
        self.coordinator.resume(self.disk.image, make=self._made_of, now_seconds=now, time_seconds=EPOCH_SECONDS + now)
        if self.coordinator.barrier_step != self.weights[-1].step:
            self.coordinator.forget_barrier()
        self.clocks.begin_anew(self.weights[-1].step)
        self.promises.check(self.model.fates)

    def _made_of(self, contribution: Contribution) -> Contribution:
        header = contribution.header
        key = header.worker_id, header.epoch, header.sequence
        made = SimulatedContribution(header, self.gradients[key])
        made.staleness, made.result = contribution.staleness, contribution.result
        made.number = self.model.judged[key].number
        if contribution.result is None:
            assert self.disk.held[key] == self.gradients[key]
            made.is_kept, made.judgement = True, Judgement.of_held(header, contribution.staleness)
        self.recorded[key] = made
        return made

    def _later(self, seconds: float, action: Action) -> None:
        """Does something after a while, if this process lives then."""
        life = self._life
        self.loop.after(seconds, lambda: action() if life == self._life else None)

    # Commits

    def _commit(self, commit: Commit) -> None:
        assert self.model.said, f"{commit} is committed, and nothing has happened"
        fact = self.model.said.pop(0)
        check_said(commit, fact)
        self.disk.commit(commit, fact)

    def _acknowledge(self, answer: object, reply: Reply) -> None:
        """Answers when all that was done so far is written."""
        self.disk.acknowledge(lambda: reply(answer))

    # What messages ask for

    def join(self, name: str, duration_seconds: float, reply: Reply) -> None:
        if self.is_down:
            return
        epoch, now = next(self._epochs), self.loop.now
        expected = self.model.join(name, epoch, duration_seconds, now)
        self._compare(
            expected,
            lambda: self.coordinator.join(name, epoch=epoch, duration_seconds=duration_seconds, now_seconds=now),
        )
        self._acknowledge(expected or epoch, reply)

    def heartbeat(self, name: str, epoch: int, reply: Reply) -> None:
        if self.is_down:
            return
        expected = self.model.heartbeat(name, epoch, self.loop.now)
        self._compare(expected, lambda: self.coordinator.heartbeat(name, epoch, self.loop.now))
        reply(expected)

    def leave(self, name: str, epoch: int) -> None:
        if self.is_down:
            return
        self.model.leave(name, epoch, self.loop.now)
        self._compare("", lambda: self.coordinator.leave(name, epoch, self.loop.now))

    def check(self, header: ContributionHeader) -> None:
        if self.is_down:
            return
        expected = self.model.check(header, self.loop.now)
        self._compare(expected, lambda: self.coordinator.check(header, self.loop.now))

    def push(self, header: ContributionHeader, gradient: Gradient, reply: Reply) -> None:
        if self.is_down:
            return
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
            contribution.number = self.model.judged[contribution.key].number
            self.gradients[contribution.key] = gradient
            self.judged_at[gradient.value] = clock - 1
        self._answer_push(known or contribution, reply)

    def pull(self, caller: object, name: str, reply: Reply) -> None:
        if not self.is_down:
            self._is_touched = True
            self.waiting_pulls[caller] = (name, self.loop.now, reply)

    # What the operator does, until it is answered

    def evict(self, name: str, block_seconds: float | None, request_id: str, reply: Reply) -> None:
        if self.is_down:
            return
        if not self._was_done(request_id, facts.Ended):
            expected, now = self.model.evict(name, block_seconds, self.loop.now, request_id), self.loop.now
            self._compare(
                expected,
                lambda: self.coordinator.evict(
                    name, "chaos", block_seconds=block_seconds, now_seconds=now, request_id=request_id
                ),
            )
            if not expected:
                self._evictions.remember(request_id, None)
        self._acknowledge(None, reply)

    def update(self, policy: Policy | None, admission: Admission | None, request_id: str, reply: Reply) -> None:
        if self.is_down:
            return
        known = self._updates.find(request_id)
        assert (known is not None) == self._was_done(request_id, facts.Changed)
        answer = self._update(policy, admission, request_id) if known is None else known
        self._acknowledge(answer, reply)

    def _update(self, policy: Policy | None, admission: Admission | None, request_id: str) -> int:
        self._is_touched = True
        if admission is not None:
            self.model.admission = admission
            self.coordinator.set_admission(admission)
        if policy is not None:
            is_new = policy != self.model.policy
            self.model.set_policy(policy, self.loop.now)
            self.coordinator.set_policy(policy, self.loop.now)
            self._take_closed()
            if is_new:
                self.clocks.begin_anew(self.coordinator.closed_step)
        step = self.coordinator.closed_step + 1
        self.disk.commit(
            Updated(request_id, step, policy=policy, admission=admission), facts.Changed(policy, admission, request_id)
        )
        self._updates.remember(request_id, step)
        return step

    def take_checkpoint(self) -> None:
        if not self.is_down and not self.is_applying:
            self.disk.take_checkpoint()

    def restore(self, checkpoint_id: str, request_id: str, reply: Reply) -> None:
        """Goes back to a checkpoint, if nothing is under way."""
        if self.is_down or self.is_applying or not self.disk.is_idle:
            return
        known = self._restores.find(request_id)
        assert (known is not None) == self._was_done(request_id, facts.Restored)
        if known is None:
            known = self._go_back(checkpoint_id, request_id)
        self._acknowledge(known, reply)

    def _go_back(self, checkpoint_id: str, request_id: str) -> int:
        self._is_touched = True
        checkpoint = self.disk.checkpoints[checkpoint_id]
        image, fact_count = RunImage.of(checkpoint.image), checkpoint.fact_count
        self.model.go_back(facts.survivor(self._blank.blank(), self.disk.written[:fact_count], self.loop.now))
        self.coordinator.begin_at(image, self.loop.now)
        self.disk.commit(Restored(request_id, checkpoint_id, image.step), facts.Restored(fact_count, request_id))
        self._restores.remember(request_id, image.step)
        go_back(self.weights, checkpoint.weights)
        self.told.applied_step = self.rounds.last_step = image.step
        self.told.tell("restored")
        self.clocks.begin_anew(image.step)
        return image.step

    def _was_done(self, request_id: str, kind: type) -> bool:
        """Whether a request has been answered, or will be, by what was committed for it."""
        is_done = any(isinstance(fact, kind) and fact.request_id == request_id for fact in self.disk.taken)
        table = {facts.Ended: self._evictions, facts.Changed: self._updates, facts.Restored: self._restores}[kind]
        assert is_done == (request_id in dict(table.state())), f"{request_id} was answered, and is not remembered"
        return is_done

    # After every event

    def follow(self) -> None:
        """What the engine does after every change; and whether all is as it must be."""
        if self.is_down or not self._is_touched:
            return
        self._is_touched = False
        self._take_closed()
        self._apply_next()
        self._check()
        self._answer_pulls()
        due = self.coordinator.due_at_seconds
        if due is not None and due < self._timer_at:
            self._timer_at = due
            delay = self._setup.timer_delay_seconds * self._random.random()
            self._later(max(due + delay - self.loop.now, 0.0), self._on_timer)

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
        assert not model.said, f"{model.said} was not committed"
        assert len(model.rounds) == coordinator.closed_step == self.rounds.last_step, "a round did not close"
        assert [gradient_of(c).value for c in coordinator.held] == [entry.gradient.value for entry in model.held]
        if not self._setup.timer_delay_seconds and self._timer_at > self.loop.now:
            assert not model.why_ended(self.loop.now), "nobody was woken when the round ran out of time"
            check_what_is_said(self)
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
        assert (coordinator.applied_count, coordinator.rejected_counts) == (model.applied_count, model.rejected_counts)
        if self.told.times_empty > self._times_empty:
            self._times_empty = self.told.times_empty
            self.clocks.begin_anew(coordinator.closed_step)
        self.clocks.check(coordinator, live)
        if self.disk.is_idle and not self.is_applying and self._random.random() < 0.1:
            check_likeness(coordinator, self.disk.image)

    def _take_closed(self) -> None:
        for closed in self.coordinator.take_closed():
            self._compare_round(closed)
            judged = tuple(self.model.judged[c.key] for c in closed.contributions)
            commit = Stepped(
                step=closed.step,
                reason=closed.close_reason,
                judgements=tuple(c.judgement for c in closed.contributions),
                loss=None,
                loss_example_count=0,
                values=(),
            )
            fact = facts.Stepped(self.model.rounds[closed.step - 1], judged)
            self._queue.append(ClosedRound(closed, self.disk.commit(commit, fact)))

    def _apply_next(self) -> None:
        if self._queue and not self.is_applying:
            self.is_applying = True
            self._later(self.apply_seconds * self._random.random(), self._apply)

    def _apply(self) -> None:
        closed, ticket = self._queue.popleft()
        ticket.then.append(lambda: self._publish(closed))
        self.disk.provide(ticket, sum(gradient_of(c).value for c in closed.contributions))

    def _publish(self, closed: Round) -> None:
        """A step is applied, and written."""
        self._is_touched, self.is_applying = True, False
        self.weights.append(self.disk.weights[closed.step])
        self.told.applied_step = closed.step
        self.model.pending_count -= len(closed.contributions)
        self.model.applied_count += len(closed.contributions)
        self.coordinator.applied(closed, is_lookahead_sync=closed.step % 5 == 0)

    def _on_timer(self) -> None:
        self._is_touched = True
        self._timer_at = float("inf")
        self.model.advance(self.loop.now)
        self.coordinator.advance(self.loop.now)

    def _answer_push(self, contribution: SimulatedContribution, reply: Reply) -> None:
        if contribution.result is not None:
            self._tell_result(contribution, reply)
            return
        self._waiting_pushes.setdefault(contribution, []).append(reply)
        if self.coordinator.decide(self.loop.now).reason == "BUFFERED":
            self._defer(contribution)
        elif self._setup.patience_seconds < float("inf"):
            self._later(self._setup.patience_seconds * self._random.random(), lambda: self._defer(contribution))

    def _tell_result(self, contribution: SimulatedContribution, reply: Reply) -> None:
        def tell() -> None:
            self.promises.gave(contribution)
            reply(contribution.result)

        self.disk.acknowledge(tell)

    def _defer(self, contribution: SimulatedContribution) -> None:
        """Those who wait are told that it is held, if it still is."""
        if not contribution.is_held:
            return
        replies = self._waiting_pushes.pop(contribution, [])
        if (contribution.key[0], contribution.key[1]) in self.model.evicted:
            for reply in replies:
                reply("WORKER_EVICTED")
            return
        if not contribution.is_kept:
            contribution.is_kept = True
            fact = facts.Held(self.model.judged[contribution.key])
            self.disk.commit(Held(contribution.judgement), fact, contribution.gradient)

        def tell() -> None:
            self.promises.deferred(contribution)
            for reply in replies:
                reply("deferred")

        self.disk.acknowledge(tell)

    def _answer_pulls(self) -> None:
        for contribution in [c for c in self._waiting_pushes if c.result is not None]:
            for reply in self._waiting_pushes.pop(contribution):
                self._tell_result(contribution, reply)
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


def _inspection(gradient: Gradient) -> Inspection:
    inspection = Inspection()
    inspection.sum_of_squares = gradient.norm**2
    inspection.non_finite_element = None if gradient.is_finite else 3
    return inspection
