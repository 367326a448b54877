"""A disk that is full, refuses to be written, or fails: what is refused, what goes on, and what is there afterwards."""

import resource
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import grpc
import numpy as np
import psutil
import pytest
from durable_server import DurableServer
from marking_worker import Task
from small_disk import MIB, Ballast, LoopDisk, memory_disk, obstacle
from wire_client import WireClient, push_stream, reason_of
from worker_fleet import Fleet

import kedge
from kedge import optim
from kedge.v1 import run_service_pb2
from kedge.v1.optimizer_service_pb2 import PUSH_OUTCOME_APPLIED

SIZE = 4096
REFUSED_SECONDS = 1.0
DISK_BYTES = 8 * MIB
SETTINGS = {"KEDGE_STORAGE__SEGMENT_BYTES": "200000", "KEDGE_STORAGE__SYNC_SECONDS": "0.05"}


@pytest.fixture
def undo() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def disk(tmp_path: Path, undo: ExitStack) -> Path:
    """Where a small file system in memory is."""
    if reason := obstacle(tmp_path):
        pytest.skip(reason)
    return undo.enter_context(memory_disk(tmp_path / "disk", DISK_BYTES))


@pytest.fixture
def loop_disk(tmp_path: Path, undo: ExitStack) -> LoopDisk:
    """An ext4 that claims to hold eight times what there is room for."""
    if reason := obstacle(tmp_path, loop=True):
        pytest.skip(reason)
    room = undo.enter_context(memory_disk(tmp_path / "room", DISK_BYTES))
    return undo.enter_context(LoopDisk(room / "image", tmp_path / "loop", 8 * DISK_BYTES))


def serve(undo: ExitStack, data_dir: Path) -> DurableServer:
    return undo.enter_context(DurableServer(data_dir, environment=SETTINGS)).start()


def create(address: str, durability: str = "journal") -> kedge.Run:
    """A run whose weights count: an element falls by one with each contribution that marks it."""
    with kedge.connect(address) as client:
        return client.create_run(
            "count",
            params={"w": np.zeros(SIZE, np.float32)},
            optimizer=optim.SGD(lr=1.0),
            aggregation=kedge.Asynchronous(),
            durability=durability,
            checkpoints=kedge.Checkpoints(every_steps=40),
        )


class Probe:
    """A worker that knows only the protocol: it marks its own element, and repeats nothing by itself."""

    def __init__(self, address: str, mark: int) -> None:
        self.wire = WireClient(address)
        self.applied_count = 0
        self._mark = mark
        self._lease = self.wire.join("runs/count", f"probe{mark}")
        self._digest = self.wire.run("runs/count", full=True).manifest.digest

    def push(self) -> str:
        """Sends its next contribution; "applied", or why not: a status of gRPC where the server says nothing."""
        gradient = np.zeros(SIZE, np.float32)
        gradient[self._mark] = 1.0
        sequence = self.applied_count + 1
        try:
            result = self.wire.push(push_stream(self._lease, self._digest, gradient, sequence=sequence))
        except grpc.RpcError as error:
            is_explained = "grpc-status-details-bin" in dict(error.trailing_metadata() or ())
            return reason_of(error) if is_explained else error.code().name
        assert (result.sequence, result.outcome) == (sequence, PUSH_OUTCOME_APPLIED)
        self.applied_count += 1
        return "applied"

    def heartbeat(self) -> None:
        request = run_service_pb2.HeartbeatRequest(worker=self._lease.worker, epoch=self._lease.epoch)
        self.wire.call("RunService", "Heartbeat", request)

    def pulled(self) -> np.ndarray:
        return self.wire.pull("runs/count")[1]

    def storage_problem(self) -> str:
        return self.wire.run("runs/count").state.storage_problem


def refusals(probe: Probe, count: int) -> tuple[set[str], float]:
    """Why so many pushes are refused, and how long the slowest took to be. Pulls and heartbeats go on meanwhile."""
    reasons, slowest = set(), 0.0
    for _ in range(count):
        began_at = time.monotonic()
        reasons.add(probe.push())
        slowest = max(slowest, time.monotonic() - began_at)
        probe.heartbeat()
        assert probe.pulled()[SIZE - 1] == -probe.applied_count
    return reasons, slowest


def wait_until_refused(probe: Probe, fill: Callable[[], None] = lambda: None) -> float:
    """Pushes until that is refused; how long the refusal took, in seconds."""
    for _ in range(2000):
        fill()
        began_at = time.monotonic()
        if probe.push() != "applied":
            return time.monotonic() - began_at
    raise AssertionError("nothing is refused")


def wait_until_applied(probe: Probe, seconds: float = 20) -> None:
    give_up_at = time.monotonic() + seconds
    pause = threading.Event()
    while probe.push() != "applied":
        assert time.monotonic() < give_up_at, "service does not resume"
        pause.wait(0.05)


def start_workers(fleet: Fleet, address: str) -> None:
    task = Task(address=address, run="count", name="", mark=0, lease_seconds=60, pace_seconds=0.02)
    fleet.start(*(task.called(f"w{mark}", mark) for mark in range(2)))
    fleet.wait_until(lambda: all(len(member.applied) >= 3 for member in fleet.members))


