"""Who calls, and what they may do."""

from enum import IntEnum
from fnmatch import fnmatchcase
from typing import NamedTuple, Self


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
        raise ValueError(f"role {name!r}: write admin, worker or reader")

    @property
    def text(self) -> str:
        """Its name, in lower case."""
        return self.name.lower()


class Caller(NamedTuple):
    """Somebody whom the server knows."""

    identity: str
    """A token's id, or a certificate's; "" where nobody is asked."""
    role: Role
    runs: tuple[str, ...] = ("*",)
    """Patterns of the ids of the runs that it may touch; `*` in them stands for anything."""

    def may_touch(self, run_id: str) -> bool:
        """Whether it may do with this run what its role allows."""
        return any(fnmatchcase(run_id, pattern) for pattern in self.runs)


EVERYBODY = Caller("", Role.ADMIN)
"""Who calls a server that asks nobody who they are."""


def parse_runs(text: str) -> tuple[str, ...]:
    """The patterns in a list that is joined by commas.

    Raises:
        ValueError: for one that can be no pattern of a run's id.
    """
    patterns = tuple(text.split(","))
    for pattern in patterns:
        if not pattern or any(not (c.isascii() and (c.isalnum() or c in "-_.*")) for c in pattern):
            raise ValueError(f"run {pattern!r}: write ids of runs, as digits, or patterns, as exp-*, joined by commas")
    return patterns
