"""The flat range on the wire: chunks, their bytes, their checks.

A protobuf `bytes` field costs a copy at each of parse, access and serialize. The streaming messages therefore share one
field number for their chunk, and this module writes and reads exactly that form by hand: wire-compatible with the
.proto files, without the copies. Anything else, and any chunk that another encoder lays out differently, goes through
protobuf.

`FlatEncoder` turns arrays into encoded chunk messages, `FlatDecoder` chunks into float32 elements. Both keep the
invariant that chunks are in order and touch; the decoder refuses whatever breaks it.
"""

import bisect
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import google_crc32c
import numpy as np
from google.protobuf.message import DecodeError, Message

from kedge.wire.errors import KedgeError
from kedge.wire.manifest import DTYPES

CHUNK_BYTES = 1 << 20
"""The data of a chunk, at most. Measured on loopback, 1 MiB moves the most bytes a second."""

MAX_MESSAGE_BYTES = 4 << 20
"""No message of the protocol is larger."""

_CHUNK_FIELD = 0x12  # field 2, length-delimited: `chunk` in each streaming message's oneof
_OFFSET_FIELD = 0x08  # field 1, varint: Chunk.offset
_DATA_FIELD = 0x12  # field 2, length-delimited: Chunk.data
_MAX_VARINT_SHIFT = 63


class Chunk(NamedTuple):
    """A piece of the flat range: the byte offset and a view of the data, which lives as long as the message does."""

    offset: int
    data: memoryview


class Malformed(NamedTuple):
    """What a deserializer answers for bytes that are no message, so that the servicer can say so to the peer."""

    detail: str


class _Streaming(Protocol):
    def WhichOneof(self, oneof_group: str, /) -> str | None: ...  # noqa: N802  protobuf's name


MessageT = TypeVar("MessageT", bound=Message)


def chunk_prefix(offset: int, size_bytes: int) -> bytes:
    """What stands before the data in a serialized streaming message that holds one chunk."""
    inner = bytes((_OFFSET_FIELD,)) + _varint(offset) + bytes((_DATA_FIELD,)) + _varint(size_bytes)
    return bytes((_CHUNK_FIELD,)) + _varint(len(inner) + size_bytes) + inner


def decode_chunk(raw: bytes) -> Chunk | None:
    """The chunk in a serialized streaming message; None if it is another message or laid out another way."""
    try:
        if raw[0] != _CHUNK_FIELD:
            return None
        length, at = _read_varint(raw, 1)
        if at + length != len(raw):
            return None
        offset = 0
        if raw[at] == _OFFSET_FIELD:
            offset, at = _read_varint(raw, at + 1)
        if raw[at] != _DATA_FIELD:
            return None
        length, at = _read_varint(raw, at + 1)
    except IndexError:
        return None
    return Chunk(offset, memoryview(raw)[at:]) if at + length == len(raw) else None


def serialize(message: bytes | Message) -> bytes:
    """The serializer of every method: chunks come encoded already."""
    return message if isinstance(message, bytes) else message.SerializeToString()


def stream_parser(message_type: Callable[[], MessageT]) -> Callable[[bytes], Chunk | MessageT | Malformed]:
    """The deserializer of a streaming message that may be a chunk. It never raises."""

    def parse(raw: bytes) -> Chunk | MessageT | Malformed:
        chunk = decode_chunk(raw)
        if chunk is not None:
            return chunk
        message = parse_message(message_type, raw)
        if isinstance(message, Malformed):
            return message
        fields: Any = message
        return Chunk(fields.chunk.offset, memoryview(fields.chunk.data)) if _holds_chunk(fields) else message

    return parse


def parse_message(message_type: Callable[[], MessageT], raw: bytes) -> MessageT | Malformed:
    """Parses a message; bytes that are none become a value instead of an exception that gRPC would call INTERNAL."""
    message = message_type()
    try:
        message.ParseFromString(raw)
    except DecodeError as error:
        return Malformed(str(error))
    return message


