"""The checkpoints of one run: what is on the disk whole, or not at all.

One is a directory named after its step and the journal's next record. It is made under another name, every file of it
synced and read again, and gets its own name last; so one that has its own name and is not as its manifest says was
damaged since. Which to keep and when to take one is not decided here. It runs synchronously, where no event loop does.
"""

import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kedge_server.core.stored import CheckpointInfo
from kedge_server.storage import orbax_files
from kedge_server.storage.contents import (
    MANIFEST,
    ArrayEntry,
    Contents,
    array_entry,
    check_inventory,
    damaged,
    directories,
    encode,
    read_contents,
    take_inventory,
)
from kedge_server.storage.errors import CheckpointDamaged, StorageError, StorageFull, StorageUnavailable
from kedge_server.storage.files import Files, read_file, replace_file
from kedge_server.telemetry.failpoints import failpoint

__all__ = ["Checkpoint", "CheckpointInfo", "CheckpointMissing", "CheckpointStore"]

_STATE, _IMAGE = "state", "image.json"
_NEW, _DELETED = ".new-", ".deleted-"
_ID = re.compile(r"\d+-\d+")

_OVERHEAD_BYTES = 128 << 10
"""What a checkpoint takes beyond its content: about a dozen small files and directories."""

_REMOVALS = 3


class CheckpointMissing(StorageError):  # noqa: N818  it says what is the case
    """There is no checkpoint of this id."""


class Checkpoint(NamedTuple):
    """A checkpoint's content, as it was given."""

    info: CheckpointInfo
    image: bytes
    arrays: dict[str, np.ndarray]


