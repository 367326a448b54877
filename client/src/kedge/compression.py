"""How a worker's gradients are written on the wire: as they are, or compressed with error feedback.

What compression leaves out of a gradient is not lost: the worker keeps it, the residual, and adds it to the next one.
With p = g + e, the gradient and the residual in float32, what is sent is C(p), and the new residual is p - C(p):

- `TopK`: every element of p is either sent or kept, so p = C(p) + e' to the bit.
- "int8": scales have 17 significant bits, so that C(p) and p - C(p) are exact in float32: p = C(p) + e' to the bit.
- "sign": C(p) has the signs of p and its mean magnitude; p - C(p) is rounded, by half a unit in its last place.

The one rounding besides is that of g + e. What is sent adds up to the gradients, then: up to the residual, and to these
roundings, each of which is at most 2^-24 of its p.

Sources: arXiv:1901.09847, algorithm 2 (sign with error feedback; here for records of 1024 elements in place of layers);
arXiv:1809.07599, algorithm 1 (top-k with memory). Both keep what is left out in units of the step; here it is in those
of the gradient, as the rate is the server's.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from kedge.optim._checks import plain
from kedge.wire.compressed import (
    PIECE_ELEMENTS,
    RECORD_ELEMENTS,
    SCALE_BYTES,
    TOP_K_RECORD,
    check_size,
    record_bytes,
    records_bytes,
    round_up_scale,
)
from kedge.wire.manifest import DTYPES

_MAGNITUDE = np.uint32(0x7FFFFFFF)
_INFINITY = np.uint32(0x7F800000)
"""Of the magnitudes of float32, as whole numbers: they are in the same order, and NaN is above all."""
_SAMPLE_COUNT = 1 << 16


@dataclass(frozen=True)
class TopK:
    """Sends the elements of the greatest magnitude of each gradient, 8 bytes each, and keeps the others for later.

    Attributes:
        fraction: the share of elements that is sent, greater than 0 and at most 1; at least one is sent.

    Example:
        >>> with run.join(wire_dtype=kedge.TopK(0.01)) as worker:
        ...     weights = worker.step(grads)
    """

    fraction: float

    def __post_init__(self) -> None:
        """Checks the fraction."""
        fraction = plain(self.fraction)
        if isinstance(fraction, bool) or not isinstance(fraction, int | float):
            raise TypeError(f"fraction is {fraction!r}: it must be a number")
        if not 0 < fraction <= 1:
            raise ValueError(f"fraction is {fraction!r}: it must be greater than 0 and at most 1")
        object.__setattr__(self, "fraction", float(fraction))


class Encoding(Protocol):
    """What a worker sends its gradients as. Belongs to one worker, and outlives its leases."""

    dtype: str
    """The wire dtype of gradients."""
    weights_dtype: str
    """The wire dtype of the weights that the worker pulls."""

    def encode(self, arrays: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
        """What is sent for a gradient, given as arrays in manifest order."""
        ...

    def settle(self, *, is_taken: bool) -> None:
        """Takes note of what became of the gradient that was encoded last: whether it counts, or was left out.

        Where nobody knows it counts: what it carried may be lost then, and is never sent twice.
        """
        ...


def encoding_of(wire_dtype: str | TopK, weights_dtype: str | None) -> Encoding:
    """What a worker that joins with these arguments sends.

    Raises:
        ValueError: for what is no dtype of the wire; the message names the argument.
    """
    compressor = _compressor_of(wire_dtype)
    if compressor is None and wire_dtype not in DTYPES:
        names = ", ".join((*DTYPES, *_COMPRESSORS))
        raise ValueError(f"wire_dtype is {wire_dtype!r}: it must be one of {names}, or kedge.TopK(0.01)")
    if weights_dtype is not None and weights_dtype not in DTYPES:
        raise ValueError(f"weights_dtype is {weights_dtype!r}: it must be None or one of {', '.join(DTYPES)}")
    if compressor is None:
        return Plain(str(wire_dtype), weights_dtype)
    return ErrorFeedback(compressor, weights_dtype or "bfloat16")


class Plain:
    """Gradients as they are, in a dtype of `DTYPES`; weights in the same one, unless another is given."""

    def __init__(self, dtype: str, weights_dtype: str | None = None) -> None:
        self.dtype = dtype
        self.weights_dtype = weights_dtype or dtype

    def encode(self, arrays: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
        """The arrays themselves."""
        return arrays

    def settle(self, *, is_taken: bool) -> None:
        """Nothing is kept."""


class Compressed(NamedTuple):
    """What a compressor makes of a gradient."""

    records: np.ndarray
    """What is sent, uint8."""
    is_finite: bool
    """Whether all elements are. Where they are not the records say so, and what is left says nothing."""


class Compressor(Protocol):
    """A form of compressed gradients."""

    dtype: str
    """Of the wire."""

    def compress(self, pieces: Iterator[np.ndarray], values: np.ndarray) -> Compressed:
        """Compresses.

        Args:
            pieces: consecutive views of `values`, `PIECE_ELEMENTS` each but the last, which hold their values from the
                moment when they are asked for.
            values: float32 of shape [n]; overwritten with what is left.
        """
        ...


class ErrorFeedback:
    """Compressed gradients, and what was left out of them so far.

    Whatever is encoded and not settled counts as left out. Holds 8 bytes for each parameter.

    Attributes:
        residual: what was left out so far and is to be sent, float32 of shape [n]; None before the first gradient.
    """

    def __init__(self, compressor: Compressor, weights_dtype: str) -> None:
        self.dtype = compressor.dtype
        self.weights_dtype = weights_dtype
        self.residual: np.ndarray | None = None
        self._compressor = compressor
        self._left = np.empty(0, np.float32)
        self._is_finite = False

    def encode(self, arrays: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
        """The records of the gradient and the residual together: one array, new with each call."""
        if self.residual is None:
            count = sum(array.size for array in arrays)
            check_size(self.dtype, 0 if self.dtype == "top_k" else records_bytes(self.dtype, count), count)
            self.residual, self._left = np.zeros(count, np.float32), np.empty(count, np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            records, self._is_finite = self._compressor.compress(_sums(arrays, self.residual, self._left), self._left)
        return (records,)

    def settle(self, *, is_taken: bool) -> None:
        """Keeps what was left out of the last gradient, if the rest of it counts; else its residual stays."""
        if is_taken and self._is_finite:
            self.residual, self._left = self._left, self.residual
        self._is_finite = False


def _sums(arrays: Sequence[np.ndarray], residual: np.ndarray, out: np.ndarray) -> Iterator[np.ndarray]:
    """The pieces of gradient + residual, each made when it is asked for, and in the cache then."""
    begin = end = 0
    for array in arrays:
        flat, at = array.reshape(-1), 0
        while at < flat.size:
            part = flat[at : at + begin + PIECE_ELEMENTS - end]
            start, end, at = end, end + part.size, at + part.size
            np.add(part, residual[start:end], out=out[start:end], dtype=np.float32)
            if end - begin == PIECE_ELEMENTS:
                yield out[begin:end]
                begin = end
    if begin < end:
        yield out[begin:end]


class _Scaled:
    """Records that are a scale and what it is multiplied by."""

    dtype = ""
    greatest_factor = np.float32(1)
    """What a scale is multiplied by at most: an element that is more than float32 holds is read as infinite."""

    def __init__(self) -> None:
        self._scratch = np.empty(0, np.float32)

    def compress(self, pieces: Iterator[np.ndarray], values: np.ndarray) -> Compressed:
        """Compresses piece by piece."""
        records = np.empty(records_bytes(self.dtype, values.size), np.uint8)
        self._scratch = np.empty(min(values.size, PIECE_ELEMENTS), np.float32)
        at, is_finite = 0, True
        for piece in pieces:
            whole = piece.size // RECORD_ELEMENTS * RECORD_ELEMENTS
            for part, length in ((piece[:whole], RECORD_ELEMENTS), (piece[whole:], piece.size - whole)):
                if part.size:
                    rows = part.reshape(-1, length)
                    size = len(rows) * record_bytes(self.dtype, length)
                    is_finite &= self._write(rows, records[at : at + size].reshape(len(rows), -1))
                    at += size
        return Compressed(records, is_finite)

    def _write(self, rows: np.ndarray, records: np.ndarray) -> bool:
        """Writes records, and leaves the rest of their rows in place; says whether all are finite."""
        scales = self._scales(rows)
        records[:, :SCALE_BYTES] = scales.astype("<f4", copy=False).view(np.uint8)
        left_out = self._scratch[: rows.size].reshape(rows.shape)
        self._fill(rows, scales, records[:, SCALE_BYTES:], left_out)
        np.subtract(rows, left_out, out=rows)
        return bool(np.isfinite(scales * self.greatest_factor).all())

    def _scales(self, rows: np.ndarray) -> np.ndarray:
        """The scale of each row, float32 of shape [rows, 1]."""
        raise NotImplementedError

    def _fill(self, rows: np.ndarray, scales: np.ndarray, factors: np.ndarray, decoded: np.ndarray) -> None:
        """Writes the factors, and what they and their scales are decoded to."""
        raise NotImplementedError


class Int8(_Scaled):
    """A byte for each element, of which 127 is the greatest in 1024."""

    dtype = "int8"
    greatest_factor = np.float32(127)

    def _scales(self, rows: np.ndarray) -> np.ndarray:
        greatest = np.maximum(rows.max(axis=1, keepdims=True), -rows.min(axis=1, keepdims=True))
        return round_up_scale(greatest / np.float32(127))

    def _fill(self, rows: np.ndarray, scales: np.ndarray, factors: np.ndarray, decoded: np.ndarray) -> None:
        np.divide(rows, np.where(scales > 0, scales, np.float32(1)), out=decoded)
        np.rint(decoded, out=decoded)
        np.copyto(factors.view(np.int8), np.where(np.isfinite(scales), decoded, 0), casting="unsafe")
        np.multiply(decoded, scales, out=decoded)


class Sign(_Scaled):
    """A bit for each element, and the mean magnitude of 1024."""

    dtype = "sign"

    def _scales(self, rows: np.ndarray) -> np.ndarray:
        magnitudes = self._scratch[: rows.size].reshape(rows.shape)
        np.abs(rows, out=magnitudes)
        means: np.ndarray = magnitudes.mean(axis=1, keepdims=True, dtype=np.float32)
        return means

    def _fill(self, rows: np.ndarray, scales: np.ndarray, factors: np.ndarray, decoded: np.ndarray) -> None:
        factors[:] = np.packbits(np.signbit(rows), axis=1, bitorder="little")
        np.copysign(scales, rows, out=decoded)


class _Greatest:
    """The elements of the greatest magnitude; of equal ones those that come first. Zeros are not sent."""

    dtype = "top_k"

    def __init__(self, fraction: float) -> None:
        self._fraction = fraction

    def compress(self, pieces: Iterator[np.ndarray], values: np.ndarray) -> Compressed:
        """Takes the greatest elements out of the values."""
        for _ in pieces:
            pass
        count = max(1, round(self._fraction * values.size))
        bits = values.view(np.uint32)
        indices, magnitudes = _at_least(_floor(bits, count), bits)
        if len(indices) < count:  # the sample misled, or there are more zeros
            indices, magnitudes = _at_least(np.uint32(1), bits)
        if len(indices) > count:
            chosen = _greatest(magnitudes, count)
            indices, magnitudes = indices[chosen], magnitudes[chosen]
        records = np.empty(len(indices), TOP_K_RECORD)
        records["index"], records["value"] = indices, values[indices]
        values[indices] = 0
        return Compressed(records.view(np.uint8), not (magnitudes >= _INFINITY).any())


def _floor(bits: np.ndarray, count: int) -> np.uint32:
    """A magnitude that somewhat more than `count` elements reach, going by a sample."""
    sample = bits[:: max(1, bits.size // _SAMPLE_COUNT | 1)] & _MAGNITUDE
    expected = sample.size * count / bits.size
    above = math.ceil(1.1 * expected + 4 * math.sqrt(expected)) + 4
    if above >= sample.size:
        return np.uint32(1)
    return np.uint32(max(1, np.partition(sample, sample.size - above)[sample.size - above]))


def _at_least(floor: np.uint32, bits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The indices of the magnitudes that are not below the floor, in order, and these magnitudes."""
    found, sizes = [], []
    for begin in range(0, bits.size, PIECE_ELEMENTS):
        magnitudes = bits[begin : begin + PIECE_ELEMENTS] & _MAGNITUDE
        at = np.flatnonzero(magnitudes >= floor)
        found.append((at + begin).astype(np.uint32))
        sizes.append(magnitudes[at])
    return np.concatenate(found), np.concatenate(sizes)


def _greatest(magnitudes: np.ndarray, count: int) -> np.ndarray:
    """Which are the `count` greatest, bool."""
    least = np.partition(magnitudes, len(magnitudes) - count)[len(magnitudes) - count]
    chosen: np.ndarray = magnitudes > least
    chosen[np.flatnonzero(magnitudes == least)[: count - np.count_nonzero(chosen)]] = True
    return chosen


_COMPRESSORS: dict[str, type[Int8 | Sign]] = {"int8": Int8, "sign": Sign}


def _compressor_of(wire_dtype: str | TopK) -> Compressor | None:
    """The compressor; None for a plain dtype, and for what is none."""
    if isinstance(wire_dtype, TopK):
        return _Greatest(wire_dtype.fraction)
    return _COMPRESSORS[wire_dtype]() if wire_dtype in _COMPRESSORS else None
