"""What can go wrong with what is stored.

StorageError
├── StorageFull          there is no room; it may pass
├── StorageUnavailable   it cannot be read or written; it may pass
├── SyncFailed           nobody knows what is on the disk: the process must end
├── JournalCorrupt       a journal holds damage
├── CheckpointDamaged    a checkpoint does
└── DataDirError         a data directory cannot be used
"""

from pathlib import Path


class StorageError(Exception):
    """Something is wrong with what is stored, or cannot be stored.

    Attributes:
        message: what is wrong, and what to do.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class StorageFull(StorageError):  # noqa: N818  it says what is the case
    """There is no room on the disk, or the quota is used up. It may pass."""


class StorageUnavailable(StorageError):  # noqa: N818  it says what is the case
    """The disk refuses to be read or written. It may pass."""


class SyncFailed(StorageError):  # noqa: N818  it says what is the case
    """The system failed to bring to the disk what was written.

    It may have forgotten the data and say yes the next time, so it is never tried again: the process ends at once, and
    the next one reads what is there.
    """


class JournalCorrupt(StorageError):  # noqa: N818  it says what is the case
    """A journal holds damage, where no crash leaves any.

    Attributes:
        path: the file.
        offset: where in it the damage begins, in bytes.
    """

    def __init__(self, path: Path, offset: int, what: str) -> None:
        super().__init__(
            f"{path} is damaged at byte {offset}: {what}; "
            "bring the file back from a copy, or go on from a checkpoint that needs none of it"
        )
        self.path = path
        self.offset = offset


class CheckpointDamaged(StorageError):  # noqa: N818  it says what is the case
    """A checkpoint is not what its manifest says."""


class DataDirError(StorageError):
    """A data directory cannot be used: another server holds it, or it cannot be read."""