class CheckpointStore:
    """The checkpoints in one directory. One thread saves, loads and deletes; any may look at the list.

    Nothing is changed on the disk by looking.

    Args:
        directory: theirs; it is there.
        files: the file system.
    """

    def __init__(self, directory: Path, files: Files) -> None:
        self._directory = directory
        self._files = files
        self._infos: dict[str, CheckpointInfo] = {}
        self._damaged: dict[str, str] = {}
        for name in files.list(directory):
            if _ID.fullmatch(name):
                self._look_at(name)

    def _look_at(self, checkpoint_id: str) -> None:
        try:
            info = read_contents(self._files, self._directory / checkpoint_id).info
        except CheckpointDamaged as error:
            self._damaged[checkpoint_id] = error.message
        else:
            self._infos[checkpoint_id] = info

    def list(self) -> list[CheckpointInfo]:
        """Those whose manifest is whole and that were not found damaged since, the newest first."""
        return sorted(self._infos.values(), key=lambda info: info.next_index, reverse=True)

    def damaged(self) -> dict[str, str]:
        """The ids of the others, each with what is wrong."""
        return dict(self._damaged)

    def clean_up(self) -> None:
        """Removes what is left over from saving and deleting that a crash ended."""
        for name in self._files.list(self._directory):
            if name.startswith((_NEW, _DELETED)):
                _remove(self._directory / name)

    def save(
        self,
        *,
        step: int,
        next_index: int,
        created_at_seconds: float,
        metrics: Mapping[str, float],
        image: bytes,
        arrays: Mapping[str, np.ndarray],
    ) -> CheckpointInfo:
        """Takes a checkpoint: once this returns, it is on the disk, and reads as it was given.

        An intact one at the same place of the journal is of the same state: it gets the metrics, and stays.

        Args:
            step: the run's.
            next_index: of the journal's first record that is not in it.
            created_at_seconds: the time, in seconds since 1970.
            metrics: by name.
            image: the run's image, in whatever form.
            arrays: the state, by flat names such as "fast.00000"; any shapes, any dtypes of numbers. They are only
                read, and may not change meanwhile.

        Raises:
            StorageFull, StorageUnavailable: nothing of it is left.
            SyncFailed: nobody knows what is left.
        """
        checkpoint_id = f"{step}-{next_index}"
        if there := self._intact(checkpoint_id):
            return self._with_metrics(there, metrics)
        self.clean_up()
        self._check_room(sum(array.nbytes for array in arrays.values()) + len(image))
        info = CheckpointInfo(checkpoint_id, step, next_index, created_at_seconds, 0, _floats(metrics))
        new = self._directory / f"{_NEW}{checkpoint_id}-{secrets.token_hex(4)}"  # Orbax may still write to an older one
        try:
            info = self._write(new, info, image=image, arrays=arrays)
            self._give_place(new, checkpoint_id)
        except Exception:
            _remove(new)
            raise
        failpoint("checkpoint.manifest.renamed")
        self._files.sync_directory(self._directory)
        self._remember(info)
        return info

    def load(self, checkpoint_id: str) -> Checkpoint:
        """Reads a checkpoint, once all of its files are seen to be as they were written.

        Raises:
            CheckpointDamaged: naming the file. It is no longer in the list then.
            CheckpointMissing: there is none of this id.
        """
        contents = self._verified(checkpoint_id)
        directory = self._directory / checkpoint_id
        try:
            image = read_file(self._files, directory / _IMAGE)
            arrays = _read_state(directory, contents.arrays)
        except Exception as error:  # the files are intact: whatever Orbax makes of them, it is not what it was given
            found = damaged(directory, f"its state cannot be read ({str(error)[:300]})")
            self._forget(checkpoint_id, found.message)
            raise found from error
        assert image is not None, "it was in the manifest, and there"
        return Checkpoint(contents.info, image, arrays)

    def verify(self, checkpoint_id: str) -> None:
        """Reads all files of a checkpoint and compares them with its manifest. Raises what `load` does.

        One that was brought back from a copy is in the list again then.
        """
        self._verified(checkpoint_id)

    def delete(self, checkpoint_id: str) -> None:
        """Removes a checkpoint, intact or not. From the first moment on none of this id is there.

        Raises:
            CheckpointMissing: there is none of this id.
            StorageUnavailable: it is as it was.
            SyncFailed: nobody knows.
        """
        failpoint("checkpoint.retain.before")
        directory = self._existing(checkpoint_id)
        deleted = self._directory / f"{_DELETED}{checkpoint_id}-{secrets.token_hex(4)}"
        self._files.rename(directory, deleted)
        self._forget(checkpoint_id)
        self._files.sync_directory(self._directory)
        _remove(deleted)

    def _intact(self, checkpoint_id: str) -> Contents | None:
        try:
            return self._verified(checkpoint_id)
        except (CheckpointMissing, CheckpointDamaged):
            return None

    def _with_metrics(self, contents: Contents, metrics: Mapping[str, float]) -> CheckpointInfo:
        info = contents.info._replace(metrics={**contents.info.metrics, **_floats(metrics)})
        if info.metrics != contents.info.metrics:
            manifest = self._directory / info.checkpoint_id / MANIFEST
            replace_file(self._files, manifest, [encode(contents._replace(info=info))])
        self._remember(info)
        return info

    def _check_room(self, size_bytes: int) -> None:
        """A full disk is better found before than by Orbax, and what is left of the room is the journal's."""
        try:
            found = os.statvfs(self._directory)
        except OSError as error:
            raise StorageUnavailable(f"{self._directory} cannot be read ({error.strerror}): see to the disk") from error
        free = found.f_bavail * found.f_frsize
        if size_bytes + _OVERHEAD_BYTES > free:
            raise StorageFull(
                f"a checkpoint in {self._directory} takes {size_bytes + _OVERHEAD_BYTES:,} bytes, and there are "
                f"{free:,}: make room; it goes on by itself then"
            )

    def _write(
        self, new: Path, info: CheckpointInfo, *, image: bytes, arrays: Mapping[str, np.ndarray]
    ) -> CheckpointInfo:
        failpoint("checkpoint.write.before")
        self._files.make_directory(new)
        self._write_image(new / _IMAGE, image)
        orbax_files.write_arrays(new / _STATE, arrays)
        failpoint("checkpoint.write.after")
        self._sync(new)
        contents = self._contents(new, info, arrays)
        failpoint("checkpoint.manifest.before")
        replace_file(
            self._files, new / MANIFEST, [encode(contents)], on_written=lambda: failpoint("checkpoint.manifest.written")
        )
        return contents.info

    def _write_image(self, path: Path, image: bytes) -> None:
        file = self._files.open(path, create=True)
        try:
            file.write(0, [image])
        finally:
            file.close()

    def _sync(self, new: Path) -> None:
        failpoint("checkpoint.sync.before")
        for directory in directories(self._files, new):
            for name in self._files.list(directory):
                if not (directory / name).is_dir():
                    self._sync_file(directory / name)
            self._files.sync_directory(directory)

    def _sync_file(self, path: Path) -> None:
        file = self._files.open(path)
        try:
            file.sync()
        finally:
            file.close()

    def _contents(self, new: Path, info: CheckpointInfo, arrays: Mapping[str, np.ndarray]) -> Contents:
        """What was written, once it is known to read as what was given."""
        inventory = take_inventory(self._files, new)
        entries = tuple(array_entry(name, array) for name, array in arrays.items())
        try:
            for _ in _checked_arrays(new, entries):
                pass
        except Exception as error:
            raise StorageUnavailable(
                f"a checkpoint in {self._directory} does not read as it was written ({str(error)[:300]}): "
                "see to the disk"
            ) from error
        return Contents(info._replace(size_bytes=sum(entry.size for entry in inventory)), inventory, entries)

    def _give_place(self, new: Path, checkpoint_id: str) -> None:
        if checkpoint_id in self._damaged:
            self.delete(checkpoint_id)
        self._files.rename(new, self._directory / checkpoint_id)

    def _verified(self, checkpoint_id: str) -> Contents:
        directory = self._existing(checkpoint_id)
        try:
            contents = read_contents(self._files, directory)
            check_inventory(self._files, directory, contents.files)
        except CheckpointDamaged as error:
            self._forget(checkpoint_id, error.message)
            raise
        self._remember(contents.info)
        return contents

    def _existing(self, checkpoint_id: str) -> Path:
        directory = self._directory / checkpoint_id
        if not _ID.fullmatch(checkpoint_id) or checkpoint_id not in self._files.list(self._directory):
            raise CheckpointMissing(
                f"there is no checkpoint {checkpoint_id!r} in {self._directory}: choose one of the list"
            )
        return directory

    def _remember(self, info: CheckpointInfo) -> None:
        self._damaged.pop(info.checkpoint_id, None)
        self._infos = {**self._infos, info.checkpoint_id: info}

    def _forget(self, checkpoint_id: str, why_damaged: str | None = None) -> None:
        self._infos = {name: info for name, info in self._infos.items() if name != checkpoint_id}
        without = {name: why for name, why in self._damaged.items() if name != checkpoint_id}
        self._damaged = without if why_damaged is None else {**without, checkpoint_id: why_damaged}


