"""Who reads weights just now, and how much memory that keeps alive.

Weights that newer ones have superseded live on as long as someone reads them. Readers decide how long that is, so it
is bounded in bytes: over the bound the reader goes that made no progress for longest.
"""

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator

from kedge_server.engine.snapshots import Encoding


class Reader:
    """One who reads a form of a snapshot. Made by `Readers.reading`."""

    def __init__(self, encoding: Encoding, is_served: Callable[[], bool], drop: Callable[[], None]) -> None:
        self.encoding = encoding
        self.is_served = is_served
        self.drop = drop


class Readers:
    """The readers of all runs. Belongs to one loop.

    Args:
        limit_bytes: superseded weights that are still read, with their messages. Checked whenever a reader comes.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._by_progress: OrderedDict[Reader, None] = OrderedDict()  # who made none for longest stands first

    @contextlib.contextmanager
    def reading(
        self, encoding: Encoding, *, is_served: Callable[[], bool], drop: Callable[[], None]
    ) -> Iterator[Callable[[], None]]:
        """Counts a reader for as long as it is entered.

        Args:
            encoding: what it reads.
            is_served: whether those who come now get the same weights. Who reads them is never dropped.
            drop: called, once at most, when the reader is to end.

        Yields:
            What to call when the reader has made progress.
        """
        reader = Reader(encoding, is_served, drop)
        try:
            self._by_progress[reader] = None
            self._make_room()
            yield lambda: self._moved(reader)
        finally:
            self._by_progress.pop(reader, None)

    def _moved(self, reader: Reader) -> None:
        if reader in self._by_progress:
            self._by_progress.move_to_end(reader)

    def _make_room(self) -> None:
        superseded = [reader for reader in self._by_progress if not reader.is_served()]
        while superseded and sum(e.held_bytes for e in {reader.encoding for reader in superseded}) > self._limit_bytes:
            slowest = superseded.pop(0)
            del self._by_progress[slowest]
            slowest.drop()
