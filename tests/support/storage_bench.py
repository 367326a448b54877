"""Runs on a disk, in this process: the engine over a data directory whose files a test can halt, fill and watch.

What a server would leave that were killed now is told by another one on a copy of its directory: what was written is
there, and what still waits in the first one is not.
"""

import asyncio
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kedge import optim
from kedge.policies import Admission, Asynchronous, Checkpoints
from kedge.wire.manifest import Manifest
from kedge_server import app
from kedge_server.config import ServerConfig
from kedge_server.core.admission import Inspection
from kedge_server.core.values import ContributionHeader, PushResult
from kedge_server.engine.contributions import PendingContribution
from kedge_server.engine.registry import NewRun, Registry
from kedge_server.engine.run import RunEngine
from kedge_server.storage.data_dir import DataDir
from kedge_server.storage.errors import SyncFailed
from kedge_server.storage.files import Buffer, OsFile, OsFiles
from kedge_server.storage.runs import DiskStorage

SIZE = 64
GRADIENT_BYTES = 4 * SIZE
PATIENCE_SECONDS = 20
_TURNS = 100


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not condition():
            await asyncio.sleep(0.001)


def weight(run: RunEngine) -> float:
    """What all of its weights are."""
    values = set(np.concatenate(run.snapshot.fast).tolist())
    assert len(values) == 1, "every gradient here is the same in all of its elements"
    return values.pop()


class Halt:
    """A place where a thread stays until it is let go on."""

    def __init__(self) -> None:
        self._is_there = threading.Event()
        self._may_go_on = threading.Event()

    def stay(self) -> None:
        self._is_there.set()
        self._may_go_on.wait(2 * PATIENCE_SECONDS)

    async def reached(self) -> None:
        await until(self._is_there.is_set)

    def end(self) -> None:
        self._may_go_on.set()


class WatchedFiles(OsFiles):
    """Files with something before each write and after each sync; no two threads may use one at the same time.

    Attributes:
        before_write: is given the path and the count of bytes; it may raise.
        after_sync: is given the path, before whoever asked knows.
        collisions: what was done to a file while something else was.
    """

    def __init__(self) -> None:
        self.before_write: Callable[[Path, int], None] = lambda path, count: None
        self.after_sync: Callable[[Path], None] = lambda path: None
        self.collisions: list[str] = []

    def open(self, path: Path, *, writable: bool = False, create: bool = False) -> "WatchedFile":
        return WatchedFile(self, super().open(path, writable=writable, create=create))


class WatchedFile(OsFile):
    def __init__(self, files: WatchedFiles, file: OsFile) -> None:
        super().__init__(file.path, file._descriptor, is_writable=file._is_writable)
        self._files = files
        self._use = ""

    def write(self, offset: int, buffers: Sequence[Buffer]) -> None:
        def write() -> None:
            self._files.before_write(self.path, sum(map(len, buffers)))
            OsFile.write(self, offset, buffers)

        self._alone("write", write)

    def sync(self) -> None:
        def sync() -> None:
            OsFile.sync(self)
            self._files.after_sync(self.path)

        self._alone("sync", sync)

    def close(self) -> None:
        self._alone("close", super().close)

    def _alone(self, use: str, call: Callable[[], None]) -> None:
        if self._use:
            self._files.collisions.append(f"{use} during {self._use} of {self.path.name}")
        before, self._use = self._use, use
        try:
            call()
        finally:
            self._use = before


class Worker:
    """One who sends gradients that are the same in all elements, one after the other."""

    def __init__(self, server: "Server", run: RunEngine, name: str) -> None:
        self._server = server
        self.run = run
        self.lease = run.join(name, epoch=server.registry.next_epoch(), duration_seconds=600)
        self.sequence = 0

    def send(self, value: float = 1.0) -> PendingContribution:
        self.sequence += 1
        return self.send_again(value)

    def send_again(self, value: float = 1.0) -> PendingContribution:
        """What was sent last, with the step of now."""
        header = ContributionHeader(
            worker_id=self.lease.worker_id,
            epoch=self.lease.epoch,
            sequence=self.sequence,
            base_step=self.run.snapshot.step,
            manifest_digest=self.run.config.manifest.digest,
            example_count=1,
            loss=None,
        )
        buffer = self._server.registry.lend(self.run)
        buffer.array[:] = value
        inspection = Inspection()
        inspection.add(buffer.array)
        return self.run.submit(header, buffer, inspection)

    async def push(self, value: float = 1.0, *, wait_seconds: float | None = None) -> PushResult:
        async with asyncio.timeout(PATIENCE_SECONDS):
            return await self.run.result(self.send(value), wait_seconds)

    async def push_times(self, count: int) -> None:
        for _ in range(count):
            assert (await self.push()).outcome == "applied"

    def leave(self) -> None:
        self.run.leave(self.lease.worker_id, self.lease.epoch)


