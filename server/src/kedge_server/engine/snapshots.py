"""Snapshots: the weights of one step, immutable, shared by all who read them."""

from collections.abc import AsyncIterator
from typing import Literal, NamedTuple
from weakref import WeakValueDictionary

import numpy as np

from kedge.wire.codec import FlatEncoder

Weights = Literal["fast", "slow", "fast_and_slow"]


class Encoding:
    """One form of a snapshot on the wire: chunk messages made when the first reader needs them, kept for the others.

    It lives as long as someone reads it.
    """

    def __init__(self, arrays: tuple[np.ndarray, ...], dtype: str) -> None:
        self._encoder = FlatEncoder(arrays, dtype)
        self._source = iter(self._encoder)
        self._messages: list[bytes] = []
        self._is_whole = False
        self.size_bytes = self._encoder.size_bytes

    async def messages(self) -> AsyncIterator[bytes]:
        """All chunk messages in order. Making one takes well under a millisecond, so it is done on the loop."""
        at = 0
        while at < len(self._messages) or self._make_one():
            yield self._messages[at]
            at += 1

    @property
    def crc32c(self) -> int:
        """Of all chunk data; known when a reader has seen the last message."""
        assert self._is_whole, "the checksum is asked for before the last chunk"
        return self._encoder.crc32c

    def _make_one(self) -> bool:
        message = next(self._source, None)
        if message is None:
            self._is_whole = True
            return False
        self._messages.append(message)
        return True


class Snapshot:
    """The weights of one step, on the host."""

    def __init__(
        self,
        step: int,
        lookahead_sync_count: int,
        fast: tuple[np.ndarray, ...],
        slow: tuple[np.ndarray, ...] | None,
    ) -> None:
        self.step = step
        self.lookahead_sync_count = lookahead_sync_count
        self.fast = fast
        self.slow = slow
        self._encodings: WeakValueDictionary[_Form, Encoding] = WeakValueDictionary()

    def encoding(self, weights: Weights, dtype: str) -> Encoding:
        """The wire form, shared with whoever reads it at the same time."""
        form = _Form(weights, dtype)
        encoding = self._encodings.get(form)
        if encoding is None:
            encoding = self._encodings[form] = Encoding(self._arrays(weights), dtype)
        return encoding

    def _arrays(self, weights: Weights) -> tuple[np.ndarray, ...]:
        if weights == "fast":
            return self.fast
        assert self.slow is not None, "the engine refuses slow weights where there are none"
        return self.slow if weights == "slow" else self.fast + self.slow


class _Form(NamedTuple):
    weights: Weights
    dtype: str
