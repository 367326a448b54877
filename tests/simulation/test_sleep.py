"""The server sleeps, and when it wakes every lease has run out: the round that was open ends with what it had."""

import itertools
from random import Random

import pytest

from kedge.policies import Synchronous

from .history import gradient_of
from .loop import Faults
from .quiet import quiet_run
from .rerun import each_seed

TURNAROUND_SECONDS = 1.0
LONGEST_LEASE_SECONDS = 2.5


def simulate(seed: int, **robust: object) -> None:
    random, values = Random(seed), itertools.count(1)
    count = random.randint(3, 8)
    faults = Faults(repetition=0.1, delay_seconds=0.05)
    server, new_process = quiet_run(Synchronous(count, **robust), random, faults, apply_seconds=0.02)
    workers = [
        new_process(f"w{number}", random.uniform(0.8, LONGEST_LEASE_SECONDS), lambda _: next(values))
        for number in range(count)
    ]
    server.loop.run_until(1 + 2 * random.random())
    while not server.model.held:
        server.loop.run_until(server.loop.now + 0.01)
    held = [gradient_of(contribution).value for contribution in server.coordinator.held]
    steps = len(server.rounds.closed)

    server.loop.sleep(LONGEST_LEASE_SECONDS)
    server.loop.run_until(server.loop.now + 3 * TURNAROUND_SECONDS)
    assert [gradient_of(c).value for c in server.rounds.closed[steps].contributions][: len(held)] == held
    if not robust:
        assert server.rounds.closed[steps].close_reason == "ALL_LIVE_CONTRIBUTED"
    assert set(server.model.live) == {worker.name for worker in workers}, "they have joined again"
    assert len(server.rounds.closed) > steps + 1, "and go on"


@pytest.mark.parametrize("robust", [{}, {"combine": "median"}], ids=["mean", "median"])
def test_round_that_was_open_when_every_lease_ran_out_ends(quiet_seeds: range, robust: dict[str, object]) -> None:
    each_seed(quiet_seeds, "sleep", lambda seed: simulate(seed, **robust))
