"""What a checkpoint consists of, byte for byte: its manifest, and the files that this lists.

Invariant: there is no byte of the manifest or of a listed file that can change, go or come without being noticed.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c
import numpy as np

from kedge_server.core.stored import CheckpointInfo
from kedge_server.storage.errors import CheckpointDamaged, StorageError, StorageUnavailable
from kedge_server.storage.files import TEMPORARY, Files, read_file
from kedge_server.storage.sealed import seal, unseal

MANIFEST = "manifest.json"
VERSION = 1

_PIECE_BYTES = 4 << 20


class FileEntry(NamedTuple):
    """One file."""

    path: str
    """In the checkpoint's directory, with slashes."""
    size: int
    crc32c: int


class ArrayEntry(NamedTuple):
    """One array of the state."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    crc32c: int
    """Of its bytes in C order."""

    @property
    def size_bytes(self) -> int:
        """Of its elements."""
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize


class Contents(NamedTuple):
    """What the manifest says."""

    info: CheckpointInfo
    files: tuple[FileEntry, ...]
    arrays: tuple[ArrayEntry, ...]


def encode(contents: Contents) -> bytes:
    """The manifest: a JSON object in one line, and its checksum in another."""
    value = {
        "version": VERSION,
        "checkpoint": {**contents.info._asdict(), "metrics": dict(contents.info.metrics)},
        "files": contents.files,
        "arrays": contents.arrays,
    }
    return seal(json.dumps(value, separators=(",", ":")).encode())


def decode(raw: bytes) -> Contents:
    """What a manifest says.

    Raises:
        ValueError: it is not whole, or of another version; the message says so.
    """
    body = unseal(raw)
    try:
        return _decoded(json.loads(body))
    except (TypeError, LookupError, RecursionError) as error:
        raise ValueError(f"it is not what this server writes: {error}") from error


def _decoded(value: dict[str, Any]) -> Contents:
    if value["version"] != VERSION:
        raise ValueError(f"it is of version {value['version']}, and this server reads version {VERSION}")
    return Contents(
        CheckpointInfo(**value["checkpoint"]),
        tuple(FileEntry(*entry) for entry in value["files"]),
        tuple(ArrayEntry(name, dtype, tuple(shape), crc32c) for name, dtype, shape, crc32c in value["arrays"]),
    )


def array_entry(name: str, array: np.ndarray) -> ArrayEntry:
    """The entry of an array."""
    raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return ArrayEntry(name, array.dtype.name, array.shape, _extended(0, raw))


def read_contents(files: Files, directory: Path) -> Contents:
    """The manifest of a checkpoint.

    Raises:
        CheckpointDamaged: it is missing, cannot be read, or is not whole.
    """
    try:
        raw = read_file(files, directory / MANIFEST)
    except StorageError as error:
        raise damaged(directory, error.message) from error
    if raw is None:
        raise damaged(directory, f"it has no {MANIFEST}")
    try:
        contents = decode(raw)
    except ValueError as error:
        raise damaged(directory, f"of its {MANIFEST}, {error}") from error
    if contents.info.checkpoint_id != directory.name:
        raise damaged(directory, f"its manifest is that of checkpoint {contents.info.checkpoint_id}")
    return contents


def take_inventory(files: Files, directory: Path) -> tuple[FileEntry, ...]:
    """The files that are there, as they read, the manifest left out.

    Raises:
        StorageUnavailable: one of them cannot be read.
    """
    return tuple(FileEntry(path, *_measured(files, directory / path)) for path in _walk(files, directory))


def check_inventory(files: Files, directory: Path, expected: tuple[FileEntry, ...]) -> None:
    """Reads all files of a checkpoint.

    Raises:
        CheckpointDamaged: naming a file that is missing, too many, or not as the manifest says.
    """
    try:
        there = set(_walk(files, directory))
        for path in sorted(there ^ {entry.path for entry in expected}):
            what = "is not in its manifest" if path in there else "is missing"
            raise damaged(directory, f"file {path} {what}")
        for entry in expected:
            _check_file(files, directory, entry)
    except StorageUnavailable as error:
        raise damaged(directory, error.message) from error


def damaged(directory: Path, what: str) -> CheckpointDamaged:
    """The error of a checkpoint that is not as it was written."""
    return CheckpointDamaged(
        f"checkpoint {directory.name} is damaged: {what}; go on from another one, or bring {directory} back from a copy"
    )


def directories(files: Files, directory: Path) -> Iterator[Path]:
    """A directory and those in it, the inner ones first."""
    for name in files.list(directory):
        if (directory / name).is_dir():
            yield from directories(files, directory / name)
    yield directory


def _check_file(files: Files, directory: Path, entry: FileEntry) -> None:
    size, crc32c = _measured(files, directory / entry.path)
    if size != entry.size:
        raise damaged(directory, f"file {entry.path} has {size} bytes, and its manifest says {entry.size}")
    if crc32c != entry.crc32c:
        raise damaged(directory, f"file {entry.path} is not as it was written: the checksum is another")


def _walk(files: Files, directory: Path) -> Iterator[str]:
    for inner in directories(files, directory):
        for name in files.list(inner):
            path = (inner / name).relative_to(directory).as_posix()
            if not (inner / name).is_dir() and path not in (MANIFEST, MANIFEST + TEMPORARY):
                yield path


def _measured(files: Files, path: Path) -> tuple[int, int]:
    """The bytes that can be read of a file, and their CRC-32C."""
    file = files.open(path)
    try:
        piece = np.empty(_PIECE_BYTES, np.uint8)
        size = crc32c = 0
        while count := file.read_into(size, piece):
            size, crc32c = size + count, _extended(crc32c, piece[:count])
        return size, crc32c
    finally:
        file.close()


def _extended(crc32c: int, raw: np.ndarray) -> int:
    return int(google_crc32c.extend(crc32c, raw))
