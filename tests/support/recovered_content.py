"""All that a recovery hands on of a run's directory, so that two of them can be compared byte for byte.

What it makes of it is a function of that: a checkpoint, or the run's creation, and every commit since.
"""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from kedge_server.storage.errors import StorageError
from kedge_server.storage.files import OsFiles
from kedge_server.storage.journal import Journal
from kedge_server.storage.plain import encode
from kedge_server.storage.recovery import Recovery

SEGMENT_BYTES = 20_000
RUN = "runs/main"


class Content(NamedTuple):
    """What is in a run's directory when nothing is damaged."""

    commits: Mapping[int, bytes]
    """Each with its payload, by index."""
    states: Mapping[int, bytes]
    """What checkpoints hold, by the index of the first commit that is not in them."""

    @property
    def next_index(self) -> int:
        return max(self.commits) + 1


class Recovered(NamedTuple):
    """What was recovered."""

    origin: int
    """The index of the first commit after the checkpoint that it began with; 2 after the run's creation."""
    state: bytes
    commits: Mapping[int, bytes]
    problems: list[str]

    @property
    def next_index(self) -> int:
        return self.origin + len(self.commits)


def content_of(directory: Path) -> Content:
    """Reads everything in a directory that is in order."""
    journal = Journal.open(directory / "journal", OsFiles(), segment_bytes=SEGMENT_BYTES, repairs=False)
    records = journal.records(journal.first_index)
    commits = {record.index: record.body + record.payload.tobytes() for record in records}
    journal.close()
    states = {}
    checkpoints = sorted((directory / "checkpoints").iterdir())
    for number, checkpoint in enumerate(checkpoints):
        only = directory.with_name(f"only{number}")
        shutil.copytree(directory, only, ignore=_checkpoints_but(checkpoint.name))
        found = recovered(only)
        assert isinstance(found, Recovered)
        states[found.origin] = found.state
        shutil.rmtree(only)
    return Content(commits, states)


def _checkpoints_but(kept: str) -> Callable[[str, list[str]], list[str]]:
    return lambda at, names: [name for name in names if name != kept] if Path(at).name == "checkpoints" else []


def recovered(directory: Path) -> Recovered | StorageError:
    """What a server would recover, or why it would refuse to."""
    recovery = Recovery(RUN, directory, OsFiles(), segment_bytes=SEGMENT_BYTES, repairs=True)
    try:
        origin = recovery.open()
        assert origin is not None
        first = origin.image.next_index
        state = _bytes(origin.image, origin.arrays, origin.held)
        replayed = [one for batch in recovery.batches() for one in batch]
    except StorageError as error:
        return error
    finally:
        if recovery._journal is not None:
            recovery._journal.close()
    commits = {first + number: encode(one.commit) + one.payload.tobytes() for number, one in enumerate(replayed)}
    return Recovered(first, state, commits, recovery.problems)


def _bytes(image, arrays, held) -> bytes:
    parts = [encode(image.state())]
    for group in (arrays, held):
        parts += [f"{name} {group[name].dtype} {group[name].shape}".encode() + group[name].tobytes() for name in group]
    return b"|".join(parts)
