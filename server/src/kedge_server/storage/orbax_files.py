"""Named arrays as Orbax writes and reads them: one directory, flat names, exact bits.

Orbax runs event loops of its own, so none of this may be called where one runs. It syncs only a part of what it
writes, and says of a full disk in prose: whoever calls this syncs the files, and has the errors in the storage's words.
"""

import asyncio
import errno
import logging
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp

from kedge_server.storage.errors import StorageError, StorageFull, StorageUnavailable

logging.getLogger("absl").setLevel(logging.CRITICAL)
"""Orbax logs what it raises, with a page of traceback for each of its threads."""

_GROUP_BYTES = 64 << 20
"""So much is read at a time, so that to check what was written takes no second copy of a state."""

_ONE_SAVE = threading.Lock()
"""Orbax numbers its saves in a variable of the process."""

_OS_ERROR_CODE = re.compile(r"os_error_code='(\d+)'")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.]*")


def write_arrays(directory: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays into a directory that is not there yet. Blocks.

    Args:
        directory: where; with no element at all in the arrays nothing is made there.
        arrays: of any shape and dtype of numbers, by names of letters, digits, points and underscores.

    Raises:
        StorageFull, StorageUnavailable: a part may be there, and for a moment Orbax may go on to write.
        ValueError: a name is none.
    """
    if bad := [name for name in arrays if not _NAME.fullmatch(name)]:
        raise ValueError(f"{bad[0]!r} cannot name an array: use letters, digits, points and underscores")
    _check_thread()
    tree = {name: _as_orbax_takes_it(array) for name, array in arrays.items() if array.size}
    if not tree:
        return
    try:
        with _ONE_SAVE, _checkpointer() as checkpointer:
            checkpointer.save(directory.absolute(), tree)  # it takes no others
    except Exception as error:  # no narrower type: the reasons of a full disk alone are of three
        raise _in_our_words(error, directory) from error


def read_arrays(directory: Path, sizes: Mapping[str, int]) -> Iterator[tuple[str, np.ndarray]]:
    """Reads arrays by name, a part of them at a time. Blocks.

    Args:
        directory: that `write_arrays` wrote.
        sizes: the bytes of each array, those without any left out.

    Yields:
        Names and arrays, of one dimension where they had none.

    Raises:
        Exception: whatever Orbax says of files that are not as it wrote them.
    """
    _check_thread()
    for names in _groups(sizes):
        with _checkpointer() as checkpointer:
            part = ocp.args.PyTreeRestore(item=dict.fromkeys(names, 0), partial_restore=True)
            restored = checkpointer.restore(directory.absolute(), args=part)
        for name in names:
            yield name, restored.pop(name)


def _checkpointer() -> ocp.Checkpointer:
    # Compressed, float32 weights take 7 % less room, and writing them takes seven times as much of the processor.
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_compression=False))


def _groups(sizes: Mapping[str, int]) -> Iterator[Sequence[str]]:
    group: list[str] = []
    group_bytes = 0
    for name, size in sizes.items():
        if group and group_bytes + size > _GROUP_BYTES:
            yield group
            group, group_bytes = [], 0
        group.append(name)
        group_bytes += size
    if group:
        yield group


def _as_orbax_takes_it(array: np.ndarray) -> np.ndarray:
    """With a dimension: one of none comes back as a Python number, in another precision."""
    return np.ascontiguousarray(array).reshape(array.shape or (1,))


def _check_thread() -> None:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    raise RuntimeError("checkpoints are written and read on a thread of their own: an event loop runs in this one")


def _in_our_words(error: Exception, directory: Path) -> StorageError:
    code = _os_error_code(error)
    if code in (errno.ENOSPC, errno.EDQUOT):
        return StorageFull(f"{directory} cannot be written, as the disk is full: make room; it goes on by itself then")
    return StorageUnavailable(
        f"{directory} cannot be written ({str(error)[:300]}): see to the disk and its permissions"
    )


def _os_error_code(error: BaseException | None) -> int | None:
    """Of the system's refusal behind an error; None if there is none."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error.errno
        if found := _OS_ERROR_CODE.search(str(error)):
            return int(found[1])
        error = error.__cause__ or error.__context__
    return None
