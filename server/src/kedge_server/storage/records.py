"""The bytes of a journal. All numbers are little-endian, all sums CRC-32C; `index` counts the records, from 1.

A segment is a file of 40 bytes of header and then records, one after the other:

    offset  length
         0       4  magic, the bytes "KJSG"
         4       2  version of the format, 1
         6       2  0
         8       8  index of its first record; the file's name too, in 20 digits
        16       8  index of the first record of the segment that it goes on from; 0: of none
        24       8  salt: a random number, which the sums of its records begin with
        32       4  0
        36       4  sum of bytes 0 to 35

A record is 64 bytes of header, the body and the payload:

    offset  length
         0       4  magic, the bytes "KJRC"
         4       1  version of the format, 1
         5       1  kind; what it means is not decided here
         6       2  0
         8       8  index
        16       8  step
        24       8  seconds since 1970, a float64
        32       8  synced index: every record up to it was on the disk when this one was written
        40       8  length of the payload
        48       4  length of the body
        52       4  sum of the body and the payload
        56       4  0
        60       4  sum of bytes 0 to 59

Both sums of a record begin with the sum of its segment's salt: a record of another file, or one that somebody hides in
a payload, is none here.

The file `synced` beside the segments is 24 bytes: magic "KJSY", version as 2 bytes, 2 bytes 0, the synced index as 8
bytes, 4 bytes 0, and the sum of bytes 0 to 19. It is never synced itself, so what it says was true at some moment.
"""

import struct
from collections.abc import Sequence
from typing import NamedTuple

import google_crc32c
import numpy as np

VERSION = 1

_SEGMENT = struct.Struct("<4sHHQQQI")
_RECORD = struct.Struct("<4sBBHQQdQQIII")
_MARK = struct.Struct("<4sHHQI")
_SUM = struct.Struct("<I")

SEGMENT_BYTES = _SEGMENT.size + _SUM.size
RECORD_BYTES = _RECORD.size + _SUM.size
MARK_BYTES = _MARK.size + _SUM.size

RECORD_MAGIC = b"KJRC"
_SEGMENT_MAGIC = b"KJSG"
_MARK_MAGIC = b"KJSY"

_SUM_PIECE_BYTES = 1 << 22
"""The sum holds Python's lock: 4 MiB at a time take about a millisecond."""


class SegmentHeader(NamedTuple):
    """How a segment begins."""

    first_index: int
    previous_first_index: int
    """That of the segment before it; 0 for none."""
    salt: int

    @property
    def salt_sum(self) -> int:
        """What the sums of its records begin with."""
        return int(google_crc32c.value(self.salt.to_bytes(8, "little")))


class RecordHeader(NamedTuple):
    """How a record begins."""

    kind: int
    index: int  # type: ignore[assignment]  # it hides a method of tuples
    step: int
    time_seconds: float
    synced_index: int
    payload_bytes: int
    body_bytes: int
    content_sum: int

    @property
    def size(self) -> int:
        """The length of the whole record."""
        return RECORD_BYTES + self.body_bytes + self.payload_bytes


def packed_segment(header: SegmentHeader) -> bytes:
    """The bytes of a segment's header."""
    return _summed(_SEGMENT.pack(_SEGMENT_MAGIC, VERSION, 0, *header, 0))


def parsed_segment(raw: bytes) -> SegmentHeader | int | None:
    """A segment's header; the version alone if it is another one; None if it is no header."""
    if len(raw) < SEGMENT_BYTES or raw[:4] != _SEGMENT_MAGIC or not _is_whole(raw[:SEGMENT_BYTES]):
        return None
    _, version, _, first_index, previous_first_index, salt, _ = _SEGMENT.unpack_from(raw)
    if version != VERSION:
        return int(version)
    return SegmentHeader(first_index, previous_first_index, salt)


def packed_record(header: RecordHeader, salt_sum: int) -> bytes:
    """The bytes of a record's header."""
    kind, *rest = header
    return _summed(_RECORD.pack(RECORD_MAGIC, VERSION, kind, 0, *rest, 0), salt_sum)


def header_sum(packed: bytes) -> int:
    """The sum that a record's header ends with. It depends on the segment's salt."""
    return int(_SUM.unpack_from(packed, RECORD_BYTES - _SUM.size)[0])


def parsed_record(raw: bytes, salt_sum: int, offset: int = 0) -> RecordHeader | None:
    """The header of the record at an offset of the bytes; None if there is none of this segment."""
    end = offset + RECORD_BYTES
    if raw[offset : offset + 4] != RECORD_MAGIC or end > len(raw) or not _is_whole(raw[offset:end], salt_sum):
        return None
    _, version, kind, _, *rest, _ = _RECORD.unpack_from(raw, offset)
    return RecordHeader(kind, *rest) if version == VERSION else None


def content_sum(body: bytes, payload: Sequence[np.ndarray], salt_sum: int) -> int:
    """The sum of a record's body and payload; the arrays are of uint8 and contiguous."""
    value = google_crc32c.extend(salt_sum, body)
    for array in payload:
        for start in range(0, len(array), _SUM_PIECE_BYTES):
            value = google_crc32c.extend(value, array[start : start + _SUM_PIECE_BYTES])
    return int(value)


def packed_mark(synced_index: int) -> bytes:
    """The bytes of the file `synced`."""
    return _summed(_MARK.pack(_MARK_MAGIC, VERSION, 0, synced_index, 0))


def parsed_mark(raw: bytes) -> int:
    """The synced index that the file `synced` holds; 0, which claims nothing, if it is not whole."""
    if len(raw) != MARK_BYTES or raw[:4] != _MARK_MAGIC or not _is_whole(raw):
        return 0
    return int(_MARK.unpack_from(raw)[3])


def _summed(raw: bytes, start: int = 0) -> bytes:
    return raw + _SUM.pack(google_crc32c.extend(start, raw))


def _is_whole(raw: bytes, start: int = 0) -> bool:
    """Whether the sum that it ends with is that of the rest."""
    return bool(_SUM.unpack_from(raw, len(raw) - _SUM.size)[0] == google_crc32c.extend(start, raw[: -_SUM.size]))