def assert_nothing_is_lost_or_twice(fleet: Fleet, probe: Probe) -> np.ndarray:
    """Of all that the workers and the probe were told; the weights."""
    assert fleet.finish() == [0] * len(fleet.members), fleet
    told = [len(member.applied) for member in fleet.members]
    weights = probe.pulled()
    assert weights[: len(told)].tolist() == [-float(count) for count in told]
    assert weights[SIZE - 1] == -probe.applied_count
    state = probe.wire.run("runs/count").state
    assert (state.applied_count, dict(state.rejected_counts)) == (sum(told) + probe.applied_count, {})
    return weights


@pytest.mark.root
@pytest.mark.slow
def test_full_disk_refuses_pushes_at_once_while_pulls_go_on_and_with_room_all_resumes(
    disk: Path, undo: ExitStack, fleet: Fleet
) -> None:
    server = serve(undo, disk / "data")
    create(server.address)
    probe = Probe(server.address, SIZE - 1)
    start_workers(fleet, server.address)
    ballast = Ballast(disk)

    first_took = wait_until_refused(probe, ballast.fill)
    memory = psutil.Process(server.process.process.pid).memory_info()
    reasons, slowest = refusals(probe, 200)
    grown_bytes = psutil.Process(server.process.process.pid).memory_info().rss - memory.rss
    print(
        f"refused after {max(first_took, slowest):.3f} s at most, {grown_bytes:,} bytes more memory after 200 refusals"
    )
    assert reasons == {"STORAGE_FULL"}
    assert max(first_took, slowest) <= REFUSED_SECONDS
    assert grown_bytes < 16 * MIB
    assert "full" in probe.storage_problem()

    steps = [len(member.steps) for member in fleet.members]
    ballast.drop()
    dropped_at = time.monotonic()
    wait_until_applied(probe)
    print(f"applied again {time.monotonic() - dropped_at:.3f} s after there was room")
    assert probe.storage_problem() == ""
    fleet.wait_until(lambda: all(len(m.steps) >= n + 3 for m, n in zip(fleet.members, steps, strict=True)))
    weights = assert_nothing_is_lost_or_twice(fleet, probe)

    server.restart()
    assert Probe(server.address, SIZE - 2).pulled().tobytes() == weights.tobytes()


@pytest.mark.slow
def test_disk_that_cannot_be_written_refuses_pushes_at_once_while_pulls_go_on_and_then_all_resumes(
    tmp_path: Path, undo: ExitStack, fleet: Fleet
) -> None:
    """By a limit of the process: any write to a file then fails, and in another way than for want of room."""
    server = serve(undo, tmp_path / "data")
    create(server.address)
    probe = Probe(server.address, SIZE - 1)
    start_workers(fleet, server.address)
    pid = server.process.process.pid
    _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)

    resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, hard))
    first_took = wait_until_refused(probe)
    reasons, slowest = refusals(probe, 50)
    assert reasons == {"STORAGE_UNAVAILABLE"}
    assert max(first_took, slowest) <= REFUSED_SECONDS
    assert probe.storage_problem()

    resource.prlimit(pid, resource.RLIMIT_FSIZE, (hard, hard))
    wait_until_applied(probe)
    weights = assert_nothing_is_lost_or_twice(fleet, probe)
    server.restart()
    assert Probe(server.address, SIZE - 2).pulled().tobytes() == weights.tobytes()


@pytest.mark.root
def test_file_system_that_becomes_read_only_refuses_pushes_at_once_and_keeps_what_was_acknowledged(
    loop_disk: LoopDisk, undo: ExitStack
) -> None:
    server = serve(undo, loop_disk.path / "data")
    create(server.address, "journal-sync")
    probe = Probe(server.address, SIZE - 1)
    for _ in range(5):
        assert probe.push() == "applied"

    loop_disk.break_down()
    first_took = wait_until_refused(probe)
    reasons, slowest = refusals(probe, 20)
    assert reasons == {"STORAGE_UNAVAILABLE"}
    assert max(first_took, slowest) <= REFUSED_SECONDS

    server.kill()
    loop_disk.repair()
    server.start()
    kept = Probe(server.address, SIZE - 2)
    assert kept.pulled()[SIZE - 1] == -probe.applied_count == -5.0
    assert kept.push() == "applied"


@pytest.mark.root
def test_failing_sync_ends_the_process_and_what_was_acknowledged_is_there_afterwards(
    loop_disk: LoopDisk, undo: ExitStack, tmp_path: Path
) -> None:
    """The disk takes all that is written, and has no room for it when it is to be brought there."""
    server = serve(undo, loop_disk.path / "data")
    create(server.address, "journal-sync")
    probe = Probe(server.address, SIZE - 1)
    assert probe.push() == "applied"
    ballast = Ballast(tmp_path / "room")
    ballast.fill()

    answers = {probe.push() for _ in range(100)}
    assert answers <= {"applied", "UNAVAILABLE"}  # the latter is what gRPC says where there is nobody
    assert server.process.wait() > 0
    assert "cannot be brought to the disk" in server.log

    ballast.drop()
    loop_disk.repair()
    server.start()
    kept = Probe(server.address, SIZE - 2)
    assert -kept.pulled()[SIZE - 1] in (probe.applied_count, probe.applied_count + 1)
    assert kept.push() == "applied"
