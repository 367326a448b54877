"""The ledger: which sequences of a worker's epoch were taken, and what became of each.

It is what makes a repeated push harmless. Pending and decided entries are alike here: the type parameter is whatever
the caller keeps for one. Invariant: sequences are recorded 1, 2, 3, ... without a gap, and the last `window` are kept.
"""

from typing import Generic, TypeVar

from kedge.wire.errors import KedgeError

EntryT = TypeVar("EntryT")

WINDOW = 64
"""Entries kept for an epoch: far more than a worker has in flight."""


class Ledger(Generic[EntryT]):
    """The sequences of one epoch of one worker."""

    def __init__(self, window: int = WINDOW) -> None:
        self._entries: dict[int, EntryT] = {}
        self._window = window
        self.last_sequence = 0

    def find(self, sequence: int) -> EntryT | None:
        """The entry of a sequence, or None if it is the next new one.

        Raises:
            KedgeError: SEQUENCE_GAP or SEQUENCE_FORGOTTEN.
        """
        if sequence in self._entries:
            return self._entries[sequence]
        if sequence == self.last_sequence + 1:
            return None
        if 0 < sequence <= self.last_sequence:
            oldest = next(iter(self._entries))
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

    def record(self, sequence: int, entry: EntryT) -> None:
        """Records the next sequence; the oldest entry beyond the window is forgotten."""
        assert sequence == self.last_sequence + 1, "find() lets no other through"
        self.last_sequence = sequence
        self._entries[sequence] = entry
        self._entries.pop(sequence - self._window, None)
