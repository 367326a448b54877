"""Files in memory that lose power: what was not synced by then is on the disk, or is not, each piece of it for itself.

A write is cut into pages. Of the pages, cuts and names that were not synced any subset gets through, which is what a
page cache that is written back in any order leaves. What a write does to one page is whole or not there at all.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from kedge_server.storage.errors import StorageFull, StorageUnavailable

Keeps = Callable[[], bool]


class PowerLost(Exception):  # noqa: N818  it says what is the case
    """The power went, in the middle of something. `ForgetfulFiles.after_loss` says what is left."""


@dataclass
class Node:
    """A file, or a directory if `is_directory`."""

    is_directory: bool = False
    content: bytearray = field(default_factory=bytearray)
    """As whoever reads it now sees it."""
    durable: bytearray = field(default_factory=bytearray)
    pending: list[Callable[[bytearray], None]] = field(default_factory=list)

    def do(self, change: Callable[[bytearray], None]) -> None:
        change(self.content)
        self.pending.append(change)

    def sync(self) -> None:
        self.durable[:] = self.content
        self.pending.clear()

    def after_loss(self, keeps: Keeps) -> "Node":
        for change in self.pending:
            if keeps():
                change(self.durable)
        return Node(self.is_directory, bytearray(self.durable), self.durable)


class ForgetfulFiles:
    """A file system.

    Attributes:
        room: bytes that may be written before the disk is full; None: it never is.
        cuts: whether files can be cut.
        steps_left: so many writes, cuts, renames and syncs are done yet before the power goes; None: it stays.
    """

    def __init__(self, page_bytes: int, root: Path) -> None:
        self.page_bytes = page_bytes
        self.room: int | None = None
        self.cuts = True
        self.steps_left: int | None = None
        self.names: dict[Path, Node] = {root: Node(is_directory=True)}
        self._durable_names = dict(self.names)
        self._pending: list[dict[Path, Node | None]] = []

    def open(self, path: Path, *, writable: bool = False, create: bool = False) -> "ForgetfulFile":
        if create and path not in self.names:
            self._rename({path: Node()})
        if path not in self.names:
            raise StorageUnavailable(f"{path} is not there")
        file = ForgetfulFile(self, path, self.names[path])
        if create and file.size():
            file.truncate(0)
        return file

    def rename(self, old: Path, new: Path) -> None:
        self._rename({old: None, new: self.names[old]})

    def unlink(self, path: Path) -> None:
        self._rename({path: None})

    def list(self, directory: Path) -> list[str]:
        return sorted(path.name for path in self.names if path.parent == directory and path != directory)

    def make_directory(self, directory: Path) -> None:
        if directory not in self.names:
            self._rename({directory: Node(is_directory=True)})

    def sync_directory(self, directory: Path) -> None:
        self.step()
        for change in self._pending:
            if next(iter(change)).parent == directory:
                _apply(self._durable_names, change)
        self._pending = [change for change in self._pending if next(iter(change)).parent != directory]

    def after_loss(self, keeps: Keeps) -> "ForgetfulFiles":
        """What is there when the power is back. Nobody may use these files then."""
        for change in self._pending:
            if keeps():
                _apply(self._durable_names, change)
        files = ForgetfulFiles(self.page_bytes, Path("/"))
        files.names = {
            path: node.after_loss(keeps)
            for path, node in self._durable_names.items()
            if all(parent in self._durable_names for parent in path.parents if parent != Path("/"))
        }
        files._durable_names = dict(files.names)
        return files

    def step(self) -> None:
        """Something is about to be done."""
        if self.steps_left is not None:
            self.steps_left -= 1
            if self.steps_left < 0:
                raise PowerLost

    def _rename(self, change: dict[Path, Node | None]) -> None:
        self.step()
        _apply(self.names, change)
        self._pending.append(change)


class ForgetfulFile:
    """An open file."""

    def __init__(self, files: ForgetfulFiles, path: Path, node: Node) -> None:
        self.path = path
        self._files = files
        self._node = node

    def write(self, offset: int, buffers: Sequence[bytes | np.ndarray]) -> None:
        raw = b"".join(bytes(buffer) for buffer in buffers)
        room = self._files.room
        fits = raw if room is None else raw[:room]
        self._write(offset, fits)
        if room is not None:
            self._files.room = room - len(fits)
        if len(fits) < len(raw):
            raise StorageFull(f"{self.path} cannot be written")

    def _write(self, offset: int, raw: bytes) -> None:
        page = self._files.page_bytes
        while raw:
            self._files.step()
            count = min(page - offset % page, len(raw))
            self._node.do(_writing(offset, raw[:count]))
            offset, raw = offset + count, raw[count:]

    def read_into(self, offset: int, buffer: np.ndarray) -> int:
        raw = self._node.content[offset : offset + len(buffer)]
        buffer[: len(raw)] = np.frombuffer(raw, np.uint8)
        return len(raw)

    def truncate(self, size: int) -> None:
        if not self._files.cuts:
            raise StorageUnavailable(f"{self.path} cannot be cut")
        self._files.step()
        self._node.do(_cutting(size))

    def sync(self) -> None:
        self._files.step()
        self._node.sync()

    def size(self) -> int:
        return len(self._node.content)

    def close(self) -> None:
        pass


def _writing(offset: int, raw: bytes) -> Callable[[bytearray], None]:
    def change(content: bytearray) -> None:
        content.extend(bytes(max(offset + len(raw) - len(content), 0)))
        content[offset : offset + len(raw)] = raw

    return change


def _cutting(size: int) -> Callable[[bytearray], None]:
    def change(content: bytearray) -> None:
        del content[size:]

    return change


def _apply(names: dict[Path, Node], change: dict[Path, Node | None]) -> None:
    for path, node in change.items():
        if node is None:
            names.pop(path, None)
        else:
            names[path] = node
