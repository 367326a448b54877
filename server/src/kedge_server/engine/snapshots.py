"""Snapshots: the weights of one step, immutable, shared by all who read them."""

from collections import deque
from collections.abc import Iterator
from typing import Literal, NamedTuple
from weakref import WeakValueDictionary

import numpy as np

from kedge.wire.codec import FlatEncoder

Weights = Literal["fast", "slow", "fast_and_slow"]

_FIRST_CHUNK_BYTES = 64 << 10
"""gRPC copies a message and keeps the copy until the peer has made room for all of it. The window that a peer opens
with is 64 KiB unless it says otherwise: whoever never reads stops at the small chunk, and no large one is copied. What
fits into one chunk is left whole: another message would cost a small model a fifth of its step."""

_KEPT_MESSAGES = 16
"""For readers that go along with each other. With all messages kept, each pull would touch fresh memory."""


class Encoding:
    """One form of a snapshot on the wire: chunk messages, made when the first reader needs them.

    The last ones are kept for the readers that are a little behind. One that is far behind has its own made anew: the
    same bytes. The form lives as long as someone reads it, and so do the weights.
    """

    def __init__(self, arrays: tuple[np.ndarray, ...], dtype: str) -> None:
        self._encoder = FlatEncoder(arrays, dtype, first_chunk_bytes=_FIRST_CHUNK_BYTES)
        self._source = iter(self._encoder)
        self._made_count = 0
        self._kept: deque[bytes] = deque(maxlen=_KEPT_MESSAGES)
        self._array_bytes = sum(array.nbytes for array in arrays)
        self.size_bytes = self._encoder.size_bytes

    def messages(self) -> Iterator[bytes]:
        """All chunk messages in order. Making one takes well under a millisecond, so it is done on the loop."""
        for number in range(self._encoder.message_count):
            yield self._message(number)

    @property
    def crc32c(self) -> int:
        """Of all chunk data; known when a reader has seen the last message."""
        assert self._made_count == self._encoder.message_count, "the checksum is asked for before the last chunk"
        return self._encoder.crc32c

    @property
    def held_bytes(self) -> int:
        """The memory that it keeps alive: the weights, and the messages that it keeps."""
        return self._array_bytes + sum(map(len, self._kept))

    def _message(self, number: int) -> bytes:
        if number == self._made_count:
            self._kept.append(next(self._source))
            self._made_count += 1
        behind = self._made_count - number
        return self._kept[-behind] if behind <= len(self._kept) else self._encoder.message(number)


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
