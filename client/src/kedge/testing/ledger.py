"""What became of the contributions of one lease: what makes a repeated push harmless."""

from dataclasses import dataclass, field

import numpy as np

from kedge.transport import Push, PushResult
from kedge.wire.errors import KedgeError

LEDGER_WINDOW = 64
"""The results of so many contributions are remembered for each lease."""


@dataclass
class Entry:
    """A contribution in the ledger. Without a result it waits in the open round."""

    push: Push
    gradient: np.ndarray
    """float64 of shape [n], as it came over the wire."""
    staleness: int
    result: PushResult | None = None


@dataclass
class Ledger:
    """The contributions of one lease, by sequence."""

    last_sequence: int = 0
    entries: dict[int, Entry] = field(default_factory=dict)

    def find(self, sequence: int) -> Entry | None:
        """The entry of a sequence; None for the next one.

        Raises:
            KedgeError: SEQUENCE_FORGOTTEN or SEQUENCE_GAP.
        """
        if sequence in self.entries:
            return self.entries[sequence]
        if 1 <= sequence <= self.last_sequence:
            oldest = min(self.entries)
            raise KedgeError(
                "SEQUENCE_FORGOTTEN",
                f"sequence {sequence} is no longer recorded, the oldest that is is {oldest}",
                got=sequence,
                oldest=oldest,
            )
        if sequence != self.last_sequence + 1:
            raise KedgeError(
                "SEQUENCE_GAP",
                f"sequence {sequence} came where {self.last_sequence + 1} was due",
                expected=self.last_sequence + 1,
                got=sequence,
            )
        return None

    def record(self, entry: Entry) -> None:
        """Takes the entry of the next sequence."""
        self.last_sequence = entry.push.sequence
        self.entries[self.last_sequence] = entry
        self.entries.pop(self.last_sequence - LEDGER_WINDOW, None)
