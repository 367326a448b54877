"""Files that others read while they are written."""

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Waits for others that write files in this folder. The lock is the folder's own, so nothing is left behind."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace(path: Path, content: bytes, *, mode: int) -> None:
    """Writes a file: whoever reads it meanwhile sees all of the old one or all of the new one.

    Args:
        path: a file that is there keeps its owner and its mode.
        content: all of it.
        mode: of a file that is not there.

    Raises:
        OSError: it cannot be written; what is there is left as it is.
    """
    path = path.resolve()  # a link goes on pointing where it does
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # with mode 0600
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            if path.exists():
                was = path.stat()
                os.fchown(descriptor, was.st_uid, was.st_gid)
                mode = was.st_mode & 0o7777
            os.fchmod(descriptor, mode)
            os.fsync(descriptor)
        temporary.replace(path)
    except BaseException:
        temporary.unlink()
        raise
