"""Workers that start at one moment, late, or leave early: one run, and everyone finds a place in it."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import starter_process
from marking_worker import Task
from server_process import ServerProcess
from worker_fleet import Fleet

import kedge

STARTERS = 12
STEPS = 5
SCRIPT = Path(starter_process.__file__)


def start_before_a_barrier(fleet: Fleet, task: Task) -> Callable[[], None]:
    """Starters that all wait in front of `get_or_create_run`, and what lets them go.

    Each would create the run with other weights than the others: 100 and more.
    """
    read_end, write_end = os.pipe()
    for index in range(STARTERS):
        arguments = [str(read_end), str(STARTERS), str(100 + index)]
        fleet.start(task.called(f"w{index}", index), script=SCRIPT, arguments=arguments, pass_fds=[read_end])
    os.close(read_end)
    fleet.wait_until(lambda: all(member.events_called("ready") for member in fleet.members))
    return lambda: os.close(write_end)


def test_twelve_that_start_at_one_moment_get_one_run_and_train_it_together(
    fleet: Fleet, client: kedge.Client, server: ServerProcess, run_id: str
) -> None:
    task = Task(address=server.address, run=run_id, name="", mark=0, lease_seconds=30, applied_limit=STEPS)
    let_go = start_before_a_barrier(fleet, task)
    assert run_id not in [run.name.removeprefix("runs/") for run in client.list_runs()]
    let_go()
    codes = [member.process.wait(timeout=60) for member in fleet.members]
    assert codes == [0] * STARTERS, fleet
    fleet.wait_until(lambda: all(member.events_called("done") for member in fleet.members))

    opened = [member.events_called("opened")[0] for member in fleet.members]
    assert len({(event["create_time"], event["weight"]) for event in opened}) == 1
    weight = opened[0]["weight"]
    assert weight in range(100, 100 + STARTERS)
    # Each was in each step, with a twelfth of a rate of twelve.
    run = client.get_run(run_id)
    assert run.pull()["w"].tolist() == pytest.approx([weight - STEPS] * STARTERS + [weight] * 4)
    assert (run.status().step, run.status().applied_count) == (STEPS, STEPS * STARTERS)


def test_workers_join_late_and_leave_early_and_each_step_is_made_of_those_who_are_there(
    fleet: Fleet, server: ServerProcess, new_run: Callable[..., kedge.Run], eventually: Callable[..., None]
) -> None:
    run = new_run(kedge.Synchronous(4))
    task = Task(address=server.address, run=run.id, name="", mark=0, lease_seconds=30, pace_seconds=0.01)
    early = fleet.start(task.called("c", 2), task.called("a", 0))
    eventually(lambda: run.status().waiting_for == "2 more workers to join: the quorum is 4, 2 live")
    assert run.status().step == 0

    late = fleet.start(task.called("d", 3), task.called("b", 1))
    fleet.wait_for_step(5)
    assert [worker.name[-1] for worker in run.status().workers] == ["a", "b", "c", "d"]

    assert fleet.finish(early) == [0, 0]
    left_at = run.status().step
    fleet.wait_for_step(left_at + 5, late)
    assert {event["reason"] for event in late[0].steps if event["step"] > left_at + 1} == {"ALL_LIVE_CONTRIBUTED"}

    (later,) = fleet.start(task.called("e", 4))
    fleet.wait_for_step(run.status().step + 5, [*late, later])
    eventually(lambda: later.applied)
    assert fleet.finish([*late, later]) == [0] * 3
    assert run.status().applied_count == sum(len(member.applied) for member in fleet.members)


def test_run_that_waits_for_more_workers_than_live_says_so_until_they_come(
    fleet: Fleet, server: ServerProcess, new_run: Callable[..., kedge.Run], eventually: Callable[..., None]
) -> None:
    run = new_run(kedge.Synchronous(3))
    task = Task(address=server.address, run=run.id, name="", mark=0, lease_seconds=1, applied_limit=3)
    (first,) = fleet.start(task.called("a", 0))
    eventually(lambda: run.status().round is not None)
    assert run.status().waiting_for == "2 more workers to join: the quorum is 3, 1 live"
    # Who dies while the run gathers is not waited for, and not counted.
    (lost,) = fleet.start(task.called("b", 1))
    eventually(lambda: run.status().waiting_for == "1 more worker to join: the quorum is 3, 2 live")
    lost.kill()
    eventually(lambda: run.status().waiting_for == "2 more workers to join: the quorum is 3, 1 live")

    others = fleet.start(task.called("c", 2), task.called("d", 3))
    assert [member.process.wait(timeout=30) for member in (first, *others)] == [0] * 3, fleet
    assert run.status().waiting_for == ""
