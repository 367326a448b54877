"""Resource names: the one module that builds and parses them.

A run is `runs/{run}`, a worker `runs/{run}/workers/{worker}`, a checkpoint `runs/{run}/checkpoints/{checkpoint}`. An id
is 1 to 63 letters, digits, `.`, `_` or `-`, the first a letter or digit; a checkpoint's has neither `.` nor `_`.
"""

import re
from typing import NamedTuple

from kedge.wire.errors import KedgeError

_ID = r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}"
_RUN_ID = re.compile(_ID)
_RUN_NAME = re.compile(rf"runs/({_ID})")
_WORKER_NAME = re.compile(rf"runs/({_ID})/workers/({_ID})")
_CHECKPOINT_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]{0,62}")
_CHECKPOINT_NAME = re.compile(rf"runs/({_ID})/checkpoints/({_CHECKPOINT_ID.pattern})")


class WorkerName(NamedTuple):
    """The two ids in a worker's name."""

    run_id: str
    worker_id: str

    @property
    def run(self) -> str:
        """The name of its run."""
        return f"runs/{self.run_id}"

    def __str__(self) -> str:
        """The resource name."""
        return f"runs/{self.run_id}/workers/{self.worker_id}"


class CheckpointName(NamedTuple):
    """The two ids in a checkpoint's name."""

    run_id: str
    checkpoint_id: str

    @property
    def run(self) -> str:
        """The name of its run."""
        return f"runs/{self.run_id}"

    def __str__(self) -> str:
        """The resource name."""
        return f"runs/{self.run_id}/checkpoints/{self.checkpoint_id}"


def check_id(value: str, *, what: str) -> str:
    """Returns `value` if it is an id.

    Raises:
        KedgeError: INVALID_NAME.
    """
    if not _RUN_ID.fullmatch(value):
        raise KedgeError(
            "INVALID_NAME",
            f"{value[:80]!r} cannot name a {what}: use 1 to 63 letters, digits, '.', '_' or '-', "
            "and begin with a letter or digit",
            name=value[:80],
        )
    return value


def run_name(run_id: str) -> str:
    """The name of a run; also takes the name itself."""
    return f"runs/{check_id(run_id.removeprefix('runs/'), what='run')}"


def parse_run(name: str) -> str:
    """The id in a run's name.

    Raises:
        KedgeError: INVALID_NAME.
    """
    match = _RUN_NAME.fullmatch(name)
    if match is None:
        raise KedgeError("INVALID_NAME", f"{name[:80]!r} is not the name of a run: write runs/{{run}}", name=name[:80])
    return match[1]


def parse_worker(name: str) -> WorkerName:
    """The ids in a worker's name.

    Raises:
        KedgeError: INVALID_NAME.
    """
    match = _WORKER_NAME.fullmatch(name)
    if match is None:
        raise KedgeError(
            "INVALID_NAME",
            f"{name[:80]!r} is not the name of a worker: write runs/{{run}}/workers/{{worker}}, as JoinRun answered it",
            name=name[:80],
        )
    return WorkerName(match[1], match[2])


def check_checkpoint_id(value: str) -> str:
    """Returns `value` if it is the id of a checkpoint.

    Raises:
        KedgeError: INVALID_NAME.
    """
    if not _CHECKPOINT_ID.fullmatch(value):
        raise KedgeError(
            "INVALID_NAME",
            f"{value[:80]!r} cannot name a checkpoint: use 1 to 63 letters, digits or '-', and begin with a letter or "
            "digit; the list of the run's checkpoints has their names",
            name=value[:80],
        )
    return value


def parse_checkpoint(name: str) -> CheckpointName:
    """The ids in a checkpoint's name.

    Raises:
        KedgeError: INVALID_NAME.
    """
    match = _CHECKPOINT_NAME.fullmatch(name)
    if match is None:
        raise KedgeError(
            "INVALID_NAME",
            f"{name[:80]!r} is not the name of a checkpoint: write runs/{{run}}/checkpoints/{{checkpoint}}, as "
            "ListCheckpoints answered it",
            name=name[:80],
        )
    return CheckpointName(match[1], match[2])
