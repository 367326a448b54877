"""The segments of a journal as they are on the disk: which there are, whether they belong together, what they hold."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kedge_server.storage import records
from kedge_server.storage.errors import JournalCorrupt, StorageError
from kedge_server.storage.files import TEMPORARY, Files
from kedge_server.storage.records import RECORD_BYTES, SEGMENT_BYTES, RecordHeader, SegmentHeader

_SUFFIX = ".log"
_NAME = re.compile(r"\d{20}\.log")
_SCAN_BYTES = 1 << 24


class Record(NamedTuple):
    """A record as it was appended."""

    index: int  # type: ignore[assignment]  # it hides a method of tuples
    kind: int
    step: int
    time_seconds: float
    """Seconds since 1970."""
    body: bytes
    payload: np.ndarray
    """uint8, of its own memory."""


@dataclass
class Segment:
    """A segment."""

    path: Path
    header: SegmentHeader
    size: int
    """In bytes, header included."""

    @property
    def first_index(self) -> int:
        """The index of its first record, or of the one that will be."""
        return self.header.first_index


def segment_path(directory: Path, first_index: int) -> Path:
    """Where the segment is that begins with this record."""
    return directory / f"{first_index:020}{_SUFFIX}"


def find_segments(files: Files, directory: Path) -> list[Segment]:
    """The segments in a directory, in order. What does not end in `.log` is none.

    Raises:
        JournalCorrupt: if one is missing, or its header is damaged.
        StorageError: if they are of another version; StorageUnavailable: if they cannot be read.
    """
    names = [name for name in files.list(directory) if name.endswith(_SUFFIX)]
    segments = [_opened(files, directory / name) for name in names]
    for before, segment in pairwise(segments):
        expected = segment.header.previous_first_index
        if expected not in (0, before.first_index):
            missing = segment_path(directory, expected).name
            raise JournalCorrupt(segment.path, 0, f"the segment {missing}, which comes before it, is missing")
    return segments


def leftovers(files: Files, directory: Path) -> list[Path]:
    """The files that a crash left half made."""
    return [directory / name for name in files.list(directory) if name.endswith(_SUFFIX + TEMPORARY)]


class SegmentReader:
    """Reads the records of a segment in order, and checks each.

    Attributes:
        offset: where the next record begins.
        next_index: its index.
        is_at_end: whether nothing follows.
    """

    def __init__(self, files: Files, segment: Segment) -> None:
        self._segment = segment
        self._file = files.open(segment.path)
        self._salt_sum = segment.header.salt_sum
        self.offset = SEGMENT_BYTES
        self.next_index = segment.first_index

    def __enter__(self) -> "SegmentReader":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @property
    def is_at_end(self) -> bool:
        """Whether nothing follows."""
        return self.offset >= self._segment.size

    def read(self) -> Record | None:
        """The next record; None if none follows that is whole.

        Raises:
            StorageUnavailable: if it cannot be read.
        """
        header = records.parsed_record(self._bytes(self.offset, RECORD_BYTES).tobytes(), self._salt_sum)
        if header is None or header.index != self.next_index or self.offset + header.size > self._segment.size:
            return None
        body = self._bytes(self.offset + RECORD_BYTES, header.body_bytes).tobytes()
        payload = self._bytes(self.offset + RECORD_BYTES + header.body_bytes, header.payload_bytes)
        if records.content_sum(body, [payload], self._salt_sum) != header.content_sum:
            return None
        self.offset += header.size
        self.next_index += 1
        return Record(header.index, header.kind, header.step, header.time_seconds, body, payload)

    def sum_of(self, index: int) -> int | None:
        """The sum of a record's header; None if the record is not there. It reads the headers up to that one."""
        offset, at = SEGMENT_BYTES, self._segment.first_index
        while offset < self._segment.size:
            raw = self._bytes(offset, RECORD_BYTES).tobytes()
            header = records.parsed_record(raw, self._salt_sum)
            if header is None or header.index != at:
                return None
            if at == index:
                return records.header_sum(raw)
            offset, at = offset + header.size, at + 1
        return None

    def headers_after(self) -> Iterator[RecordHeader]:
        """The headers of records behind the place where nothing whole follows. A header may come more than once.

        That there are some is no proof that what is before them was ever whole: a loss of power may leave the second of
        two records that were not synced.
        """
        start = self.offset
        while start < self._segment.size:
            yield from self._headers(self._bytes(start, _SCAN_BYTES).tobytes())
            start += _SCAN_BYTES - RECORD_BYTES + 1

    def _headers(self, piece: bytes) -> Iterator[RecordHeader]:
        at = piece.find(records.RECORD_MAGIC)
        while at >= 0:
            header = records.parsed_record(piece, self._salt_sum, at)
            if header is not None:
                yield header
            at = piece.find(records.RECORD_MAGIC, at + 1)

    def _bytes(self, offset: int, count: int) -> np.ndarray:
        """So many bytes, or fewer where the segment ends."""
        content = np.empty(max(min(count, self._segment.size - offset), 0), np.uint8)
        return content[: self._file.read_into(offset, content)]


def _opened(files: Files, path: Path) -> Segment:
    if not _NAME.fullmatch(path.name):
        raise JournalCorrupt(path, 0, "its name is none of a segment, which has 20 digits before .log")
    file = files.open(path)
    try:
        size, raw = file.size(), np.empty(SEGMENT_BYTES, np.uint8)
        header = records.parsed_segment(raw[: file.read_into(0, raw)].tobytes())
    finally:
        file.close()
    if isinstance(header, int):
        raise StorageError(
            f"{path} is of version {header} of the format, and this is of {records.VERSION}: use the newer server"
        )
    if header is None:
        raise JournalCorrupt(path, 0, "its header is not whole")
    if segment_path(path.parent, header.first_index) != path:
        raise JournalCorrupt(path, 0, f"it begins with record {header.first_index}: it has the name of another segment")
    return Segment(path, header, size)


def describe(indices: Sequence[int]) -> str:
    """Records by their indices, for people."""
    return f"record {indices[0]}" if len(indices) == 1 else f"records {indices[0]} to {indices[-1]}"
