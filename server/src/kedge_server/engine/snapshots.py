"""Snapshots: the weights of one step, immutable, shared by all who read them."""

from collections.abc import Iterator
from typing import Literal, NamedTuple
from weakref import WeakValueDictionary

import numpy as np

from kedge.wire.codec import CHUNK_BYTES, FlatEncoder, chunk_prefix, decode_chunk

Weights = Literal["fast", "slow", "fast_and_slow"]

_FIRST_CHUNK_BYTES = 64 << 10


class Encoding:
    """One form of a snapshot on the wire: chunk messages made when the first reader needs them, kept for the others.

    It lives as long as someone reads it.
    """

    def __init__(self, arrays: tuple[np.ndarray, ...], dtype: str) -> None:
        encoder = FlatEncoder(arrays, dtype)
        self._encoder: FlatEncoder | None = encoder
        self._source = _with_small_first_chunk(encoder)
        self._messages: list[bytes] = []
        self._array_bytes = sum(array.nbytes for array in arrays)
        self._message_bytes = 0
        self._crc32c = 0
        self.size_bytes = encoder.size_bytes

    def messages(self) -> Iterator[bytes]:
        """All chunk messages in order. Making one takes well under a millisecond, so it is done on the loop."""
        at = 0
        while at < len(self._messages) or self._make_one():
            yield self._messages[at]
            at += 1

    @property
    def crc32c(self) -> int:
        """Of all chunk data; known when a reader has seen the last message."""
        assert self._encoder is None, "the checksum is asked for before the last chunk"
        return self._crc32c

    @property
    def held_bytes(self) -> int:
        """The memory that it keeps alive: its messages, and the weights as long as not all messages are made."""
        return self._message_bytes + (self._array_bytes if self._encoder is not None else 0)

    def _make_one(self) -> bool:
        message = next(self._source, None)
        if message is not None:
            self._messages.append(message)
            self._message_bytes += len(message)
        elif self._encoder is not None:
            self._crc32c, self._encoder = self._encoder.crc32c, None
        return message is not None


def _with_small_first_chunk(encoder: FlatEncoder) -> Iterator[bytes]:
    """Its messages, the first cut in two.

    gRPC copies a message and keeps the copy until the peer has made room for all of it. The window that a peer opens
    with is 64 KiB unless it says otherwise: whoever never reads stops at the small chunk, and no large one is copied.
    What fits into one chunk is left whole: another message would cost a small model a fifth of its step.
    """
    messages = iter(encoder)
    if encoder.size_bytes <= CHUNK_BYTES:
        yield from messages
        return
    first = next(messages, None)
    if first is None:
        return
    chunk = decode_chunk(first)
    assert chunk is not None, "the encoder lays out its chunks as the decoder expects"
    for part in (chunk.data[:_FIRST_CHUNK_BYTES], chunk.data[_FIRST_CHUNK_BYTES:]):
        if part:
            yield chunk_prefix(chunk.offset, len(part)) + part
        chunk = chunk._replace(offset=chunk.offset + len(part))
    yield from messages


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