def _holds_chunk(message: _Streaming) -> bool:
    return message.WhichOneof("payload") == "chunk"


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(raw: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = raw[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > _MAX_VARINT_SHIFT:
            raise IndexError("a varint of more than 10 bytes")


class FlatEncoder:
    """Encodes a sequence of arrays, one after the other, as chunk messages of one dtype.

    Iterate over it once; then `crc32c` holds the trailer's value. Each message is made with one conversion and one copy
    of its elements, when it is asked for. `message` makes any of them again, the same bytes.

    Args:
        arrays: C-contiguous arrays of any of `DTYPES`, in manifest order. Their shapes do not matter.
        dtype: the wire dtype, a key of `DTYPES`.
        chunk_bytes: the data of a chunk.
        first_chunk_bytes: where more than one chunk is needed, the first one is cut in two, here. 0: it is not.
    """

    def __init__(
        self,
        arrays: Sequence[np.ndarray],
        dtype: str,
        *,
        chunk_bytes: int = CHUNK_BYTES,
        first_chunk_bytes: int = 0,
    ) -> None:
        self._arrays = [array.reshape(-1) for array in arrays if array.size]
        self._begins = [0, *itertools.accumulate(array.size for array in self._arrays)]
        self._dtype = DTYPES[dtype]
        self.size_bytes = self._begins[-1] * self._dtype.itemsize
        self._cuts = _cuts(self.size_bytes, chunk_bytes - chunk_bytes % self._dtype.itemsize, first_chunk_bytes)
        self.crc32c = 0

    @property
    def message_count(self) -> int:
        """How many messages there are."""
        return len(self._cuts) - 1

    def __iter__(self) -> Iterator[bytes]:
        """Yields serialized chunk messages in order."""
        for number in range(self.message_count):
            message = self.message(number)
            size_bytes = self._cuts[number + 1] - self._cuts[number]
            data = np.frombuffer(message, np.uint8, offset=len(message) - size_bytes)
            self.crc32c = google_crc32c.extend(self.crc32c, data)
            yield message

    def message(self, number: int) -> bytes:
        """The serialized chunk message of this number, from 0; `crc32c` is left as it is."""
        begin, end = self._cuts[number : number + 2]
        parts = [self._convert(piece).data for piece in self._pieces(begin, end)]
        return b"".join((chunk_prefix(begin, end - begin), *parts))

    def _convert(self, piece: np.ndarray) -> np.ndarray:
        # The unsigned view exists because the buffer protocol has no code for bfloat16.
        with np.errstate(over="ignore"):  # what float16 cannot hold becomes an infinity, which the receiver reports
            return piece.astype(self._dtype, copy=False).view(f"u{self._dtype.itemsize}")

    def _pieces(self, begin_byte: int, end_byte: int) -> Iterator[np.ndarray]:
        """The parts of the arrays that make up these bytes."""
        at, end = begin_byte // self._dtype.itemsize, end_byte // self._dtype.itemsize
        index = bisect.bisect_right(self._begins, at) - 1
        while at < end:
            begins, ends = self._begins[index : index + 2]
            piece = self._arrays[index][at - begins : min(end, ends) - begins]
            yield piece
            at += piece.size
            index += 1


def _cuts(size_bytes: int, chunk_bytes: int, first_chunk_bytes: int) -> list[int]:
    """Where the chunks begin, and where the last one ends."""
    cuts = [*range(0, size_bytes, chunk_bytes), size_bytes]
    if first_chunk_bytes and len(cuts) > 2:
        cuts.insert(1, first_chunk_bytes)
    return cuts


class ChunkSequence:
    """What holds for the chunks of every stream: they are in order and touch, and the trailer's sum is theirs.

    Args:
        size_bytes: of all of them together.
    """

    def __init__(self, size_bytes: int) -> None:
        self._position = 0
        self._crc32c = 0
        self.size_bytes = size_bytes

    def finish(self, crc32c: int) -> None:
        """Takes the trailer.

        Raises:
            KedgeError: SIZE_MISMATCH or CHECKSUM_MISMATCH.
        """
        if self._position != self.size_bytes:
            raise KedgeError(
                "SIZE_MISMATCH",
                f"the stream ended after {self._position} of {self.size_bytes} bytes: send every chunk",
                expected=self.size_bytes,
                got=self._position,
            )
        if self._crc32c != crc32c:
            raise KedgeError(
                "CHECKSUM_MISMATCH",
                f"the chunks have CRC-32C {self._crc32c:08x}, the trailer says {crc32c:08x}: send them again",
                expected=f"{crc32c:08x}",
                got=f"{self._crc32c:08x}",
            )

    def _note(self, chunk: Chunk) -> None:
        """Takes a chunk that was checked into account."""
        self._crc32c = google_crc32c.extend(self._crc32c, np.frombuffer(chunk.data, np.uint8))
        self._position += len(chunk.data)

    def _check_place(self, chunk: Chunk) -> None:
        """Refuses what reaches beyond the end, or does not begin where the last chunk ended."""
        offset, length = chunk.offset, len(chunk.data)
        if offset + length > self.size_bytes:
            raise KedgeError(
                "CHUNK_OUT_OF_RANGE",
                f"a chunk of {length} bytes at offset {offset} reaches beyond the {self.size_bytes} bytes declared",
                offset=offset,
                size_bytes=self.size_bytes,
            )
        if offset != self._position:
            reason = "CHUNK_OVERLAP" if offset < self._position else "CHUNK_GAP"
            raise KedgeError(
                reason,
                f"a chunk begins at offset {offset}, expected {self._position}: send them in order, no gap, no overlap",
                offset=offset,
                expected=self._position,
            )


class FlatDecoder(ChunkSequence):
    """Puts the chunks of one stream into a float32 array, and checks every one.

    Args:
        out: float32, one-dimensional, of the manifest's element count.
        dtype: the wire dtype, a key of `DTYPES`.
        size_bytes: what the header declared.

    Raises:
        KedgeError: SIZE_MISMATCH.
    """

    def __init__(self, out: np.ndarray, *, dtype: str, size_bytes: int) -> None:
        self._out = out
        self._dtype = DTYPES[dtype]
        super().__init__(out.size * self._dtype.itemsize)
        if size_bytes != self.size_bytes:
            raise KedgeError(
                "SIZE_MISMATCH",
                f"the header declares {size_bytes} bytes; the manifest has {out.size} elements, "
                f"which are {self.size_bytes} bytes of {dtype}",
                expected=self.size_bytes,
                got=size_bytes,
            )

    def add(self, chunk: Chunk) -> np.ndarray:
        """Takes the next chunk.

        Returns:
            The part of `out` that it filled.

        Raises:
            KedgeError: CHUNK_OUT_OF_RANGE, CHUNK_OVERLAP, CHUNK_GAP or CHUNK_MISALIGNED.
        """
        self._check(chunk)
        itemsize = self._dtype.itemsize
        begin = chunk.offset // itemsize
        target = self._out[begin : begin + len(chunk.data) // itemsize]
        target[:] = np.frombuffer(chunk.data, self._dtype)
        self._note(chunk)
        return target

    def _check(self, chunk: Chunk) -> None:
        offset, length = chunk.offset, len(chunk.data)
        if not length or offset % self._dtype.itemsize or length % self._dtype.itemsize:
            raise KedgeError(
                "CHUNK_MISALIGNED",
                f"a chunk of {length} bytes at offset {offset}: both must be multiples of {self._dtype.itemsize}, "
                "and the length more than 0",
                offset=offset,
            )
        self._check_place(chunk)
