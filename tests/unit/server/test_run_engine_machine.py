"""The engine of a run, whatever is done to it in whatever order, against a model: its weights are minus the means of
what the results say that each step was made of."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import NamedTuple, TypeVar

import numpy as np
import pytest
from engine_bench import Bench
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kedge.policies import Asynchronous, BoundedStaleness, Buffered, Policy, Synchronous
from kedge.wire.errors import KedgeError
from kedge_server.core.values import PushResult
from kedge_server.engine.contributions import PendingContribution
from kedge_server.engine.run_state import RunUpdate
from kedge_server.engine.snapshots import Snapshot

T = TypeVar("T")

NAMES = st.sampled_from("abcd")
POLICIES = st.sampled_from(
    [
        Synchronous(1),
        Synchronous(2),
        Synchronous(3, timeout_seconds=3),
        Asynchronous(),
        Asynchronous(max_staleness=1, scaling="inverse"),
        BoundedStaleness(0),
        BoundedStaleness(0),
        BoundedStaleness(1),
        Buffered(2),
        Buffered(3, max_staleness=2, scaling="none"),
    ]
)
LOST = {"LEASE_EXPIRED", "WORKER_SUPERSEDED", "WORKER_EVICTED"}
ENDED = KedgeError("RUN_NOT_FOUND", "the test is over", run="runs/r")


class Pushed(NamedTuple):
    """A contribution that was recorded, and what decides how it counts."""

    contribution: PendingContribution
    key: tuple[str, int, int]
    value: float
    examples: int
    base_step: int
    is_scaled: bool


def weights_at(step: int, pushed: list[Pushed]) -> float:
    """The model: the weights are minus the sum of each step's mean by examples, scaled by staleness where asked."""
    total = 0.0
    for number in range(1, step + 1):
        parts = [p for p in pushed if (r := result_of(p)) and (r.outcome, r.step) == ("applied", number)]
        assert parts, f"nothing became step {number}"
        for p in parts:
            scale = 1 / (1 + result_of(p).staleness) if p.is_scaled else 1.0
            total -= scale * p.value * p.examples / sum(other.examples for other in parts)
    return total


def result_of(pushed: Pushed) -> PushResult | None:
    return pushed.contribution.result


