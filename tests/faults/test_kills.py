"""Workers that are killed at any moment, and replaced: the others go on, and nothing is lost or counted twice."""

import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
from marking_worker import Task
from worker_fleet import Fleet, Member, longest_gap

import kedge

WORKERS = 8
LEASE = 2.0
BOUND = LEASE + 1
WAVE_SECONDS = 20.0
KILLS_A_WAVE = 3
SEED = 7


class Deed(NamedTuple):
    """A kill, or the start of the one in the place of who was killed."""

    at: float
    """Seconds after the wave begins."""
    place: int
    is_kill: bool


def wave(dice: random.Random) -> list[Deed]:
    """Three of eight killed at random times, each replaced one to four seconds later."""
    deeds = []
    for place in dice.sample(range(WORKERS), KILLS_A_WAVE):
        killed_at = dice.uniform(0.5, WAVE_SECONDS - 6)
        deeds += [Deed(killed_at, place, True), Deed(killed_at + dice.uniform(1, 4), place, False)]
    return sorted(deeds)


def due(dice: random.Random, waves: int) -> Iterator[Deed]:
    """The deeds of some waves, each when it is time for it; ends with the last wave."""
    clock = threading.Event()
    for _ in range(waves):
        began_at = time.monotonic()
        for deed in wave(dice):
            clock.wait(began_at + deed.at - time.monotonic())
            yield deed
        clock.wait(began_at + WAVE_SECONDS - time.monotonic())


def live_through(fleet: Fleet, task: Task, dice: random.Random, waves: int) -> list[Member]:
    """Kills and replaces; those who were killed."""
    places = fleet.start(*(task.called(f"w{place}", place) for place in range(WORKERS)))
    fleet.wait_for_step(3)
    killed = []
    for deed in due(dice, waves):
        if deed.is_kill:
            places[deed.place].kill()
            killed.append(places[deed.place])
        else:
            (places[deed.place],) = fleet.start(task.called(f"w{deed.place}-{len(killed)}-{deed.at:.3f}", deed.place))
    fleet.wait_until(lambda: all(member.steps for member in places))
    return killed


@pytest.mark.parametrize(
    "waves",
    [
        pytest.param(1, marks=pytest.mark.slow),
        pytest.param(6, marks=[pytest.mark.soak, pytest.mark.timeout(240)]),
    ],
    ids=["20 seconds", "2 minutes"],
)
def test_killed_workers_hold_nobody_up_and_all_that_was_taken_is_applied(
    fleet: Fleet, new_run: Callable[..., kedge.Run], server, waves: int
) -> None:
    run = new_run(kedge.Synchronous(WORKERS), size=WORKERS)
    task = Task(address=server.address, run=run.id, name="", mark=0, lease_seconds=LEASE, pace_seconds=0.03)
    killed = live_through(fleet, task, random.Random(SEED), waves)
    ended_at = time.monotonic()
    left = [member for member in fleet.members if member not in killed]

    assert len(killed) == KILLS_A_WAVE * waves
    # Each worker's own view, from its first step to its death or to the end.
    gaps = [longest_gap([member], until=ended_at if member in left else None) for member in fleet.members]
    assert max(gaps) <= BOUND, f"seed {SEED}"
    assert fleet.finish(left) == [0] * WORKERS

    status = run.status()
    told = sum(len(member.applied) for member in fleet.members)
    # Of each that was killed one contribution may have been taken that it could not speak of any more.
    assert told <= status.applied_count <= told + len(killed)
    assert status.step == max(member.steps[-1]["step"] for member in left)
    # Each step is a mean of marks of 1, whoever is in it: what it takes from the weights is 1 in all.
    assert run.pull()["w"].sum() == pytest.approx(-status.step, rel=1e-4)
