"""The ledger: which sequences of a worker's epoch were taken, and what became of each.

It is what makes a repeated push harmless. Pending and decided entries are alike here: the type parameter is whatever
the caller keeps for one. Sequences are recorded 1, 2, 3, ..., and the last `window` are kept. A ledger that was read
back may have holes: sequences that were taken and not yet answered when the server died, while later ones were. Nothing
came of them, so that they may still come.
"""

from collections.abc import Callable
from typing import Generic, TypeVar

from kedge.wire.errors import KedgeError

EntryT = TypeVar("EntryT")

WINDOW = 64
"""Entries kept for an epoch: far more than a worker has in flight."""


class Ledger(Generic[EntryT]):
    """The sequences of one epoch of one worker."""

    def __init__(self, window: int = WINDOW) -> None:
        self._entries: dict[int, EntryT] = {}
        self._holes: set[int] = set()
        self._window = window
        self.last_sequence = 0

    def find(self, sequence: int) -> EntryT | None:
        """The entry of a sequence, or None if it is the next new one.

        Raises:
            KedgeError: SEQUENCE_GAP or SEQUENCE_FORGOTTEN.
        """
        if sequence in self._entries:
            return self._entries[sequence]
        if sequence == self.last_sequence + 1 or sequence in self._holes:
            return None
        if 0 < sequence <= self.last_sequence:
            oldest = min(self._entries, default=self.last_sequence + 1)
            raise KedgeError(
                "SEQUENCE_FORGOTTEN",
                f"the result of sequence {sequence} is forgotten, {oldest} is the oldest kept; it was not reapplied",
                got=sequence,
                oldest=oldest,
            )
        raise KedgeError(
            "SEQUENCE_GAP",
            f"sequence {sequence} came, {self.last_sequence + 1} is next: number them 1, 2, 3, ... in an epoch",
            expected=self.last_sequence + 1,
            got=sequence,
        )

    def kept(self, sequence: int) -> EntryT | None:
        """The entry of a sequence, if it is kept."""
        return self._entries.get(sequence)

    def record(self, sequence: int, entry: EntryT) -> None:
        """Records the next sequence, or one of a hole; the oldest entry beyond the window is forgotten."""
        assert self.find(sequence) is None, "find() lets no other through"
        self._holes.discard(sequence)
        self._keep(sequence, entry)

    def restore(self, sequence: int, entry: EntryT) -> None:
        """Records what was recorded before the server died, in the order in which it became durable.

        What it passes over is a hole. An entry that is there already is replaced.
        """
        self._holes.update(range(max(self.last_sequence + 1, sequence - self._window), sequence))
        self._holes.discard(sequence)
        self._keep(sequence, entry)

    def _keep(self, sequence: int, entry: EntryT) -> None:
        before, self.last_sequence = self.last_sequence, max(self.last_sequence, sequence)
        forgotten = self.last_sequence - self._window
        self._entries[sequence] = entry
        for old in {sequence, *range(before - self._window + 1, forgotten + 1)}:
            if old <= forgotten:
                self._entries.pop(old, None)
        if self._holes:
            self._holes = {hole for hole in self._holes if hole > forgotten}

    def resume(self, last_sequence: int, holes: tuple[int, ...]) -> None:
        """Takes up the numbers that belong to the entries."""
        self.last_sequence, self._holes = last_sequence, set(holes)

    def replace_entries(self, make: Callable[[EntryT], EntryT]) -> None:
        """Puts what `make` makes of each entry in its place."""
        self._entries = {sequence: make(entry) for sequence, entry in self._entries.items()}

    def entries(self) -> tuple[tuple[int, EntryT], ...]:
        """What is kept, by sequence."""
        return tuple(sorted(self._entries.items()))

    @property
    def holes(self) -> tuple[int, ...]:
        """The sequences up to the last one of which nothing came."""
        return tuple(sorted(self._holes))
