"""The runs of a data directory, behind `kedge_server.engine.durability.Storage`."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import structlog

from kedge_server.core.commits import Created
from kedge_server.core.image import RunImage
from kedge_server.core.stored import Replayed, Restorable
from kedge_server.storage.checkpoints import CheckpointStore
from kedge_server.storage.committer import as_kedge_error
from kedge_server.storage.data_dir import CHECKPOINTS, JOURNAL, DataDir
from kedge_server.storage.errors import StorageError, SyncFailed
from kedge_server.storage.files import Files
from kedge_server.storage.journal import Entry, Journal
from kedge_server.storage.plain import encode
from kedge_server.storage.recovery import Recovery
from kedge_server.storage.run_store import Settings, StoredRun
from kedge_server.telemetry.failpoints import failpoint

_JOURNAL_THREADS = 4

_log = structlog.get_logger("kedge.storage")

ResultT = TypeVar("ResultT")


class DiskStorage:
    """Keeps runs in a data directory. Belongs to a loop.

    Args:
        data_dir: the directory, which this process holds.
        files: the file system.
        segment_bytes: of the journals.
        journal_bytes: see `Settings`.
        sync_seconds: see `Settings`.
        on_sync_failed: ends the process.
    """

    def __init__(
        self,
        data_dir: DataDir,
        files: Files,
        *,
        segment_bytes: int,
        journal_bytes: int,
        sync_seconds: float,
        on_sync_failed: Callable[[SyncFailed], None],
    ) -> None:
        self._data_dir = data_dir
        self._files = files
        self._segment_bytes = segment_bytes
        self._journals = ThreadPoolExecutor(_JOURNAL_THREADS, thread_name_prefix="kedge-journal")
        self._checkpoints = ThreadPoolExecutor(1, thread_name_prefix="kedge-checkpoint")
        self._settings = Settings(
            journal_bytes=journal_bytes,
            sync_seconds=sync_seconds,
            journals=self._journals,
            checkpoints=self._checkpoints,
            one_at_a_time=asyncio.Lock(),
            on_sync_failed=on_sync_failed,
        )

    async def create(self, created: Created, payload: Sequence[np.ndarray]) -> StoredRun:
        """Keeps a new run; afterwards it is there after any loss of power.

        Raises:
            KedgeError: STORAGE_FULL or STORAGE_UNAVAILABLE; then nothing is left of it.
        """
        try:
            journal = await self.on_thread(self._create, created, payload)
        except StorageError as error:
            raise as_kedge_error(error, created.config.name) from error
        checkpoints = self._data_dir.run_directory(_run_id(created.config.name)) / CHECKPOINTS
        return self.store(RunImage.create(created), journal, CheckpointStore(checkpoints, self._files))

    def found(self) -> list["FoundOnDisk"]:
        """The runs that are to be recovered."""
        return [FoundOnDisk(self, self._recovery(run_id)) for run_id in self._data_dir.run_names()]

    async def close(self) -> None:
        """Lets go. Only after the stores of all runs are closed."""
        for executor in (self._journals, self._checkpoints):
            await asyncio.to_thread(executor.shutdown)
        self._data_dir.close()

    def store(self, image: RunImage, journal: Journal, checkpoints: CheckpointStore) -> StoredRun:
        """The store of a run that goes on with this journal and these checkpoints."""
        run_id = _run_id(image.config.name)
        is_journaled = image.config.durability != "checkpoint"
        if not is_journaled:
            journal.close()
        return StoredRun(
            image,
            journal if is_journaled else None,
            checkpoints,
            settings=self._settings,
            delete=lambda: self._data_dir.delete_run(run_id),
        )

    def discard(self, name: str) -> None:
        """Removes a run whose creation was never finished. It blocks."""
        self._data_dir.delete_run(_run_id(name))

    async def on_thread(self, call: Callable[..., ResultT], *arguments: object) -> ResultT:
        """Calls something that blocks."""
        return await asyncio.get_running_loop().run_in_executor(self._journals, self._guarded, call, *arguments)

    def _guarded(self, call: Callable[..., ResultT], *arguments: object) -> ResultT:
        try:
            return call(*arguments)
        except SyncFailed as error:
            self._settings.on_sync_failed(error)
            raise

    def _recovery(self, run_id: str) -> Recovery:
        return Recovery(
            f"runs/{run_id}",
            self._data_dir.run_directory(run_id),
            self._files,
            segment_bytes=self._segment_bytes,
            repairs=True,
        )

    def _create(self, created: Created, payload: Sequence[np.ndarray]) -> Journal:
        run_id = _run_id(created.config.name)
        failpoint("run.create.before")
        directory = self._data_dir.create_run(run_id)
        try:
            journal = Journal.open(directory / JOURNAL, self._files, segment_bytes=self._segment_bytes)
            journal.append([Entry(1, 0, time.time(), encode(created), payload)])
            journal.sync()
        except StorageError:
            with contextlib.suppress(StorageError):
                self._data_dir.delete_run(run_id)
            raise
        failpoint("run.create.after")
        return journal


class FoundOnDisk:
    """A run that is to be recovered.

    Args:
        storage: where it is.
        recovery: of it.
    """

    def __init__(self, storage: DiskStorage, recovery: Recovery) -> None:
        self._storage = storage
        self._recovery = recovery
        self.name = recovery.name

    async def open(self) -> Restorable | None:
        """What its recovery begins with; None if its creation was never finished, of which nothing is left then."""
        origin = await self._storage.on_thread(self._recovery.open)
        if origin is None:
            _log.warning("a run whose creation was never finished is removed", run=self.name)
            await self._storage.on_thread(self._storage.discard, self.name)
        return origin

    async def batches(self) -> AsyncIterator[Sequence[Replayed]]:
        """What its journal holds beyond that, in order."""
        batches = self._recovery.batches()
        while (batch := await self._storage.on_thread(next, batches, None)) is not None:
            yield batch

    async def restored(self, checkpoint_id: str, index: int) -> Restorable:
        """The checkpoint that the commit of this index names."""
        return await self._storage.on_thread(self._recovery.restored, checkpoint_id, index)

    def resume(self, image: RunImage) -> StoredRun:
        """Its store, which goes on after the last commit."""
        store = self._storage.store(image, self._recovery.journal, self._recovery.store)
        store.restored_from.update(self._recovery.restored_from)
        return store


def _run_id(name: str) -> str:
    return name.removeprefix("runs/")