def _read_state(directory: Path, entries: tuple[ArrayEntry, ...]) -> dict[str, np.ndarray]:
    there = dict(_checked_arrays(directory, entries))
    return {entry.name: there[entry.name] if entry.size_bytes else _empty(entry) for entry in entries}


def _checked_arrays(directory: Path, entries: tuple[ArrayEntry, ...]) -> Iterator[tuple[str, np.ndarray]]:
    """The arrays that have elements, as their entries say.

    Raises:
        ValueError: one of them is another.
    """
    expected = {entry.name: entry for entry in entries if entry.size_bytes}
    sizes = {name: entry.size_bytes for name, entry in expected.items()}
    for name, array in orbax_files.read_arrays(directory / _STATE, sizes):
        entry = expected[name]
        if (found := array_entry(name, array)) != entry._replace(shape=entry.shape or (1,)):
            raise ValueError(f"array {name} is {found}, not {entry}")
        yield name, array.reshape(entry.shape)


def _floats(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items()}


def _empty(entry: ArrayEntry) -> np.ndarray:
    return np.empty(entry.shape, np.dtype(entry.dtype))


def _remove(directory: Path) -> None:
    """As far as it goes: what stays is no checkpoint, and is tried again before the next one."""
    for _ in range(_REMOVALS):
        shutil.rmtree(directory, ignore_errors=True)  # Orbax may put another file there meanwhile
        if not directory.exists():
            return
