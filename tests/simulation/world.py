"""Everything that a seed stands for: a run, its workers, the network between them, and what befalls them."""

import itertools
import math
from collections.abc import Callable
from random import Random

from kedge.policies import Admission, Asynchronous, BoundedStaleness, Buffered, Policy, Synchronous
from kedge_server.core.coordinator import Bounds

from .accounts import settle
from .loop import Faults, Loop, Network
from .server import Reply, Server, Setup
from .workers import RETRY_SECONDS, Manners, Process

CHAOS_SECONDS = 5.0
RECOVERY_SECONDS = 1.5
"""So long after the network heals, messages that it lost may still be missed."""
TURNAROUND_SECONDS = 1.2
"""A worker that goes on takes at most so long from one contribution to the next."""
LONGEST_LEASE_SECONDS = 2.0
CALM_SECONDS = RECOVERY_SECONDS + LONGEST_LEASE_SECONDS
MOST_IN_A_ROUND = 6


class World:
    """A run that is set up, and befallen, as its seed says."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.loop = Loop(self._after_each)
        self.server = Server(self.loop, self.random, self._setup())
        chance, delay = self.random.random, self.random.choice([0.02, 0.2, 0.8])
        faults = Faults(0.15 * chance(), 0.2 * chance(), delay, 0.1 * chance(), 3 * chance())
        self.network = Network(self.loop, self.random, faults)
        self.processes: list[Process] = []
        self._values, self._request_numbers = itertools.count(1), itertools.count(1)
        self._names = [f"w{number}" for number in range(self.random.choice([2, 3, 3, 4, 4, 5, 6, 8]))]
        self._calm_at = float("inf")

    def run(self) -> None:
        """Chaos, then calm; then everybody goes, and everything is accounted for."""
        for name in self._names:
            latest = self.random.choice([0.1, 0.1, 3.0])
            self.loop.after(latest * self.random.random(), lambda name=name: self._add(name))
        for _ in range(self.random.randint(0, 16)):
            self.loop.after(CHAOS_SECONDS * self.random.random(), self._befall)
        self.loop.run_until(CHAOS_SECONDS)
        self._calm_down()
        self.loop.run_until(CHAOS_SECONDS + CALM_SECONDS)
        self._check_everybody_goes_on()
        self._end()

    # Chaos

    def _befall(self) -> None:
        what = self.random.choice(
            [self._pause, self._pause, self._kill, self._clone, self._part, self._add_new, self._evict]
            + [self._change_policy] * 3
            + [self._change_admission, self._black_out, self._sleep, self._grow]
            + [self._crash] * 4
            + [self._checkpoint, self._checkpoint, self._restore]
        )
        what()

    def _add(self, name: str) -> Process:
        process = Process(
            name,
            self.random.uniform(0.7, LONGEST_LEASE_SECONDS),
            self._manners(),
            server=self.server,
            network=self.network,
            random=self.random,
            gradient=lambda _: next(self._values),
        )
        self.processes.append(process)
        process.start()
        return process

    def _restart(self, name: str) -> None:
        if self.loop.now < self._calm_at:
            self._add(name)

    def _add_new(self) -> None:
        self._add(f"late{len(self.processes)}")

    def _clone(self) -> None:
        self._add(self.random.choice(self._names))

    def _somebody(self) -> Process | None:
        return self.random.choice(self.processes) if self.processes else None

    def _pause(self) -> None:
        process = self._somebody()
        if process is not None:
            self._pause_for(process, self.random.uniform(0.1, 2 * LONGEST_LEASE_SECONDS))

    def _black_out(self) -> None:
        seconds = self.random.uniform(0.1, 1.2 * LONGEST_LEASE_SECONDS)
        for process in self.processes:
            self._pause_for(process, seconds)

    def _sleep(self) -> None:
        """The server's machine and all others stop, and every lease may run out at once."""
        self.loop.sleep(self.random.uniform(0.1, 1.2 * LONGEST_LEASE_SECONDS))

    def _pause_for(self, process: Process, seconds: float) -> None:
        process.is_paused = True
        self.loop.after(seconds, lambda: self._continue(process))

    def _continue(self, process: Process) -> None:
        process.is_paused = process.is_dead

    def _kill(self) -> None:
        process = self._somebody()
        if process is not None:
            process.is_dead = True
            if self.random.random() < 0.5:
                self.loop.after(3 * self.random.random(), lambda: self._restart(process.name))

    def _part(self) -> None:
        process = self._somebody()
        if process is not None and not process.is_dead:
            process.leave()

    def _evict(self) -> None:
        name, block_seconds = self.random.choice(self._names), self.random.choice([None, 1.0, 4.0])
        self._ask(lambda request_id, reply: self.server.evict(name, block_seconds, request_id, reply))

    def _change_policy(self) -> None:
        policy, admission = self._policy(), self.random.choice([None, None, self._admission()])
        self._ask(lambda request_id, reply: self.server.update(policy, admission, request_id, reply))

    def _change_admission(self) -> None:
        admission = self._admission()
        self._ask(lambda request_id, reply: self.server.update(None, admission, request_id, reply))

    def _crash(self) -> None:
        self.server.crash(self.random.choice([0.0, 0.1, 0.8]) * self.random.random())

    def _checkpoint(self) -> None:
        self.server.take_checkpoint()

    def _restore(self) -> None:
        checkpoint_id = self.random.choice(list(self.server.disk.checkpoints))
        self._ask(lambda request_id, reply: self.server.restore(checkpoint_id, request_id, reply))

    def _ask(self, send: Callable[[str, Reply], None]) -> None:
        """Asks on behalf of the operator until it is answered, always the same; now and then once more."""
        request_id, wanted = f"request {next(self._request_numbers)}", self.random.choice([1, 1, 3])
        answers: list[object] = []

        def attempt() -> None:
            is_enough = len(answers) >= wanted or self.loop.now >= self._calm_at
            if not is_enough:
                send(request_id, answers.append)
                self.loop.after(0.3, attempt)
            assert len(set(answers)) <= 1, "a repeated request got another answer"

        attempt()

    def _grow(self) -> None:
        """What all send is larger from now on, or as it was."""
        scale = self.random.choice([1.0, 7.0])
        for process in self.processes:
            process.scale = scale

    # Calm

    def _calm_down(self) -> None:
        """From now on nothing is lost, and whoever still runs goes on as it should, under a name of its own."""
        self.network.faults = Faults()
        self.server.apply_seconds = min(self.server.apply_seconds, 0.05)
        self.server.disk.write_seconds = min(self.server.disk.write_seconds, 0.02)
        self._calm_at = self.loop.now
        names = set()
        for process in self.random.sample(self.processes, len(self.processes)):
            process.manners, process.scale = Manners(think_seconds=0.8), 1.0
            process.is_dead |= process.is_paused or process.name in names
            if not process.is_dead:
                names.add(process.name)

    def _after_each(self) -> None:
        self.server.follow()
        if self.loop.now > self._calm_at + RECOVERY_SECONDS:
            self._check_nobody_waits()

    def _check_nobody_waits(self) -> None:
        """A lost worker delays the others by its lease at most."""
        patience = LONGEST_LEASE_SECONDS + TURNAROUND_SECONDS
        calm_at, model = self._calm_at + RECOVERY_SECONDS, self.server.model
        if isinstance(model.policy, Synchronous) and model.held and not model.lacks_workers:
            assert self.loop.now <= max(calm_at, self._complete_since()) + patience, "a round does not end"
        for name, since, _ in self.server.waiting_pulls.values():
            assert self.loop.now <= max(calm_at, since) + patience, f"{name} waits for weights"

    def _complete_since(self) -> float:
        """The last moment at which something came that an open round may have had to wait for."""
        model = self.server.model
        joined_at = max(member.joined_at for member in model.live.values())
        came = joined_at if model.policy.combine != "mean" else 0.0
        return max(model.opened_at, model.formed_at, came)

    def _check_everybody_goes_on(self) -> None:
        """Whoever runs is answered, unless the run says that workers are missing."""
        model = self.server.model
        if model.lacks_workers:
            return
        live = model.live
        before = {p: p.answered_count for p in self.processes if not p.is_dead and p.name in live}
        self.loop.run_until(self.loop.now + RETRY_SECONDS + TURNAROUND_SECONDS)
        still = [process.name for process, count in before.items() if process.answered_count == count]
        assert not still, f"{still} wait for an answer"

    def _end(self) -> None:
        for process in self.processes:
            process.is_dead = True
        self.loop.run_until(self.loop.now + 2 * LONGEST_LEASE_SECONDS)
        self._drain()
        settle(self.server)
        policy = Asynchronous()
        other = policy if self.server.model.policy != policy else BoundedStaleness(3)
        self.server.update(other, None, "the end", lambda _: None)
        self._drain()
        assert not self.server.coordinator.held
        assert self.server.coordinator._pending_count == 0
        settle(self.server)

    def _drain(self) -> None:
        self.loop.after(0.0, lambda: None)  # one more event, after which the server follows
        self.loop.run_until(self.loop.now + 0.1)
        while self.server.is_applying or not self.server.disk.is_idle:
            self.loop.run_until(self.loop.now + 0.1)

    # What a seed chooses

    def _setup(self) -> Setup:
        chance = self.random.random
        bounds = Bounds(self.random.choice([3, 64, 64]), self.random.choice([MOST_IN_A_ROUND, MOST_IN_A_ROUND, 256]))
        apply_seconds, timer_delay = self.random.choice([0.0, 0.1, 0.8]), self.random.choice([0.0, 0.0, 0.3])
        write_seconds, patience = self.random.choice([0.0, 0.02, 0.5]), self.random.choice([math.inf, 0.3, 1.0])
        return Setup(
            self._policy(), self._admission(), bounds, apply_seconds * chance(), timer_delay, write_seconds, patience
        )

    def _policy(self) -> Policy:
        pick, count = self.random.choice, self.random.randint(1, MOST_IN_A_ROUND)
        robust = self._combine(count)
        stale = pick([None, None, 0, 1, 4])
        kind = pick(["synchronous", "synchronous", "asynchronous", "bounded", "bounded", "buffered"])
        if kind == "synchronous":
            return Synchronous(count, timeout_seconds=pick([None, None, 0.5, 2.0]), **robust)
        if kind == "asynchronous":
            return Asynchronous(stale, pick(["none", "inverse"]))
        if kind == "bounded":
            return BoundedStaleness(pick([0, 0, 1, 2]))
        return Buffered(count, max_staleness=stale, **robust)

    def _combine(self, count: int) -> dict[str, object]:
        fits: list[dict[str, object]] = [{}, {}]
        if count >= 3:
            fits += [{"combine": "median"}, {"combine": "trimmed_mean"}]
        if count >= 5:
            fits += [{"combine": "trimmed_mean", "trim_count": 2}]
        return self.random.choice(fits)

    def _admission(self) -> Admission:
        pick = self.random.choice
        return Admission(
            max_norm=pick([None, 8.0]),
            outlier_factor=pick([None, 4.0]),
            quarantine_after=pick([None, 1, 3]),
            quarantine_seconds=pick([0.5, 3.0]),
        )

    def _manners(self) -> Manners:
        if self.random.random() < 0.4:
            return Manners()
        pick = self.random.choice
        return Manners(
            think_seconds=pick([0.1, 0.4, 2.0]),
            not_finite=pick([0.0, 0.1, 0.8]),
            too_large=pick([0.0, 0.2]),
            without_pull=pick([0.0, 0.2, 0.9]),
            from_old_weights=pick([0.0, 0.2]),
            ahead_of_itself=pick([0.0, 0.1]),
            impatient=pick([0.0, 0.3, 0.9]),
        )
