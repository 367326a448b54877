"""Failpoints: places by name where a test has the process killed.

The environment variable KEDGE_FAILPOINT names one, as "journal.sync.before", or "journal.sync.before:3" for the third
time that it is reached. The process then ends by SIGKILL to itself. Nothing happens where the variable is not set.
"""

import os
import signal
from collections.abc import Callable

VARIABLE = "KEDGE_FAILPOINT"

FAILPOINTS: tuple[str, ...] = (
    "journal.write.before",
    "journal.write.middle",
    "journal.write.after",
    "journal.sync.before",
    "journal.sync.after",
    "journal.rotate.before",
    "journal.rotate.created",
    "journal.rotate.renamed",
    "journal.drop.before",
    "journal.drop.after",
    "engine.apply.before",
    "engine.apply.after",
    "engine.acknowledge.before",
    "engine.acknowledge.after",
    "checkpoint.write.before",
    "checkpoint.write.after",
    "checkpoint.sync.before",
    "checkpoint.manifest.before",
    "checkpoint.manifest.written",
    "checkpoint.manifest.renamed",
    "checkpoint.retain.before",
    "generation.write",
    "run.create.before",
    "run.create.after",
)
"""All of them."""


class Failpoint:
    """Ends the process when the failpoint it is set to has been reached often enough.

    Args:
        setting: "", "NAME" or "NAME:N".
        end: ends the process.

    Raises:
        ValueError: for a name that is none, or an N below 1.
    """

    def __init__(self, setting: str, end: Callable[[], None]) -> None:
        self._name, self._left = _parsed(setting)
        self._end = end

    def reached(self, name: str) -> None:
        """The process is at this failpoint now."""
        if name != self._name:
            return
        self._left -= 1
        if self._left == 0:
            self._end()


def failpoint(name: str) -> None:
    """Says that the process is at this failpoint, one of `FAILPOINTS`. Any thread may."""
    if _armed is not None:
        _armed.reached(name)


def _parsed(setting: str) -> tuple[str, int]:
    name, _, count = setting.partition(":")
    if name not in FAILPOINTS:
        raise ValueError(f"{VARIABLE} is {setting!r}: there is no failpoint {name!r}; they are {', '.join(FAILPOINTS)}")
    if count and not (count.isascii() and count.isdecimal() and int(count) >= 1):
        raise ValueError(f"{VARIABLE} is {setting!r}: after the colon stands the time that counts, 1 or more")
    return name, int(count or 1)


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


_setting = os.environ.get(VARIABLE, "")
_armed = Failpoint(_setting, _kill) if _setting else None
