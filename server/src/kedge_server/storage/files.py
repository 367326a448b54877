"""Files as the storage sees them: what was written is on the disk once `sync` is done, and not before.

`OsFiles` are those of the operating system. Tests have others, which forget what was not synced.
"""

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np

from kedge_server.storage.errors import StorageError, StorageFull, StorageUnavailable, SyncFailed

Buffer = bytes | np.ndarray
"""Bytes, or an array of uint8 that is contiguous."""

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_MAX_BUFFERS = min(1024, os.sysconf("SC_IOV_MAX"))


class File(Protocol):
    """An open file."""

    path: Path

    def write(self, offset: int, buffers: Sequence[Buffer]) -> None:
        """Writes all buffers, one after the other, from an offset on.

        Raises:
            StorageFull, StorageUnavailable: a part of it may have been written.
        """

    def read_into(self, offset: int, buffer: np.ndarray) -> int:
        """Fills an array of uint8 from an offset on, as far as the file goes. Returns the bytes read.

        Raises:
            StorageUnavailable: if it cannot be read.
        """

    def truncate(self, size: int) -> None:
        """Cuts the file.

        Raises:
            StorageFull, StorageUnavailable: it may be as it was.
        """

    def sync(self) -> None:
        """Brings the content, and the size, to the disk.

        Raises:
            SyncFailed: never to be tried again.
        """

    def size(self) -> int:
        """The length in bytes."""

    def close(self) -> None:
        """Closes it, synced or not."""


class Files(Protocol):
    """A file system. Names in a directory are on the disk once `sync_directory` is done."""

    def open(self, path: Path, *, writable: bool = False, create: bool = False) -> File:
        """Opens a file; `create` makes it, or empties it, and implies `writable`.

        Raises:
            StorageFull, StorageUnavailable: if that cannot be.
        """

    def rename(self, old: Path, new: Path) -> None:
        """Gives a file or directory another name; a file of that name is gone.

        Raises:
            StorageFull, StorageUnavailable: both are as they were.
        """

    def unlink(self, path: Path) -> None:
        """Removes a file. None of this name: nothing happens.

        Raises:
            StorageUnavailable: it is as it was.
        """

    def list(self, directory: Path) -> list[str]:
        """The names in a directory, in order; none if there is no such directory.

        Raises:
            StorageUnavailable: if it cannot be read.
        """

    def make_directory(self, directory: Path) -> None:
        """Makes a directory in one that there is. It may be there already.

        Raises:
            StorageFull, StorageUnavailable: if that cannot be.
        """

    def sync_directory(self, directory: Path) -> None:
        """Brings the names in a directory to the disk.

        Raises:
            SyncFailed: never to be tried again.
        """


class OsFiles:
    """The files of the operating system."""

    def open(self, path: Path, *, writable: bool = False, create: bool = False) -> "OsFile":
        """Opens a file. See `Files`."""
        flags = os.O_RDWR if writable or create else os.O_RDONLY
        if create:
            flags |= os.O_CREAT | os.O_TRUNC
        with _failing(path, "opened"):
            descriptor = os.open(path, flags | os.O_CLOEXEC, 0o644)
        return OsFile(path, descriptor, is_writable=writable or create)

    def rename(self, old: Path, new: Path) -> None:
        """Gives another name. See `Files`."""
        with _failing(old, f"renamed to {new.name}"):
            old.rename(new)

    def unlink(self, path: Path) -> None:
        """Removes a file. See `Files`."""
        with _failing(path, "removed"):
            path.unlink(missing_ok=True)

    def list(self, directory: Path) -> list[str]:
        """The names in a directory. See `Files`."""
        with _failing(directory, "read"):
            return sorted(path.name for path in directory.iterdir()) if directory.is_dir() else []

    def make_directory(self, directory: Path) -> None:
        """Makes a directory. See `Files`."""
        with _failing(directory, "made"):
            directory.mkdir(exist_ok=True)

    def sync_directory(self, directory: Path) -> None:
        """Brings the names to the disk. See `Files`."""
        with _failing_sync(directory):
            descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


