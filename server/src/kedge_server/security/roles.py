"""Who calls, and what they may do."""

import re
from enum import IntEnum
from fnmatch import fnmatchcase
from typing import Final, NamedTuple, Self

ALL_RUNS: Final = ("*",)
"""The patterns of whoever may touch every run."""

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_PATTERN = re.compile(r"[A-Za-z0-9._*-]{1,63}")


class Role(IntEnum):
    """What somebody may do. Each may do what those before it may."""

    READER = 1
    """Reads weights, status, events and lists."""
    WORKER = 2
    """Joins runs, and contributes."""
    ADMIN = 3
    """Creates, changes and deletes runs, and sends workers away."""

    @classmethod
    def parse(cls, name: str) -> Self:
        """The role of this name.

        Raises:
            ValueError: there is none.
        """
        for role in cls:
            if role.text == name:
                return role
        raise ValueError("a role is admin, worker or reader")

    @property
    def text(self) -> str:
        """Its name, in lower case."""
        return self.name.lower()


class Caller(NamedTuple):
    """Somebody whom the server knows."""

    identity: str
    """A token's id, or a certificate's; "" where nobody is asked."""
    role: Role
    runs: tuple[str, ...] = ALL_RUNS
    """Patterns of the ids of the runs that it may touch; `*` in them stands for anything."""

    def may_touch(self, run_id: str) -> bool:
        """Whether it may do with this run what its role allows."""
        return any(fnmatchcase(run_id, pattern) for pattern in self.runs)


EVERYBODY = Caller("", Role.ADMIN)
"""Who calls a server that asks nobody who they are."""


def parse_caller(identity: str, role: str, runs: str | None = None) -> Caller:
    """Who it is that a line of a file, or a certificate, tells of.

    Args:
        identity: 1 to 63 letters, digits, dots, dashes or underscores.
        role: its name.
        runs: patterns, joined by commas; None: every run.

    Raises:
        ValueError: for what is none. The message does not repeat it, since it may be a secret that went astray.
    """
    return Caller(check_identity(identity), Role.parse(role), ALL_RUNS if runs is None else parse_runs(runs))


def check_identity(identity: str) -> str:
    """Returns `identity` if it is one.

    Raises:
        ValueError: it is none.
    """
    if not _ID.fullmatch(identity):
        raise ValueError(
            "an id has 1 to 63 letters, digits, dots, dashes or underscores, and begins with a letter or digit"
        )
    return identity


def parse_runs(text: str) -> tuple[str, ...]:
    """The patterns in a list that is joined by commas.

    Raises:
        ValueError: for one that can be no pattern of a run's id.
    """
    patterns = tuple(text.split(","))
    if not all(map(_PATTERN.fullmatch, patterns)):
        raise ValueError("runs are ids, as digits, or patterns of them, as exp-*, joined by commas")
    return patterns
