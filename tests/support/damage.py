"""Damage to the files of a data directory, and a look at them."""

import random
from pathlib import Path
from typing import NamedTuple

NOT_OF_RUNS = ("lock", "generation")


class Damage(NamedTuple):
    """What was done to a file."""

    path: Path
    offset: int
    """Of the byte that has another bit now, or the length that is left."""


def files_of(directory: Path) -> dict[str, bytes]:
    """Every file in it with its content, but those that each start of a server changes."""
    files = (path for path in sorted(directory.rglob("*")) if path.is_file() and path.name not in NOT_OF_RUNS)
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def flip(path: Path, offset: int, bit: int = 0) -> Damage:
    """Turns one bit over."""
    content = bytearray(path.read_bytes())
    content[offset] ^= 1 << bit
    path.write_bytes(content)
    return Damage(path, offset)


def truncate(path: Path, size: int) -> Damage:
    """Cuts a file."""
    with path.open("r+b") as file:
        file.truncate(size)
    return Damage(path, size)


def flip_somewhere(directory: Path, dice: random.Random) -> Damage:
    """Turns over a random bit of a random file."""
    path = some_file(directory, dice)
    return flip(path, dice.randrange(path.stat().st_size), dice.randrange(8))


def truncate_somewhere(directory: Path, dice: random.Random) -> Damage:
    """Cuts a random file, maybe to nothing."""
    path = some_file(directory, dice)
    return truncate(path, dice.randrange(path.stat().st_size))


def some_file(directory: Path, dice: random.Random) -> Path:
    """A file that is not empty: by chance alone, or as likely as it is large."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file() and path.stat().st_size)
    weights = None if dice.random() < 0.5 else [path.stat().st_size for path in paths]
    return dice.choices(paths, weights)[0]
