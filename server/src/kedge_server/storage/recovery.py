"""Finds out where a run stands: its newest intact checkpoint, and what its journal holds beyond it.

It changes nothing before it is clear that the run can be recovered; damage is named and never passed over.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import structlog

from kedge_server.core.commits import Created
from kedge_server.core.image import RunImage
from kedge_server.core.stored import CheckpointInfo, Replayed, Restorable
from kedge_server.storage.checkpoints import CheckpointStore
from kedge_server.storage.data_dir import CHECKPOINTS, JOURNAL
from kedge_server.storage.errors import CheckpointDamaged, JournalCorrupt, StorageError
from kedge_server.storage.files import Files
from kedge_server.storage.journal import Journal
from kedge_server.storage.plain import decode
from kedge_server.storage.run_store import load

_BATCH_BYTES = 64 << 20

_log = structlog.get_logger("kedge.storage")


class Recovery:
    """A run on its way out of storage. Synchronous; not for several threads at once.

    Args:
        name: runs/{run}.
        directory: its directory.
        files: the file system.
        segment_bytes: of the journal.
        repairs: whether a torn tail is cut off; else nothing is changed.

    Attributes:
        store: its checkpoints.
        problems: what was found to be wrong, for people.
        restored_from: the checkpoints that the journal names, by id, with their commit's index.
    """

    def __init__(self, name: str, directory: Path, files: Files, *, segment_bytes: int, repairs: bool) -> None:
        self.name = name
        self.store = CheckpointStore(directory / CHECKPOINTS, files)
        self.problems: list[str] = []
        self.restored_from: dict[str, int] = {}
        self._journal_directory = directory / JOURNAL
        self._files = files
        self._segment_bytes = segment_bytes
        self._repairs = repairs
        self._journal: Journal | None = None
        self._is_journal_there = False
        self._next_index = 1

    @property
    def journal(self) -> Journal:
        """Its journal; only after `open`."""
        assert self._journal is not None, "the recovery has not begun"
        return self._journal

    def open(self) -> Restorable | None:
        """What the recovery begins with; None if the run's creation was never finished.

        Raises:
            StorageError: it cannot be recovered; the message says why and what to do.
        """
        infos = self._look()
        for info in infos:
            try:
                restorable = load(self.store, info.checkpoint_id)
            except CheckpointDamaged as error:
                self._note(f"{error.message}; going back to the one before")
                continue
            if self._is_of_this_history(info, restorable):
                return self._begin(restorable)
        return self._from_creation()

    def open_oldest(self) -> Restorable | None:
        """The same with the oldest state that the journal leads on from, for whoever replays all that is there.

        Raises:
            StorageError: as `open`.
        """
        infos, journal = self._look(), self.journal
        if journal.first_index == 1 and journal.next_index > 1:
            return self._from_creation()
        for info in reversed(infos):
            if info.next_index < journal.first_index:
                continue
            try:
                restorable = load(self.store, info.checkpoint_id)
            except CheckpointDamaged as error:
                self._note(f"{error.message}; going on to the one after")
                continue
            if self._is_of_this_history(info, restorable):
                return self._begin(restorable)
        return self._from_creation()

    def _look(self) -> list[CheckpointInfo]:
        """Opens the journal. Returns the checkpoints that may be intact, newest first."""
        for why in self.store.damaged().values():
            self._note(f"{self.name}: {why}")
        infos = self.store.list()
        self._journal = Journal.open(
            self._journal_directory,
            self._files,
            segment_bytes=self._segment_bytes,
            next_index_at_least=infos[0].next_index if infos else 1,
            repairs=self._repairs,
        )
        self._is_journal_there = JOURNAL in self._files.list(self._journal_directory.parent)
        if infos and self._is_journal_there and self._journal.is_empty:
            raise JournalCorrupt(
                self._journal_directory, 0, "all of the journal is gone, of which something always stays"
            )
        if self._journal.cut_bytes:
            self._note(
                f"the journal of {self.name} ended in {self._journal.cut_bytes} bytes of a record that was never whole"
            )
        return infos

    def batches(self) -> Iterator[Sequence[Replayed]]:
        """What the journal holds beyond that, in order.

        Raises:
            StorageError: where there is damage.
        """
        if self._next_index >= self.journal.next_index:
            return
        batch: list[Replayed] = []
        size = 0
        for record in self.journal.records(self._next_index):
            batch.append(Replayed(decode(record.body), record.time_seconds, record.payload))
            size += record.payload.nbytes + len(record.body)
            if size >= _BATCH_BYTES:
                yield batch
                batch, size = [], 0
        yield batch

    def restored(self, checkpoint_id: str, index: int) -> Restorable:
        """The checkpoint that the commit of this index names.

        Raises:
            StorageError: it is damaged, or gone.
        """
        self.restored_from[checkpoint_id] = index
        return load(self.store, checkpoint_id)

    def _is_of_this_history(self, info: CheckpointInfo, restorable: Restorable) -> bool:
        """Whether the journal leads to the checkpoint, as far as it still holds the record that comes before it.

        It does not where a journal began anew after the checkpoint, and that was brought back from a copy later.
        """
        there = self.journal.sum_of(info.next_index - 1)
        if there is None or restorable.journal_sum in (None, there):
            return True
        self._note(
            f"checkpoint {info.checkpoint_id} of {self.name} is of another history than its journal, and is not used"
        )
        return False

    def _begin(self, origin: Restorable) -> Restorable:
        config = origin.image.config
        if config.name != self.name:
            raise StorageError(
                f"{self._journal_directory.parent} holds {config.name}: give the directory that name, or move it away; "
                "to give a run another name, fork it"
            )
        if config.durability == "checkpoint":
            # Nothing follows a checkpoint, also where there was a newer one that is damaged.
            self._next_index = self.journal.next_index
            return origin
        self._next_index = origin.image.next_index
        if not self._is_journal_there:  # taken away on purpose, as in a copy of a checkpoint alone
            self._note(f"{self.name} has no journal: it goes on from its newest checkpoint")
        elif lost := len(self.journal.lost_indices):
            self._note(f"{lost} records of the journal of {self.name} are gone; a checkpoint has what came of them")
        return origin

    def _from_creation(self) -> Restorable | None:
        journal = self.journal
        has_had_checkpoints = bool(self.problems) and bool(self.store.damaged())
        if not self._is_journal_there and CHECKPOINTS in self._files.list(self._journal_directory.parent):
            raise self._unrecoverable("its journal is gone")
        if journal.next_index == 1 and not has_had_checkpoints:
            return None
        if journal.first_index > 1 or journal.next_index == 1:
            raise self._unrecoverable(f"its journal begins with record {journal.first_index}")
        record = next(journal.records(1))
        created = decode(record.body)
        if not isinstance(created, Created):
            raise StorageError(f"the journal of {self.name} does not begin with its creation: it is of another program")
        if created.config.durability == "checkpoint" and self.store.damaged():
            raise self._unrecoverable("nothing but its creation is left")
        return self._begin(Restorable(RunImage.create(created), _arrays(created, record.payload), {}))

    def _unrecoverable(self, what: str) -> StorageError:
        return StorageError(
            f"{self.name} cannot be recovered: none of its checkpoints is intact, and {what}; "
            f"{'; '.join(self.problems)}; bring one of them back from a copy, or move the directory "
            f"{self._journal_directory.parent} away to start without this run"
        )

    def _note(self, problem: str) -> None:
        self.problems.append(problem)
        _log.warning(problem)


def _arrays(created: Created, payload: np.ndarray) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}
    at = 0
    for spec in created.arrays:
        size = int(np.prod(spec.shape, dtype=np.int64)) * np.dtype(spec.dtype).itemsize
        arrays[spec.name] = payload[at : at + size].view(spec.dtype).reshape(spec.shape)
        at += size
    return arrays
