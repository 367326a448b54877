"""What there is of a run on the disk, and whether all of it is as it was written."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import NamedTuple

from kedge_server.core.stored import CheckpointInfo
from kedge_server.storage import records
from kedge_server.storage.checkpoints import CheckpointStore
from kedge_server.storage.errors import CheckpointDamaged, StorageError
from kedge_server.storage.files import OsFiles, read_file
from kedge_server.storage.journal import MARK_NAME
from kedge_server.storage.segments import describe
from kedge_server.tools.reading import RunFiles


class JournalReport(NamedTuple):
    """A journal."""

    first_index: int | None
    """Of the oldest record; None if the journal cannot be opened. There is none if it is `next_index`."""
    next_index: int | None
    """Of the next record; None if the journal cannot be opened."""
    synced_index: int | None
    """Every record up to it was brought to the disk; None if that is not known."""
    segments: int
    bytes: int
    """Of its segments."""
    cut_bytes: int
    """Of a record at the end that was never whole: the next server cuts it off. A crash leaves such, and loses nothing
    by it."""


class CheckpointReport(NamedTuple):
    """A checkpoint. Of one whose manifest is damaged only the name is known."""

    id: str
    step: int
    next_index: int
    """Of the journal's first record that is not in it."""
    created: str | None
    """ISO 8601."""
    size_bytes: int | None
    metrics: Mapping[str, float]
    intact: bool
    problem: str | None


class Survey(NamedTuple):
    """A run on the disk."""

    journal: JournalReport
    checkpoints: list[CheckpointReport]
    """Newest first."""
    problems: list[str]
    lost_indices: range
    """Records that are not there, or not whole, although the newest checkpoint needs none of them."""

    def note_lost(self, durability: str) -> None:
        """Adds lost records to the problems, where there should be some."""
        if self.lost_indices and durability != "checkpoint":
            self.problems.append(
                f"{describe(self.lost_indices)} of the journal are not there or not whole: the newest checkpoint has "
                "what came of them, and it is the only one that the run can go on from; take another one soon"
            )


def survey(run: RunFiles) -> Survey:
    """Reads every byte of a run, and compares it with its checksums."""
    store = run.store()
    listed = {info.checkpoint_id: info for info in store.list()}
    journal, lost_indices, problems = _journal(run, next(iter(listed.values()), None))
    ids = sorted([*listed, *store.damaged()], key=_next_index, reverse=True)
    checkpoints = [_checkpoint(store, checkpoint_id, listed.get(checkpoint_id)) for checkpoint_id in ids]
    problems += [each.problem for each in checkpoints if each.problem]
    return Survey(journal, checkpoints, problems, lost_indices)


def note(problems: list[str], error: Exception) -> None:
    """Adds what was found to be wrong, unless it is known already."""
    problem = error.message if isinstance(error, StorageError) else f"{type(error).__name__}: {error}"
    if problem not in problems:
        problems.append(problem)


def _journal(run: RunFiles, newest: CheckpointInfo | None) -> tuple[JournalReport, range, list[str]]:
    problems: list[str] = []
    lost_indices = range(0)
    first_index = next_index = None
    cut_bytes = 0
    try:
        journal = run.open_journal(next_index_at_least=newest.next_index if newest else 1)
        first_index, next_index, cut_bytes = journal.first_index, journal.next_index, journal.cut_bytes
        lost_indices = journal.lost_indices
        for _ in journal.records(first_index):
            pass
    except StorageError as error:
        note(problems, error)
    sizes = [path.stat().st_size for path in run.journal.glob("*.log")]
    report = JournalReport(first_index, next_index, _synced_index(run), len(sizes), sum(sizes), cut_bytes)
    return report, lost_indices, problems


def _synced_index(run: RunFiles) -> int | None:
    return records.parsed_mark(read_file(OsFiles(), run.journal / MARK_NAME) or b"") or None


def _checkpoint(store: CheckpointStore, checkpoint_id: str, info: CheckpointInfo | None) -> CheckpointReport:
    problem = None
    try:
        store.verify(checkpoint_id)
    except CheckpointDamaged as error:
        problem = error.message
    step = int(checkpoint_id.partition("-")[0])
    created = None if info is None else _iso(info.created_at_seconds)
    size_bytes, metrics = (None, {}) if info is None else (info.size_bytes, info.metrics)
    return CheckpointReport(
        checkpoint_id, step, _next_index(checkpoint_id), created, size_bytes, metrics, problem is None, problem
    )


def _next_index(checkpoint_id: str) -> int:
    return int(checkpoint_id.partition("-")[2])


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
