"""A data directory and its runs as the tools read them. Nothing here writes."""

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from kedge.wire.names import run_name
from kedge_server.core.image import RunImage
from kedge_server.core.stored import Replayed, Restorable
from kedge_server.engine.durability import RunStore
from kedge_server.storage.checkpoints import CheckpointStore
from kedge_server.storage.data_dir import CHECKPOINTS, JOURNAL, DataDir
from kedge_server.storage.files import OsFiles
from kedge_server.storage.journal import Journal
from kedge_server.storage.recovery import Recovery

_SEGMENT_BYTES = 1 << 20
"""Of the segments that a tool would begin: it begins none."""


class MisuseError(Exception):
    """What is asked for cannot be done here. The message says why, and what to ask for."""


class RunFiles(NamedTuple):
    """Where a run is."""

    name: str
    """runs/{run}."""
    directory: Path

    @property
    def journal(self) -> Path:
        """The directory of its journal."""
        return self.directory / JOURNAL

    def store(self) -> CheckpointStore:
        """Its checkpoints."""
        return CheckpointStore(self.directory / CHECKPOINTS, OsFiles())

    def open_journal(self, *, next_index_at_least: int) -> Journal:
        """Its journal, which must not be appended to.

        Raises:
            StorageError: for damage.
        """
        return Journal.open(
            self.journal,
            OsFiles(),
            segment_bytes=_SEGMENT_BYTES,
            next_index_at_least=next_index_at_least,
            repairs=False,
        )


class FoundForReading:
    """A run on its way out of storage, behind `kedge_server.engine.durability.FoundRun`.

    What blocks does so on other threads: Orbax has event loops of its own.

    Args:
        run: where it is.
        from_oldest: begin with the oldest state that the journal leads on from, instead of the newest.
    """

    def __init__(self, run: RunFiles, *, from_oldest: bool = False) -> None:
        self.name = run.name
        self._recovery = Recovery(run.name, run.directory, OsFiles(), segment_bytes=_SEGMENT_BYTES, repairs=False)
        self._from_oldest = from_oldest

    async def open(self) -> Restorable | None:
        """What it begins with."""
        return await asyncio.to_thread(self._recovery.open_oldest if self._from_oldest else self._recovery.open)

    async def batches(self) -> AsyncIterator[Sequence[Replayed]]:
        """What the journal holds beyond that."""
        batches = self._recovery.batches()
        while (batch := await asyncio.to_thread(next, batches, None)) is not None:
            yield batch

    async def restored(self, checkpoint_id: str, index: int) -> Restorable:
        """The checkpoint that a commit names."""
        return await asyncio.to_thread(self._recovery.restored, checkpoint_id, index)

    def resume(self, image: RunImage) -> RunStore:
        """Never: a tool serves no runs."""
        raise AssertionError(f"{image.config.name} is only read")


@contextmanager
def opened(path: Path) -> Iterator[DataDir]:
    """A data directory, which no server can be started on meanwhile.

    Raises:
        DataDirError: it is none, or a server holds it.
    """
    with DataDir.look(path) as data_dir:
        yield data_dir


def chosen_runs(data_dir: DataDir, run: str | None) -> list[RunFiles]:
    """One run, or all.

    Raises:
        MisuseError: there is no such run.
        KedgeError: INVALID_NAME.
    """
    there = [RunFiles(f"runs/{run_id}", data_dir.run_directory(run_id)) for run_id in data_dir.run_names()]
    if run is None:
        return there
    name = run_name(run)
    chosen = [files for files in there if files.name == name]
    if not chosen:
        names = ", ".join(files.name for files in there) or "none"
        raise MisuseError(f"there is no {name} in {data_dir.path}: the runs there are {names}")
    return chosen