class OsFile:
    """An open file of the operating system."""

    def __init__(self, path: Path, descriptor: int, *, is_writable: bool = False) -> None:
        self.path = path
        self._descriptor = descriptor
        self._is_writable = is_writable
        self._let_go_up_to = 0

    def write(self, offset: int, buffers: Sequence[Buffer]) -> None:
        """Writes all buffers. See `File`."""
        left = [buffer for buffer in buffers if len(buffer)]
        while left:
            with _failing(self.path, "written"):
                written = os.pwritev(self._descriptor, [_view(buffer) for buffer in left[:_MAX_BUFFERS]], offset)
            offset += written
            left = _after(left, written)

    def read_into(self, offset: int, buffer: np.ndarray) -> int:
        """Fills an array. See `File`."""
        done = 0
        while done < len(buffer):
            with _failing(self.path, "read"):
                count = os.preadv(self._descriptor, [buffer[done:].data], offset + done)
            if not count:
                break
            done += count
        return done

    def truncate(self, size: int) -> None:
        """Cuts it. See `File`."""
        with _failing(self.path, "cut"):
            os.ftruncate(self._descriptor, size)

    def sync(self) -> None:
        """Brings it to the disk. See `File`."""
        with _failing_sync(self.path):
            os.fdatasync(self._descriptor)
        if self._is_writable:
            self._let_go_of_pages()

    def _let_go_of_pages(self) -> None:
        """What was written is read at the next start, if ever. Its memory serves what is written next.

        Where a machine gives memory back to its host, writing into pages that were long unused took 13 times as long.
        """
        whole = self.size() // _PAGE_BYTES * _PAGE_BYTES
        if whole > self._let_go_up_to:
            os.posix_fadvise(self._descriptor, self._let_go_up_to, whole - self._let_go_up_to, os.POSIX_FADV_DONTNEED)
        self._let_go_up_to = whole

    def size(self) -> int:
        """Its length. See `File`."""
        with _failing(self.path, "read"):
            return os.fstat(self._descriptor).st_size

    def close(self) -> None:
        """Closes it. See `File`."""
        os.close(self._descriptor)


def read_file(files: Files, path: Path) -> bytes | None:
    """All bytes of a file that is not large; None if there is none of this name.

    Raises:
        StorageUnavailable: if it cannot be read.
    """
    if path.name not in files.list(path.parent):
        return None
    file = files.open(path)
    try:
        content = np.empty(file.size(), np.uint8)
        return content[: file.read_into(0, content)].tobytes()
    finally:
        file.close()


def replace_file(
    files: Files,
    path: Path,
    content: Sequence[Buffer],
    *,
    on_written: Callable[[], None] = lambda: None,
    on_renamed: Callable[[], None] = lambda: None,
) -> None:
    """Puts a file in its place whole, or not at all: written beside it, synced, renamed, and the directory synced.

    Args:
        files: the file system.
        path: the file; what else ends in `.tmp` of its name is left over from a crash, and goes.
        content: what it will hold.
        on_written: called when all is written under the other name.
        on_renamed: called when it has its name, before the directory is synced.

    Raises:
        StorageFull, StorageUnavailable: the file is as it was.
        SyncFailed: nobody knows.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        _write_whole(files, temporary, content)
        on_written()
        files.rename(temporary, path)
    except (StorageFull, StorageUnavailable):
        _unlink_quietly(files, temporary)
        raise
    on_renamed()
    files.sync_directory(path.parent)


TEMPORARY = ".tmp"
"""How the names end of files that are not finished."""


def _write_whole(files: Files, path: Path, content: Sequence[Buffer]) -> None:
    file = files.open(path, create=True)
    try:
        file.write(0, content)
        file.sync()
    finally:
        file.close()


def _unlink_quietly(files: Files, path: Path) -> None:
    """What is left over does no harm: the next attempt empties it."""
    try:
        files.unlink(path)
    except StorageError:
        return


def _view(buffer: Buffer) -> memoryview:
    return buffer.data if isinstance(buffer, np.ndarray) else memoryview(buffer)


def _after(buffers: list[Buffer], written: int) -> list[Buffer]:
    """What is left of them once so many bytes are written."""
    for at, buffer in enumerate(buffers):
        if written < len(buffer):
            # A view: a slice of bytes would be a copy, and of a large array there may be many turns.
            return [np.frombuffer(buffer, np.uint8)[written:], *buffers[at + 1 :]]
        written -= len(buffer)
    return []


_NO_ROOM = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the quota is used up"}


@contextmanager
def _failing(path: Path, what: str) -> Iterator[None]:
    """Says of the system's refusal what it means."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_ROOM:
            why = _NO_ROOM[error.errno]
            raise StorageFull(f"{path} cannot be {what}, as {why}: make room; it goes on by itself then") from error
        raise StorageUnavailable(
            f"{path} cannot be {what} ({error.strerror}): see to the disk and its permissions"
        ) from error


@contextmanager
def _failing_sync(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SyncFailed(
            f"{path} cannot be brought to the disk ({error.strerror}), and what is on it is not known now: "
            "see to the disk, then start the server again"
        ) from error