class RunMachine(RuleBasedStateMachine):
    """Up to four workers' names, each rule one call of the engine; between them it comes to rest."""

    @initialize(policy=POLICIES, names=st.sets(NAMES, min_size=1).map(sorted))
    def begin(self, policy: Policy, names: list[str]) -> None:
        self.loop = asyncio.new_event_loop()
        self.bench = self.call(lambda: Bench(policy))
        self.reader = self.bench.run.feed.reader(after_number=0)
        self.leases: dict[str, tuple[int, float, float]] = {}
        """Of those that live: epoch, duration and end, as the test knows them."""
        self.epochs: dict[str, list[int]] = {}
        self.sequences: dict[tuple[str, int], int] = {}
        self.blocked_until: dict[str, float] = {}
        self.pushed: list[Pushed] = []
        self.results: dict[tuple[str, int, int], PushResult] = {}
        self.pulls: dict[asyncio.Task[Snapshot], str] = {}
        self.members: dict[str, int] = {}
        self.event_number = self.event_step = self.request_number = 0
        self.clocks: dict[str, int] = {}
        self.slowest = self.barrier_step = 0
        for name in names:
            self.join(name, 8.0)

    def call(self, do: Callable[[], T | Awaitable[T]]) -> T:
        """Does something on the loop, until everything that follows of it has happened."""

        async def run() -> T:
            answer = do()
            try:
                return await answer if asyncio.iscoroutine(answer) else answer
            finally:
                for _ in range(3):
                    await asyncio.sleep(0)
                    if hasattr(self, "bench"):
                        await self.bench.run.drain()

        return self.loop.run_until_complete(run())

    def fails(self, do: Callable[[], object]) -> str:
        with pytest.raises(KedgeError) as caught:
            self.call(do)
        return caught.value.reason

    @property
    def now(self) -> float:
        return self.bench.clock.now()

    def renew(self, name: str) -> None:
        epoch, duration, _ = self.leases[name]
        self.leases[name] = epoch, duration, self.now + duration

    # Membership

    @rule(name=NAMES, duration=st.sampled_from([2.0, 8.0]))
    def join(self, name: str, duration: float) -> None:
        if self.now < self.blocked_until.get(name, 0.0):
            assert self.fails(lambda: self.bench.join(name, duration)) == "WORKER_EVICTED"
            return
        epoch = self.call(lambda: self.bench.join(name, duration))
        if name not in self.leases:
            self.clocks[name] = min((self.clocks[other] for other in self.leases), default=0)
        self.leases[name] = epoch, duration, self.now + duration
        self.epochs.setdefault(name, []).append(epoch)

    @rule(name=NAMES)
    def heartbeat(self, name: str) -> None:
        for epoch in self.epochs.get(name, [])[-2:]:
            if self.is_live(name, epoch):
                self.call(lambda epoch=epoch: self.bench.run.heartbeat(name, epoch))
                self.renew(name)
            else:
                assert self.fails(lambda epoch=epoch: self.bench.run.heartbeat(name, epoch)) in LOST

    @rule(seconds=st.sampled_from([0.5, 1.0, 1.0, 3.0, 3.0, 9.0]))
    def wait(self, seconds: float) -> None:
        self.call(lambda: self.bench.clock.advance_to(self.now + seconds))
        self.leases = {name: lease for name, lease in self.leases.items() if lease[2] > self.now}

    @rule(name=NAMES)
    def leave(self, name: str) -> None:
        for epoch in self.epochs.get(name, [])[-1:]:
            self.call(lambda epoch=epoch: self.bench.run.leave(name, epoch))
            self.leases.pop(name, None)

    @rule(name=NAMES, block_seconds=st.sampled_from([None, 2.0]))
    def evict(self, name: str, block_seconds: float | None) -> None:
        def evict() -> None:
            self.bench.run.evict(name, "the test says so", block_seconds, request_id="")

        if name not in self.leases:
            assert self.fails(evict) == "WORKER_NOT_FOUND"
            return
        self.call(evict)
        del self.leases[name]
        self.blocked_until[name] = self.now + (block_seconds or 0.0)

    @rule(policy=POLICIES)
    def change_policy(self, policy: Policy) -> None:
        is_new, held_count = policy != self.bench.run.policy, self.bench.run.state().contribution_count
        step, request_id = self.bench.run.snapshot.step, f"request {self.request_number}"
        self.request_number += 1
        answer = self.call(lambda: self.bench.run.update(RunUpdate(policy=policy), request_id=request_id))
        assert self.bench.run.policy == policy
        assert answer == step + 1 + (is_new and held_count > 0)
        if is_new:
            assert self.bench.run.state().contribution_count == 0
            self.clocks = dict.fromkeys(self.clocks, 0)
            self.slowest, self.barrier_step = 0, self.bench.run.snapshot.step

    # Contributions

    @rule(
        name=NAMES,
        value=st.integers(-8, 8),
        examples=st.integers(1, 4),
        lag=st.sampled_from([0, 0, 0, 1, 3]),
        age=st.sampled_from([1, 1, 1, 2]),
    )
    def push(self, name: str, value: int, examples: int, lag: int, age: int) -> None:
        self.submit(name, float(value), examples, lag, age)

    @rule(order=st.permutations("abcd"), value=st.integers(1, 8), examples=st.integers(1, 4), lag=st.integers(0, 1))
    def train(self, order: list[str], value: int, examples: int, lag: int) -> None:
        """Two workers come if nobody is there; then everybody pulls and contributes, each something else."""
        for name in [] if self.leases else order[:2]:
            self.join(name, 8.0)
        for place, name in enumerate([name for name in order if name in self.leases]):
            self.pull(name)
            self.submit(name, float(value + place), examples + place, lag, 1)

    @rule(name=NAMES, value=st.integers(-8, 8), count=st.integers(1, 4))
    def run_ahead(self, name: str, value: int, count: int) -> None:
        """One worker contributes again and again, and then waits for weights, if it has to."""
        for _ in range(count):
            self.submit(name, float(value), 1, 0, 1)
        self.pull_and_wait(name)

    @rule(name=NAMES)
    def push_nan(self, name: str) -> None:
        pushed = self.submit(name, float("nan"), 1, 0, 1)
        assert pushed is None or result_of(pushed).reason == "NON_FINITE_GRADIENT"

    def submit(self, name: str, value: float, examples: int, lag: int, age: int) -> Pushed | None:
        epochs = self.epochs.get(name, [])
        if len(epochs) < age:
            return None
        key = name, epochs[-age], self.sequences.get((name, epochs[-age]), 0) + 1
        base_step = max(self.bench.run.snapshot.step - lag, 0)

        def submit() -> PendingContribution:
            return self.bench.submit(*key, value, base_step=base_step, examples=examples)

        if not self.is_live(*key[:2]):
            assert self.fails(submit) in LOST
            return None
        is_ahead = self.is_ahead(name)
        is_scaled = getattr(self.bench.run.policy, "scaling", "none") == "inverse"
        pushed = Pushed(self.call(submit), key, value, examples, base_step, is_scaled)
        self.pushed.append(pushed)
        self.sequences[key[:2]] = key[2]
        self.renew(name)
        self.clocks[name] += isinstance(self.bench.run.policy, BoundedStaleness) and not is_ahead
        assert not is_ahead or result_of(pushed).outcome == "rejected"
        self.note_the_barrier()
        return pushed

    @precondition(lambda self: self.pushed)
    @rule(which=st.integers(0, 1000))
    def push_again(self, which: int) -> None:
        pushed = self.pushed[which % len(self.pushed)]
        again = self.call(lambda: self.bench.submit(*pushed.key, 100.0, base_step=pushed.base_step))
        assert again is pushed.contribution

    # Pulls

    @rule(names=st.permutations("abcd"))
    def everybody_pulls(self, names: list[str]) -> None:
        for name in names:
            self.pull(name)

    def pull(self, name: str) -> None:
        is_ahead, expected_step = self.is_ahead(name), self.bench.run.snapshot.step
        if name in self.leases and self.bench.run.policy == BoundedStaleness(0):
            expected_step = self.barrier_step

        def pull() -> Awaitable[Snapshot]:
            return self.bench.run.snapshot_for(name, min_step=0, wait_seconds=0)

        if is_ahead:
            assert self.fails(pull) == "WAITING_FOR_SLOWEST"
            return
        snapshot = self.call(pull)
        assert snapshot.step == expected_step
        self.check_weights(snapshot)

    def pull_and_wait(self, name: str) -> None:
        async def begin() -> None:
            pull = self.bench.run.snapshot_for(name, min_step=0, wait_seconds=None)
            self.pulls[asyncio.ensure_future(pull)] = name

        self.call(begin)

    def is_ahead(self, name: str) -> bool:
        policy = self.bench.run.policy
        if not isinstance(policy, BoundedStaleness) or name not in self.leases:
            return False
        return self.clocks[name] - min(self.clocks[other] for other in self.leases) > policy.bound

    # What always holds

    @invariant()
    def note_the_barrier(self) -> None:
        """The step at which the slowest clock rose last, or nobody was left."""
        slowest = min((self.clocks[name] for name in self.leases), default=0)
        if slowest > self.slowest or not self.leases:
            self.barrier_step = self.bench.run.snapshot.step
        self.slowest = slowest

    @invariant()
    def weights_are_the_models(self) -> None:
        self.check_weights(self.bench.run.snapshot)
        for pull in [pull for pull in self.pulls if pull.done()]:
            self.check_weights(pull.result())
            del self.pulls[pull]
        assert all(self.is_ahead(name) for name in self.pulls.values()), "a pull waits for nothing"

    @invariant()
    def each_contribution_has_one_result_that_stays(self) -> None:
        for pushed in self.pushed:
            result = result_of(pushed)
            if result is not None:
                assert self.results.setdefault(pushed.key, result) == result
        state, outcomes = self.bench.run.state(), [result.outcome for result in self.results.values()]
        held_count = len(self.pushed) - len(self.results)
        assert state.contribution_count == held_count == self.bench.staging_in_use
        assert state.applied_count == outcomes.count("applied")
        assert sum(state.rejected_counts.values()) == outcomes.count("rejected")
        assert (self.bench.run.feed._log.last_number > 0) or not self.epochs

    @invariant()
    def events_say_who_lives(self) -> None:
        for event in self.reader.take(10_000):
            assert event.number == self.event_number + 1
            assert event.step >= self.event_step
            self.event_number, self.event_step = event.number, event.step
            if event.kind == "joined":
                self.members[event.worker_id] = event.epoch
            elif event.kind in ("left", "evicted"):
                assert self.members.pop(event.worker_id) == event.epoch
        state = self.bench.run.state()
        live = {lease.worker_id: lease.epoch for lease in state.leases}
        assert live == self.members == {name: epoch for name, (epoch, _, _) in self.leases.items()}
        assert self.bench.clock.live_timer_count <= 1

    def teardown(self) -> None:
        if not hasattr(self, "bench"):
            return
        try:
            self.call(lambda: self.bench.run.end(ENDED))
            self.call(lambda: asyncio.wait(self.pulls) if self.pulls else None)
        finally:
            self.loop.close()
        assert all(pull.exception() is ENDED for pull in self.pulls)
        assert self.bench.staging_in_use == 0

    def is_live(self, name: str, epoch: int) -> bool:
        return name in self.leases and self.leases[name][0] == epoch

    def check_weights(self, snapshot: Snapshot) -> None:
        expected = weights_at(snapshot.step, self.pushed)
        np.testing.assert_allclose(snapshot.fast[0], [expected, expected], rtol=1e-6, atol=1e-6)


TestRunMachine = RunMachine.TestCase
TestRunMachine.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
