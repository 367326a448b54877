"""Compressed gradients on the wire: records of a few bytes for many elements, as proto/kedge/v1/tensor.proto has them.

How a gradient becomes records is `kedge.compression`'s matter; here is what records look like, how they are cut into
chunks, and how they are read. As with plain dtypes, chunks are in order and touch; here they hold whole records, too.
There is one way to write each value: the decoder refuses bytes that no encoder of the protocol makes.
"""

from collections.abc import Iterator, Sequence

import google_crc32c
import numpy as np

from kedge import optim
from kedge.wire.codec import CHUNK_BYTES, Chunk, ChunkSequence, FlatDecoder, FlatEncoder, chunk_prefix
from kedge.wire.errors import KedgeError
from kedge.wire.manifest import DTYPES

COMPRESSED = ("int8", "top_k", "sign")
"""The dtypes that only gradients can be sent as."""

RECORD_ELEMENTS = 1024
"""The elements of a record of int8 or sign; the last one has what is left."""

SCALE_BYTES = 4
TOP_K_RECORD = np.dtype([("index", "<u4"), ("value", "<f4")])

_MAX_TOP_K_ELEMENTS = 1 << 32
_CHUNK_BYTES = {"int8": CHUNK_BYTES, "sign": CHUNK_BYTES >> 3, "top_k": CHUNK_BYTES >> 3}
"""The data of a chunk, about: what becomes a few MiB of float32 when it is read."""
_PIECE_RECORDS = 64
PIECE_ELEMENTS = _PIECE_RECORDS * RECORD_ELEMENTS
"""So many elements at once stay in the cache from one operation on them to the next."""
_SIGNS = np.where(np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little"), -1, 1)
_SIGN_TABLE = _SIGNS.astype(np.float32)
"""The signs of 8 elements, for each byte."""


def record_bytes(dtype: str, element_count: int = RECORD_ELEMENTS) -> int:
    """The length of a record of so many elements."""
    if dtype == "top_k":
        return TOP_K_RECORD.itemsize
    return SCALE_BYTES + (element_count if dtype == "int8" else (element_count + 7) // 8)


def records_bytes(dtype: str, element_count: int) -> int:
    """The length of all records of a flat range; of "top_k" the greatest that it can be."""
    if dtype == "top_k":
        return element_count * TOP_K_RECORD.itemsize
    whole, rest = divmod(element_count, RECORD_ELEMENTS)
    return whole * record_bytes(dtype) + (record_bytes(dtype, rest) if rest else 0)


def check_size(dtype: str, size_bytes: int, element_count: int) -> None:
    """Checks what a header declares of a compressed gradient; of a plain one nothing.

    Raises:
        KedgeError: SIZE_MISMATCH; UNSUPPORTED_DTYPE for "top_k" where an index has too few bits for the run.
    """
    if dtype not in COMPRESSED:
        return
    if dtype == "top_k" and element_count > _MAX_TOP_K_ELEMENTS:
        message = f"DTYPE_TOP_K has indices of 32 bits, the run has {element_count} elements: send another dtype"
        raise KedgeError("UNSUPPORTED_DTYPE", message, tensor="", dtype=dtype)
    expected = records_bytes(dtype, element_count)
    is_top_k = dtype == "top_k"
    if size_bytes % TOP_K_RECORD.itemsize or size_bytes > expected if is_top_k else size_bytes != expected:
        are = f"at most {expected} bytes of {dtype}, 8 each" if is_top_k else f"{expected} bytes of {dtype}"
        raise KedgeError(
            "SIZE_MISMATCH",
            f"the header declares {size_bytes} bytes; the manifest has {element_count} elements, which are {are}",
            expected=expected,
            got=size_bytes,
        )


def check_safe(optimizer: optim.Optimizer, dtype: str) -> None:
    """Refuses gradients of one magnitude for an optimizer that divides by how much they vary.

    A constant gradient takes AdaBelief's steps to 185 times its rate in 5,000 steps, as its closed form says.

    Raises:
        KedgeError: COMPRESSION_UNSAFE.
    """
    if dtype != "sign":
        return
    rule = optimizer.spec().rule
    if _divides_by_variation(rule):
        name = f"Optax({rule.name!r})" if isinstance(rule, optim.Optax) else type(rule).__name__
        raise KedgeError(
            "COMPRESSION_UNSAFE",
            f"{name} divides by how much gradients vary, and those sent as {dtype!r} hardly do: create the run with "
            "kedge.optim.AdaBelief(max_direction=1.0), or send another wire dtype",
            optimizer=name,
            wire_dtype=dtype,
        )


def _divides_by_variation(rule: optim.Rule) -> bool:
    match rule:
        case optim.AdaBelief():
            return rule.max_direction is None
        case optim.RMSprop():
            return rule.centered
        case optim.Optax(name="adabelief"):
            return True
        case optim.Optax(name="rmsprop"):
            return bool(dict(rule.arguments).get("centered"))
    return False


class RecordEncoder:
    """Records that are made already, as chunk messages: `FlatEncoder`'s counterpart.

    Args:
        arrays: one, of uint8 and one-dimensional: all records.
        dtype: of `COMPRESSED`.
    """

    def __init__(self, arrays: Sequence[np.ndarray], dtype: str) -> None:
        (self._records,) = arrays
        length = record_bytes(dtype)
        self._chunk_bytes = _CHUNK_BYTES[dtype] // length * length
        self.size_bytes = self._records.nbytes
        self.crc32c = 0

    def __iter__(self) -> Iterator[bytes]:
        """Yields serialized chunk messages in order."""
        for offset in range(0, self.size_bytes, self._chunk_bytes):
            data = self._records[offset : offset + self._chunk_bytes]
            self.crc32c = google_crc32c.extend(self.crc32c, data)
            yield b"".join((chunk_prefix(offset, data.size), data.data))


def payload_bytes(arrays: Sequence[np.ndarray], dtype: str) -> int:
    """What a gradient takes on the wire: records as they are, elements in the dtype."""
    itemsize = 1 if dtype in COMPRESSED else DTYPES[dtype].itemsize
    return sum(array.size for array in arrays) * itemsize


def gradient_encoder(arrays: Sequence[np.ndarray], dtype: str) -> FlatEncoder | RecordEncoder:
    """What encodes a gradient."""
    return RecordEncoder(arrays, dtype) if dtype in COMPRESSED else FlatEncoder(arrays, dtype)


class PlainDecoder(FlatDecoder):
    """A decoder of a plain dtype, read as those of compressed ones are."""

    def pieces(self, chunk: Chunk) -> Iterator[np.ndarray]:
        """As `RecordDecoder.pieces`: one."""
        yield self.add(chunk)

    def rest(self) -> Iterator[np.ndarray]:
        """As `RecordDecoder.rest`: none."""
        return iter(())


class RecordDecoder(ChunkSequence):
    """Puts the records of one stream into a float32 array, and checks every one.

    Args:
        out: float32, one-dimensional, of the manifest's element count.
        size_bytes: what the header declared.

    Raises:
        KedgeError: SIZE_MISMATCH or UNSUPPORTED_DTYPE.
    """

    dtype = ""

    def __init__(self, out: np.ndarray, *, size_bytes: int) -> None:
        check_size(self.dtype, size_bytes, out.size)
        super().__init__(size_bytes)
        self._out = out
        self._filled = 0

    def pieces(self, chunk: Chunk) -> Iterator[np.ndarray]:
        """Takes the next chunk, a piece at a time: whoever has other things to do may do them in between.

        Yields:
            The parts of `out` that it fills, in order and touching, at most `PIECE_ELEMENTS` each.

        Raises:
            KedgeError: CHUNK_OUT_OF_RANGE, CHUNK_OVERLAP, CHUNK_GAP or CHUNK_MISALIGNED; MALFORMED_MESSAGE for records
                that no value is written as.
        """
        self._check(chunk)
        self._note(chunk)
        yield from self._decode(np.frombuffer(chunk.data, np.uint8))

    def rest(self) -> Iterator[np.ndarray]:
        """Fills what no record is about, once all chunks are in. As `pieces`."""
        return iter(())

    def _decode(self, raw: np.ndarray) -> Iterator[np.ndarray]:
        raise NotImplementedError

    def _take(self, element_count: int) -> np.ndarray:
        """The next elements of `out`, which count as filled."""
        begin, self._filled = self._filled, self._filled + element_count
        return self._out[begin : self._filled]

    def _check(self, chunk: Chunk) -> None:
        offset, length, record = chunk.offset, len(chunk.data), record_bytes(self.dtype)
        if not length or offset % record or (length % record and offset + length < self.size_bytes):
            raise KedgeError(
                "CHUNK_MISALIGNED",
                f"a chunk of {length} bytes at offset {offset}: it must begin and end with a record of {self.dtype}, "
                f"which has {record} bytes, and must not be empty",
                offset=offset,
            )
        self._check_place(chunk)


class _ScaledDecoder(RecordDecoder):
    """Those whose records are a scale and what it is multiplied by."""

    def _decode(self, raw: np.ndarray) -> Iterator[np.ndarray]:
        length = record_bytes(self.dtype)
        # By elements, too: the last record may be as long as a whole one, and have fewer.
        whole = min(raw.size // length, (self._out.size - self._filled) // RECORD_ELEMENTS) * length
        for at in range(0, whole, _PIECE_RECORDS * length):
            yield self._scaled(raw[at : min(at + _PIECE_RECORDS * length, whole)].reshape(-1, length), RECORD_ELEMENTS)
        if whole < raw.size:
            yield self._scaled(raw[whole:].reshape(1, -1), self._out.size - self._filled)

    def _scaled(self, records: np.ndarray, element_count: int) -> np.ndarray:
        values = self._take(len(records) * element_count)
        scales = np.ascontiguousarray(records[:, :SCALE_BYTES]).view("<f4")
        with np.errstate(over="ignore", invalid="ignore"):  # a scale that is not finite marks its elements
            self._multiply(records[:, SCALE_BYTES:], scales, values.reshape(len(records), element_count))
        return values

    def _multiply(self, factors: np.ndarray, scales: np.ndarray, values: np.ndarray) -> None:
        raise NotImplementedError


class Int8Decoder(_ScaledDecoder):
    """Reads DTYPE_INT8."""

    dtype = "int8"

    def _multiply(self, factors: np.ndarray, scales: np.ndarray, values: np.ndarray) -> None:
        signed = factors.view(np.int8)
        if signed.min() == -128:
            raise malformed("an element of DTYPE_INT8 has the byte -128: it must be -127 to 127")
        np.multiply(signed, scales, out=values)


class SignDecoder(_ScaledDecoder):
    """Reads DTYPE_SIGN."""

    dtype = "sign"

    def _multiply(self, factors: np.ndarray, scales: np.ndarray, values: np.ndarray) -> None:
        count = values.shape[1]
        if count % 8 == 0:
            np.take(_SIGN_TABLE, factors, axis=0, out=values.reshape(*factors.shape, 8), mode="clip")
            np.multiply(values, scales, out=values)
            return
        if factors[0, -1] >> count % 8:
            raise malformed(f"a record of DTYPE_SIGN has bits beyond its {count} elements: they must be 0")
        np.multiply(_SIGN_TABLE[factors].reshape(len(factors), -1)[:, :count], scales, out=values)


class TopKDecoder(RecordDecoder):
    """Reads DTYPE_TOP_K."""

    dtype = "top_k"

    def rest(self) -> Iterator[np.ndarray]:
        """Zeros after the last element that was sent."""
        return self._spread(np.zeros(0, np.int64), np.zeros(0, np.float32), self._out.size)

    def _decode(self, raw: np.ndarray) -> Iterator[np.ndarray]:
        records = raw.view(TOP_K_RECORD)
        indices = records["index"].astype(np.int64)
        if indices[0] < self._filled or (np.diff(indices) <= 0).any():
            raise malformed("the indices of DTYPE_TOP_K must grow from one record to the next")
        if indices[-1] >= self._out.size:
            raise malformed(f"DTYPE_TOP_K has the index {indices[-1]}: the run has {self._out.size} elements")
        return self._spread(indices, records["value"], int(indices[-1]) + 1)

    def _spread(self, indices: np.ndarray, sent: np.ndarray, end: int) -> Iterator[np.ndarray]:
        """Fills up to `end` with zeros and, where they belong, the values that were sent."""
        while self._filled < end:
            begin = self._filled
            values = self._take(min(PIECE_ELEMENTS, end - begin))
            first, last = np.searchsorted(indices, (begin, self._filled))
            values[:] = 0
            values[indices[first:last] - begin] = sent[first:last]
            yield values


_DECODERS = {decoder.dtype: decoder for decoder in (Int8Decoder, SignDecoder, TopKDecoder)}


def gradient_decoder(out: np.ndarray, *, dtype: str, size_bytes: int) -> PlainDecoder | RecordDecoder:
    """What decodes a gradient.

    Args:
        out: float32, one-dimensional, of the manifest's element count.
        dtype: the wire dtype, a plain or a compressed one.
        size_bytes: what the header declared.

    Raises:
        KedgeError: SIZE_MISMATCH, or UNSUPPORTED_DTYPE.
    """
    if dtype in _DECODERS:
        return _DECODERS[dtype](out, size_bytes=size_bytes)
    return PlainDecoder(out, dtype=dtype, size_bytes=size_bytes)


def decoded(records: np.ndarray, dtype: str, element_count: int) -> np.ndarray:
    """The elements of records that are there whole, float32.

    Raises:
        KedgeError: as `RecordDecoder`.
    """
    out = np.empty(element_count, np.float32)
    decoder = _DECODERS[dtype](out, size_bytes=records.nbytes)
    if records.size:
        for _ in decoder.pieces(Chunk(0, records.data)):
            pass
    for _ in decoder.rest():
        pass
    return out


def malformed(message: str) -> KedgeError:
    """The error for records that no value is written as."""
    return KedgeError("MALFORMED_MESSAGE", message)


def round_up_scale(scales: np.ndarray) -> np.ndarray:
    """Float32 scales rounded up to 17 significant bits, so that a product with 7 bits is exact in float32.

    Those that are not finite stay what they are.
    """
    bits = scales.view(np.uint32)
    rounded = (bits + np.uint32(0x7F)) & ~np.uint32(0x7F)
    return np.where(np.isfinite(scales), rounded, bits).view(np.float32)
