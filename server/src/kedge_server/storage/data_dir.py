"""The data directory of a server: who holds it, how often servers were started on it, and where its runs are.

    lock                     held with flock by the server as long as it lives; has its process id, for people
    generation               the number of starts so far, written anew at each
    runs/{run}/journal/, runs/{run}/checkpoints/
    runs/.deleted-{run}-{n}/ a run that is being deleted

Invariant: one process at a time has a directory open.
"""

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kedge_server.storage.errors import DataDirError, StorageFull, StorageUnavailable
from kedge_server.storage.files import Files, OsFiles, read_file, replace_file
from kedge_server.storage.sealed import seal, unseal
from kedge_server.telemetry.failpoints import failpoint

_LOCK, _GENERATION, _RUNS = "lock", "generation", "runs"
_DELETED = ".deleted-"

JOURNAL, CHECKPOINTS = "journal", "checkpoints"
"""The directories of a run."""


class DataDir:
    """A data directory that this process holds until `close`, or its end. Make it with `open` or `look`.

    Attributes:
        path: where it is.
        generation: the number of servers that were started on it, this one among them.
        problems: what is wrong with the directory itself, as `look` found it; a server does not start then.
    """

    def __init__(self, path: Path, files: Files, *, lock: int, generation: int, problems: tuple[str, ...] = ()) -> None:
        self.path = path
        self.generation = generation
        self.problems = problems
        self._files = files
        self._lock: int | None = lock
        self._runs = path / _RUNS

    @classmethod
    def open(cls, path: Path, files: Files) -> "DataDir":
        """Opens a directory for a server: makes it where there is none, and counts the start.

        Raises:
            DataDirError: another process holds it, it cannot be made or written to, or it is damaged. Nothing was
                changed then but what was made.
            SyncFailed: nobody knows what is on the disk.
        """
        with _unusable(path):
            _make(path)
            _require_ours(path)
            lock = _locked(path, os.O_RDWR | os.O_CREAT)
            try:
                _write_process_id(lock)
                files.make_directory(path / _RUNS)
                generation = _next_generation(path, files)
                _remove_deleted(path / _RUNS, files)
            except BaseException:
                _release(lock)
                raise
        return cls(path, files, lock=lock, generation=generation)

    @classmethod
    def look(cls, path: Path, files: Files | None = None) -> "DataDir":
        """Opens a directory to read what is there. Nothing is changed in it; no server can be started meanwhile.

        Raises:
            DataDirError: another process holds it, or it is no data directory.
        """
        files = files or OsFiles()
        with _unusable(path):
            if not (path / _RUNS).is_dir():
                raise DataDirError(f"{path} is no data directory: there is no {_RUNS} in it; give that of a server")
            lock = _locked_for_reading(path)
        try:
            return cls(path, files, lock=lock, generation=_read_generation(path, files))
        except (DataDirError, StorageUnavailable) as error:
            return cls(path, files, lock=lock, generation=0, problems=(error.message,))

    def close(self) -> None:
        """Lets go of it. Once is enough, more do no harm."""
        if self._lock is not None:
            _release(self._lock)
            self._lock = None

    def __enter__(self) -> "DataDir":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run_names(self) -> list[str]:
        """The ids of the runs that are there, in order."""
        return [
            name for name in self._files.list(self._runs) if not name.startswith(".") and (self._runs / name).is_dir()
        ]

    def run_directory(self, run_id: str) -> Path:
        """Where a run is, whether there is one or not."""
        if not run_id or run_id.startswith(".") or "/" in run_id:
            raise ValueError(f"{run_id!r} cannot name a directory of a run")
        return self._runs / run_id

    def create_run(self, run_id: str) -> Path:
        """Makes the directories of a run, empty, and on the disk.

        Raises:
            DataDirError: there are some of this name.
            StorageFull, StorageUnavailable: there is none of this name, or an empty one.
            SyncFailed: nobody knows.
        """
        directory = self.run_directory(run_id)
        if run_id in self._files.list(self._runs):
            raise DataDirError(f"{directory} is there already: delete the run first, or choose another name")
        for made in (directory, directory / JOURNAL, directory / CHECKPOINTS):
            self._files.make_directory(made)
        for synced in (directory / JOURNAL, directory / CHECKPOINTS, directory, self._runs):
            self._files.sync_directory(synced)
        return directory

    def delete_run(self, run_id: str) -> None:
        """Deletes a run: once it has another name on the disk, it is gone, whatever happens. None there: nothing.

        Raises:
            StorageUnavailable: it is as it was.
            SyncFailed: nobody knows.
        """
        directory = self.run_directory(run_id)
        there = set(self._files.list(self._runs))
        if run_id not in there:
            return
        deleted = next(name for n in range(len(there) + 1) if (name := f"{_DELETED}{run_id}-{n}") not in there)
        self._files.rename(directory, self._runs / deleted)
        self._files.sync_directory(self._runs)
        shutil.rmtree(self._runs / deleted, ignore_errors=True)  # the rest goes at the next start