class Server:
    """A registry over a data directory."""

    def __init__(self, directory: Path, **limits: int) -> None:
        self.directory = directory
        self.files = WatchedFiles()
        self.sync_failures: list[SyncFailed] = []
        self._halts: list[Halt] = []
        data_dir = DataDir.open(directory, self.files)
        self.storage = DiskStorage(
            data_dir,
            self.files,
            segment_bytes=1 << 24,
            journal_bytes=1 << 30,
            sync_seconds=0.5,
            on_sync_failed=self.sync_failures.append,
        )
        config = ServerConfig.model_validate({"limits": limits})
        self.registry = Registry(
            app.limits(config), block_elements=SIZE, storage=self.storage, generation=data_dir.generation
        )

    async def create(self, name: str = "x", *, initial: float = 0.0, **about: Any) -> RunEngine:
        defaults = {
            "optimizer": optim.SGD(lr=1.0),
            "policy": Asynchronous(),
            "admission": Admission(),
            "groups": (),
            "request_id": "",
            "durability": "journal",
            "checkpoints": Checkpoints(keep_latest=9),
        }
        manifest = Manifest.from_specs([("w", (SIZE,), "float32")])
        new = NewRun(name=f"runs/{name}", manifest=manifest, **(defaults | about))
        there = await self.registry.find_created(new)
        if there is not None:
            return there
        plan = await self.registry.plan(new)
        weights = self.registry.staging.acquire(SIZE)
        weights.array[:] = initial
        return await self.registry.create(new, plan, weights)

    async def worker(self, run: RunEngine, name: str = "a") -> Worker:
        worker = Worker(self, run, name)
        await run.acknowledge()
        return worker

    def journal_bytes(self, run: str = "x") -> int:
        return sum(path.stat().st_size for path in (self.directory / "runs" / run / "journal").glob("*.log"))

    # Halts

    def halt(self) -> Halt:
        self._halts.append(Halt())
        return self._halts[-1]

    def halt_device(self) -> Halt:
        """As a long step of another run does."""
        halt = self.halt()
        self.registry._device._executor.submit(halt.stay)
        return halt

    def halt_checkpoints(self) -> Halt:
        """As a large checkpoint of another run does."""
        halt = self.halt()
        self.storage._checkpoints.submit(halt.stay)
        return halt

    def halt_writes(self, run: str = "x", *, count: int | None = None) -> Halt:
        """Before any write to a run's journal, or the writes of so many bytes: a payload is written by itself."""
        halt = self.halt()

        def before_write(path: Path, written: int) -> None:
            if _is_journal(path, run) and count in (None, written):
                halt.stay()

        self.files.before_write = before_write
        return halt

    def halt_syncs(self, run: str = "x") -> Halt:
        """When a sync of a run's journal is as good as done."""
        halt = self.halt()
        self.files.after_sync = lambda path: halt.stay() if _is_journal(path, run) else None
        return halt

    async def meanwhile(self) -> None:
        """Lets everything go on that does not have to wait: many turns of the loop, and of the threads of journals."""
        for _ in range(_TURNS):
            await self.storage.on_thread(bool)

    async def close(self) -> None:
        for halt in self._halts:
            halt.end()
        self.registry.end()
        await self.registry.store_all(hurry=True)
        self.registry.close()
        assert (self.files.collisions, self.sync_failures) == ([], [])


class Bench:
    """Servers, one after the other on copies of one directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._servers: list[Server] = []
        self._limits: dict[str, int] = {}

    async def start(self, **limits: int) -> Server:
        self._limits = limits
        return await self._start(self._directory / "0")

    async def after_kill(self, server: Server, change: Callable[[Path], object] = lambda runs: None) -> Server:
        """A server that finds what this one would leave if it were killed now, and something is done to the runs."""
        copy = self._directory / str(len(self._servers))
        shutil.copytree(server.directory, copy)
        change(copy / "runs")
        return await self._start(copy)

    async def close(self) -> None:
        for server in self._servers:
            await server.close()

    async def _start(self, directory: Path) -> Server:
        self._servers.append(Server(directory, **self._limits))
        await self._servers[-1].registry.recover()
        return self._servers[-1]


def _is_journal(path: Path, run: str) -> bool:
    return path.suffix == ".log" and path.parent.parent.name == run
