"""Workers that stand still for longer than their lease, and workers of one name."""

import time
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from marking_worker import ERROR_EXIT_CODE, Task
from wire_client import WireClient, floats, push_stream, reason_of
from worker_fleet import Fleet, Member, longest_gap

import kedge
from kedge.transport import WorkerStatus
from kedge.v1 import run_service_pb2

WORKERS = 8
LEASE = 3.0
BOUND = LEASE + 1


def start_eight(fleet: Fleet, address: str, run: kedge.Run) -> list[Member]:
    task = Task(address=address, run=run.id, name="", mark=0, lease_seconds=LEASE, pace_seconds=0.02)
    members = fleet.start(*(task.called(f"w{index}", index) for index in range(WORKERS)))
    fleet.wait_for_step(5)
    return members


def refusal_of(call: Callable[[], Any]) -> str:
    with pytest.raises(grpc.RpcError) as refused:
        call()
    return reason_of(refused.value)


def last_status_of(run: kedge.Run, worker: str, eventually: Callable[..., None]) -> WorkerStatus:
    """Waits until the worker holds no lease any more; what was last said of it."""
    said: list[WorkerStatus] = []

    def is_gone() -> bool:
        now = [one for one in run.status().workers if one.name == f"{run.name}/workers/{worker}"]
        said.extend(now)
        return not now

    eventually(is_gone)
    return said[-1]


def refusals_of_epoch(wire: WireClient, run: kedge.Run, worker: WorkerStatus) -> set[str]:
    """Why a push that would be its next, and a heartbeat, are refused."""
    lease = run_service_pb2.JoinRunResponse(worker=worker.name, epoch=worker.epoch)
    sequence, step = worker.last_sequence + 1, run.status().step
    push = push_stream(lease, run.manifest.digest, floats(*[1.0] * 16), sequence=sequence, base_step=step)
    heartbeat = run_service_pb2.HeartbeatRequest(worker=lease.worker, epoch=lease.epoch)
    return {
        refusal_of(lambda: wire.push(push)),
        refusal_of(lambda: wire.call("RunService", "Heartbeat", heartbeat)),
    }


def test_worker_stopped_beyond_its_lease_is_dropped_fenced_and_joins_again_by_itself(
    fleet: Fleet, wire: WireClient, new_run: Callable[..., kedge.Run], eventually: Callable[..., None]
) -> None:
    run = new_run(kedge.Synchronous(WORKERS))
    members = start_eight(fleet, wire.address, run)
    *others, stopped = members

    stopped.pause()
    stopped_at = time.monotonic()
    old = last_status_of(run, stopped.task.name, eventually)
    assert time.monotonic() - stopped_at <= BOUND
    fleet.wait_for_step(run.status().step + 20, others)
    assert longest_gap(others, since=stopped_at, until=time.monotonic()) <= BOUND
    assert refusals_of_epoch(wire, run, old) == {"LEASE_EXPIRED"}
    seen_count = len(stopped.steps)

    stopped.resume()
    resumed_at = time.monotonic()
    fleet.wait_until(lambda: len(stopped.steps) >= seen_count + 20)
    assert longest_gap(others, since=resumed_at, until=time.monotonic()) <= BOUND
    assert stopped.steps[-1]["epoch"] > old.epoch
    assert stopped.steps[-1]["outcome"] == "applied"
    assert refusals_of_epoch(wire, run, old) == {"WORKER_SUPERSEDED"}

    assert fleet.finish() == [0] * WORKERS
    # All that anyone was told is applied, and nothing else, with the epoch that was given up among them.
    assert run.status().applied_count == sum(len(member.applied) for member in members)


@pytest.mark.parametrize("is_stopped_meanwhile", [False, True], ids=["at work", "stopped"])
def test_worker_whose_name_another_process_takes_ends_with_an_error(
    fleet: Fleet, wire: WireClient, new_run: Callable[..., kedge.Run], is_stopped_meanwhile: bool
) -> None:
    run = new_run(kedge.Synchronous(1))
    task = Task(address=wire.address, run=run.id, name="twin", mark=0, pace_seconds=0.01)
    (first,) = fleet.start(task)
    fleet.wait_for_step(3)
    if is_stopped_meanwhile:
        first.pause()
    (second,) = fleet.start(task.called("twin", 1))
    fleet.wait_for_step(run.status().step + 3, [second])
    first.resume()

    fleet.wait_until(lambda: first.events_called("error"))
    assert first.process.wait(timeout=30) == ERROR_EXIT_CODE
    assert first.events[-1]["reason"] == "WORKER_SUPERSEDED"
    fleet.wait_for_step(second.steps[-1]["step"] + 3, [second])
    assert {event["epoch"] for event in second.steps} == {second.events[0]["epoch"]}
    assert fleet.finish([second]) == [0]