def _require_ours(path: Path) -> None:
    """Refuses what belongs to somebody else: what looks like the rest of a run is removed at a start."""
    names = {entry.name for entry in path.iterdir()}
    if names - {_RUNS} and not names & {_LOCK, _GENERATION}:
        raise DataDirError(f"{path} is not empty, and no data directory: give an empty one, or a name that is free")
    runs = path / _RUNS
    for run in runs.iterdir() if runs.is_dir() else ():
        foreign = {entry.name for entry in run.iterdir()} - {JOURNAL, CHECKPOINTS} if run.is_dir() else {"bytes"}
        if foreign and not run.name.startswith("."):
            what = ", ".join(sorted(foreign))
            raise DataDirError(f"{run} holds {what}, which is no part of a run: move that out of the data directory")


def _make(path: Path) -> None:
    if path.is_dir():
        return
    if path.exists():
        raise DataDirError(f"the data directory {path} is a file: give a directory, or a name that is free")
    if not path.parent.is_dir():
        raise DataDirError(f"the data directory {path} cannot be made, as there is no {path.parent}: make that first")
    path.mkdir(mode=0o700)
    OsFiles().sync_directory(path.parent)


@contextmanager
def _unusable(path: Path) -> Iterator[None]:
    """Says of a directory that the system, or the disk, refuses what that means."""
    try:
        yield
    except (StorageFull, StorageUnavailable) as error:
        raise DataDirError(f"the data directory {path} cannot be used: {error.message}") from error
    except OSError as error:
        raise DataDirError(
            f"the data directory {path} cannot be used ({error.strerror}: {error.filename}): "
            "see to its permissions and its disk, or give another"
        ) from error


# ----------------------------------------------------------------------------------------------------------- the lock

_held: set[int] = set()
"""Descriptors of locks. A lock goes with the last descriptor of its file, and a fork would have another."""


def _close_in_child() -> None:
    for descriptor in _held:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)


def _locked(path: Path, flags: int) -> int:
    """A descriptor of the lock's file, which this process holds alone."""
    lock = os.open(path / _LOCK, flags | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        last = os.pread(lock, 32, 0).decode("ascii", "replace").strip()
        os.close(lock)
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise
        raise DataDirError(
            f"the data directory {path} is in use by another process (the last server there has the process id "
            f"{last or 'unknown'}): stop that one first, or give another directory"
        ) from None
    _held.add(lock)
    return lock


def _locked_for_reading(path: Path) -> int:
    """A lock, even where nothing can be written. Where there is no lock there is no server: a copy."""
    if (path / _LOCK).exists():
        return _locked(path, os.O_RDONLY)
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def _write_process_id(lock: int) -> None:
    with contextlib.suppress(OSError):  # for people; on a full disk the rest goes on
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)


def _release(lock: int) -> None:
    _held.discard(lock)
    os.close(lock)


# ----------------------------------------------------------------------------------------------------- the generation


def _next_generation(path: Path, files: Files) -> int:
    generation = _read_generation(path, files) + 1
    content = seal(str(generation).encode())
    replace_file(files, path / _GENERATION, [content], on_written=lambda: failpoint("generation.write"))
    return generation


def _read_generation(path: Path, files: Files) -> int:
    """The number of starts so far; 0 in a new directory.

    Raises:
        DataDirError: the file is damaged.
    """
    content = read_file(files, path / _GENERATION)
    if content is None:
        return 0
    try:
        return int(unseal(content))
    except ValueError:
        raise DataDirError(
            f"{path / _GENERATION} is damaged: bring it back from a copy, or remove it, "
            "and the starts of servers are counted from 1 anew"
        ) from None


def _remove_deleted(runs: Path, files: Files) -> None:
    for name in files.list(runs):
        if name.startswith(_DELETED):
            shutil.rmtree(runs / name, ignore_errors=True)
