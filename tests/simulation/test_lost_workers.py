"""A lost worker delays the others by its lease at most, and not for long: by virtual time."""

import itertools
from random import Random

import pytest

from kedge.policies import BoundedStaleness, Policy, Synchronous

from .loop import Faults
from .quiet import quiet_run
from .rerun import each_seed
from .workers import Process

TURNAROUND_SECONDS = 1.0
"""A worker that goes on takes at most so long from one contribution to the next."""
RUN_SECONDS = 6.0


class Losses:
    """A run of which all workers but one die, one after the other."""

    def __init__(self, policy_of: type[Policy], seed: int) -> None:
        random, values = Random(seed), itertools.count(1)
        count = random.randint(2, 8)
        policy = Synchronous(random.randint(1, count)) if policy_of is Synchronous else BoundedStaleness(seed % 3)
        faults = Faults(repetition=0.1, delay_seconds=0.05)
        self.server, new_process = quiet_run(policy, random, faults, apply_seconds=0.02, look=self._look)
        self._leases = [random.uniform(0.8, 2.5) for _ in range(count)]
        self._workers = [
            new_process(f"w{number}", lease, lambda _: next(values)) for number, lease in enumerate(self._leases)
        ]
        for worker in self._workers[1:]:
            self.server.loop.after(RUN_SECONDS * 0.5 * random.random(), lambda worker=worker: _kill(worker))

    def run(self) -> None:
        self.server.loop.run_until(RUN_SECONDS)
        survivor = self._workers[0]
        assert set(self.server.model.live) == {survivor.name}
        before = survivor.answered_count
        self.server.loop.run_until(RUN_SECONDS + 2 * TURNAROUND_SECONDS)
        assert survivor.answered_count > before

    def _look(self) -> None:
        patience, model = max(self._leases) + TURNAROUND_SECONDS, self.server.model
        if model.held:
            assert self.server.loop.now <= model.opened_at + patience, "a round does not end"
        for name, since, _ in self.server.waiting_pulls.values():
            assert self.server.loop.now <= since + patience, f"{name} waits for weights"


def _kill(worker: Process) -> None:
    worker.is_dead = True


@pytest.mark.parametrize("policy_of", [Synchronous, BoundedStaleness])
def test_no_step_is_delayed_by_more_than_the_longest_lease(quiet_seeds: range, policy_of: type[Policy]) -> None:
    each_seed(quiet_seeds, "lost_workers", lambda seed: Losses(policy_of, seed).run())
