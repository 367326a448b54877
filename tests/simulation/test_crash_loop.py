"""A worker that joins again and again and never contributes holds the others up no longer than a lease."""

import itertools
from random import Random

import pytest

from kedge.policies import Synchronous

from .loop import Faults
from .quiet import quiet_run
from .rerun import each_seed

TURNAROUND_SECONDS = 1.0
"""A worker that goes on takes at most so long from one contribution to the next."""
RUN_SECONDS = 8.0


class CrashLoop:
    """A run that has its quorum only with the worker that crashes, each time before it contributes."""

    def __init__(self, seed: int, *, keeps_its_name: bool) -> None:
        random, values = Random(seed), itertools.count(1)
        count, self._joins = random.randint(1, 5), itertools.count()
        faults = Faults(repetition=0.1, delay_seconds=0.05)
        policy = Synchronous(count + 1)
        self.server, new_process = quiet_run(policy, random, faults, apply_seconds=0.02, look=self._look)
        self._keeps_its_name = keeps_its_name
        self._lease_seconds = random.uniform(0.8, 2.5)
        self._workers = [
            new_process(f"w{number}", random.uniform(0.8, 2.5), lambda _: next(values)) for number in range(count)
        ]
        self._crash()

    def run(self) -> None:
        self.server.loop.run_until(RUN_SECONDS)
        assert self.server.rounds.closed
        assert {closed.close_reason for closed in self.server.rounds.closed} == {"ALL_LIVE_CONTRIBUTED"}
        for worker in self._workers:
            assert worker.answered_count >= RUN_SECONDS // self._patience_seconds

    @property
    def _patience_seconds(self) -> float:
        return self._lease_seconds + TURNAROUND_SECONDS

    def _crash(self) -> None:
        name = "looper" if self._keeps_its_name else f"looper{next(self._joins)}"
        self.server.join(name, self._lease_seconds, lambda _: None)
        self.server.loop.after(self._lease_seconds / 2, self._crash)

    def _look(self) -> None:
        model = self.server.model
        assert not model.held or self.server.loop.now <= model.opened_at + self._patience_seconds


@pytest.mark.parametrize("keeps_its_name", [True, False], ids=["one name", "new names"])
def test_worker_in_a_crash_loop_holds_nobody_up(quiet_seeds: range, keeps_its_name: bool) -> None:
    each_seed(quiet_seeds, "crash_loop", lambda seed: CrashLoop(seed, keeps_its_name=keeps_its_name).run())
