"""The journal of one run: its records in order, appended and read again. Without threads, clock or any idea of a run.

Invariants: indices are consecutive; a record that `sync` has covered is yielded whole or its damage is an error; and
only the end of the last segment may be torn, since a segment is synced before the next one begins.
"""

import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kedge_server.storage import records
from kedge_server.storage.errors import JournalCorrupt, StorageError, StorageFull, StorageUnavailable, SyncFailed
from kedge_server.storage.files import File, Files, read_file, replace_file
from kedge_server.storage.records import RECORD_BYTES, SEGMENT_BYTES, RecordHeader, SegmentHeader
from kedge_server.storage.segments import (
    Record,
    Segment,
    SegmentReader,
    describe,
    find_segments,
    leftovers,
    segment_path,
)
from kedge_server.telemetry.failpoints import failpoint

__all__ = ["Entry", "Journal", "Record"]

MARK_NAME = "synced"

_KEPT_SUMS = 4096
"""Of the records that were written last, more than come while a checkpoint begins."""


class Entry(NamedTuple):
    """A record to be appended."""

    kind: int
    """0 to 255."""
    step: int
    time_seconds: float
    """Seconds since 1970."""
    body: bytes
    payload: Sequence[np.ndarray] = ()
    """Arrays that are contiguous, of any dtype: they are written one after the other, without a copy."""


class Journal:
    """A journal, open.

    Attributes:
        next_index: that of the next record.
        synced_index: every record up to it is on the disk.
        cut_bytes: of a torn tail that was found at the end; without `repairs` it is still there.
        lost_indices: records that are not there and need not be, as a checkpoint has what came of them.
    """

    def __init__(self, directory: Path, files: Files, segment_bytes: int, segments: list[Segment]) -> None:
        self._directory = directory
        self._files = files
        self._segment_bytes = segment_bytes
        self._segments = segments
        self._file: File | None = None  # the last segment, if it can go on
        self._mark: File | None = None
        self._wants_rotation = False
        self._is_torn = False  # by a record that failed, and could not be cut off
        self._sync_failure: SyncFailed | None = None
        self.next_index = 1
        self.synced_index = 0
        self.cut_bytes = 0
        self.lost_indices = range(0)
        self._sums: dict[int, int] = {}

    @classmethod
    def open(
        cls,
        directory: Path,
        files: Files,
        *,
        segment_bytes: int,
        next_index_at_least: int = 1,
        repairs: bool = True,
    ) -> "Journal":
        """Opens the journal in a directory, a new one if there is none, and finds its end.

        It reads the last segment, and the headers of the others.

        Args:
            directory: of its own. If there is none, it is made with the first record; the one around it is there.
            files: the file system.
            segment_bytes: a segment does not grow beyond that, but for one that holds a single record.
            next_index_at_least: what a checkpoint has already, and one more.
            repairs: cut a torn tail off, and bring to the disk what is there; False: change nothing, and never append.

        Raises:
            JournalCorrupt: if there is damage that no crash makes.
            StorageFull, StorageUnavailable, SyncFailed: as the disk has it.
            StorageError: for a version of the format that is not known.
        """
        journal = cls(directory, files, segment_bytes, find_segments(files, directory))
        marked = read_file(files, directory / MARK_NAME)
        journal._find_end(records.parsed_mark(marked or b""), next_index_at_least)
        if repairs:
            journal._repair()
        return journal

    @property
    def is_empty(self) -> bool:
        """Whether there is no segment. Once there is one, one stays."""
        return not self._segments

    @property
    def first_index(self) -> int:
        """That of the oldest record from which on all are there; `next_index` if there is none."""
        if self.lost_indices and self.next_index == self.lost_indices.stop:
            return self.next_index
        begins = [segment.first_index for segment in self._segments if not segment.header.previous_first_index]
        oldest = [segment.first_index for segment in self._segments[:1]]
        return max(begins + oldest, default=self.next_index)

    def append(self, entries: Sequence[Entry]) -> None:
        """Writes records at the end. They are not on the disk before `sync` is done.

        Raises:
            StorageFull, StorageUnavailable: of the entries before the one that failed all are written, and `next_index`
                says so; of the rest nothing. It may be tried again.
            SyncFailed: now, or ever before: it must not be tried again.
            ValueError: for an array that is not contiguous; nothing is written.
        """
        self._require_syncs()
        payloads = [[_flat(array) for array in entry.payload] for entry in entries]
        for entry, payload in zip(entries, payloads, strict=True):
            self._append(entry, payload)

    def sync(self) -> None:
        """Brings everything that was appended to the disk.

        Raises:
            SyncFailed: now, or ever before. The process must end.
        """
        self._require_syncs()
        if self._file is None or self.synced_index == self.next_index - 1:
            return
        failpoint("journal.sync.before")
        self._sync_file(self._file)
        failpoint("journal.sync.after")
        self._write_mark()

    def records(self, from_index: int) -> Iterator[Record]:
        """The records from an index on, each checked.

        Raises:
            JournalCorrupt: where there is damage; the records before it have been yielded.
            StorageError: if `from_index` is less than `first_index`; StorageUnavailable: if they cannot be read.
        """
        if from_index < self.first_index:
            raise StorageError(
                f"{self._directory} begins with record {self.first_index}, and record {from_index} is asked for: "
                "what came of it is in a newer checkpoint alone"
            )
        for at, segment in enumerate(self._segments):
            end = self._end_of(at)
            if segment.first_index >= self.first_index and end > from_index:
                yield from self._records_of(segment, end, from_index)

    def sum_of(self, index: int) -> int | None:
        """The sum of a record's header, which no record of another history has; None if it is not there.

        Raises:
            StorageUnavailable: if it cannot be read.
        """
        if index in self._sums:
            return self._sums[index]
        for at, segment in enumerate(self._segments):
            if segment.first_index <= index < self._end_of(at):
                with SegmentReader(self._files, segment) as reader:
                    return reader.sum_of(index)
        return None

    def drop_before(self, index: int) -> None:
        """Removes the segments whose records are all before an index, but never the last one.

        Raises:
            StorageUnavailable: the rest of them is still there. SyncFailed: the process must end.
        """
        self._require_syncs()
        while len(self._segments) > 1 and self._segments[1].first_index <= index:
            failpoint("journal.drop.before")
            self._files.unlink(self._segments[0].path)
            # One at a time: a loss of power must not bring back one behind another that is gone.
            self._sync_directory(self._directory)
            failpoint("journal.drop.after")
            del self._segments[0]

    def size_bytes(self, from_index: int) -> int:
        """Of the records from an index on, about: those of one segment count as if all were of one size."""
        total = 0.0
        for at, segment in enumerate(self._segments):
            count = self._end_of(at) - segment.first_index
            counted = min(self._end_of(at) - from_index, count)
            total += segment.size * counted / count if counted > 0 else 0
        return round(total)

    def rotate(self) -> None:
        """Begins a new segment with the next record."""
        self._wants_rotation = True

    def close(self) -> None:
        """Closes the files. What is not synced may still be lost."""
        for file in (self._file, self._mark):
            if file is not None:
                file.close()
        self._file = self._mark = None

    # ------------------------------------------------------------------------------------------------------- opening

    def _find_end(self, marked_index: int, next_index_at_least: int) -> None:
        if not self._segments:
            self._require_marked(1, marked_index, next_index_at_least)
            self.next_index = next_index_at_least
            return
        last = self._segments[-1]
        with SegmentReader(self._files, last) as reader:
            while reader.read() is not None:
                pass
            offset, self.next_index = reader.offset, reader.next_index
            for header in reader.headers_after():
                marked_index = max(marked_index, header.synced_index)
                if self.next_index < next_index_at_least <= header.index:
                    # Before a checkpoint was complete, all that it covers had been synced.
                    raise self._lost(range(self.next_index, next_index_at_least), offset)
        self._require_marked(self.next_index, marked_index, next_index_at_least, offset)
        if self.next_index < next_index_at_least:
            self.lost_indices = range(self.next_index, next_index_at_least)
            self.next_index = next_index_at_least
            return
        self.cut_bytes = last.size - offset
        last.size = offset

    def _require_marked(self, end: int, marked_index: int, next_index_at_least: int, offset: int = 0) -> None:
        """Refuses to go on without records that were synced and are in no checkpoint.

        Args:
            end: the first record that is not there, or not whole.
            marked_index: every record up to it was synced once.
            next_index_at_least: every record before it is in a checkpoint.
            offset: where the records end, in the last segment.
        """
        if end > marked_index or marked_index < next_index_at_least:
            return
        raise self._lost(range(end, marked_index + 1), offset)

    def _lost(self, indices: range, offset: int) -> JournalCorrupt:
        path = self._segments[-1].path if self._segments else self._directory
        what = f"{describe(indices)} had been brought to the disk, and from there on they are not there or not whole"
        return JournalCorrupt(path, offset, what)

    def _repair(self) -> None:
        """Makes what is there, and no more, the state on the disk; the process before may have synced nothing."""
        for path in leftovers(self._files, self._directory):
            self._files.unlink(path)
        self.synced_index = self.next_index - 1
        if not self._segments or self.lost_indices:
            return
        last = self._segments[-1]
        self._file = self._files.open(last.path, writable=True)
        if self.cut_bytes:
            self._file.truncate(last.size)
        self._sync_file(self._file)
        self._sync_directory(self._directory)
        self._write_mark()

    # ------------------------------------------------------------------------------------------------------- writing

    def _append(self, entry: Entry, payload: list[np.ndarray]) -> None:
        payload_bytes = sum(map(len, payload))
        size = RECORD_BYTES + len(entry.body) + payload_bytes
        file, segment = self._room_for(size)
        salt_sum = segment.header.salt_sum
        content_sum = records.content_sum(entry.body, payload, salt_sum)
        fields = (entry.kind, self.next_index, entry.step, entry.time_seconds, self.synced_index)
        header = RecordHeader(*fields, payload_bytes, len(entry.body), content_sum)
        failpoint("journal.write.before")
        packed = records.packed_record(header, salt_sum)
        self._write(file, segment.size, [packed, entry.body, *payload])
        failpoint("journal.write.after")
        self._sums[self.next_index] = records.header_sum(packed)
        self._sums.pop(self.next_index - _KEPT_SUMS, None)
        segment.size += size
        self.next_index += 1

    def _write(self, file: File, offset: int, buffers: list[bytes | np.ndarray]) -> None:
        split = min(2, len(buffers) - 1)
        self._is_torn = True
        try:
            file.write(offset, buffers[:split])
            failpoint("journal.write.middle")
            file.write(offset + sum(map(len, buffers[:split])), buffers[split:])
        except (StorageFull, StorageUnavailable):
            self._try_to_mend()
            raise
        self._is_torn = False

    def _try_to_mend(self) -> None:
        """What cannot be cut off now is before the next record."""
        try:
            self._mend()
        except (StorageFull, StorageUnavailable):
            return

    def _mend(self) -> None:
        if self._is_torn and self._file is not None:
            self._file.truncate(self._segments[-1].size)
            self._is_torn = False

    def _room_for(self, size: int) -> tuple[File, Segment]:
        """The segment that a record of this size goes into, a new one if need be."""
        self._mend()
        if self._file is None or self._is_full(self._segments[-1].size, size):
            # It stays so if that fails: the new segment may be there already, and then the old one must not go on.
            self._wants_rotation = True
            self._rotate()
        assert self._file is not None
        return self._file, self._segments[-1]

    def _is_full(self, end: int, size: int) -> bool:
        has_records = end > SEGMENT_BYTES
        return has_records and (self._wants_rotation or end + size > self._segment_bytes)

    def _rotate(self) -> None:
        failpoint("journal.rotate.before")
        previous = 0
        if self._file is not None:
            self._sync_file(self._file)
            previous = self._segments[-1].first_index
        else:
            self._files.make_directory(self._directory)
            self._sync_directory(self._directory.parent)
        segment = self._created(SegmentHeader(self.next_index, previous, secrets.randbits(64)))
        file = self._files.open(segment.path, writable=True)
        if self._file is not None:
            self._file.close()
        self._file = file
        self._segments.append(segment)
        self._wants_rotation = False

    def _created(self, header: SegmentHeader) -> Segment:
        path = segment_path(self._directory, header.first_index)
        try:
            replace_file(
                self._files,
                path,
                [records.packed_segment(header)],
                on_written=lambda: failpoint("journal.rotate.created"),
                on_renamed=lambda: failpoint("journal.rotate.renamed"),
            )
        except SyncFailed as failure:
            self._sync_failure = failure
            raise
        return Segment(path, header, SEGMENT_BYTES)

    def _sync_file(self, file: File) -> None:
        try:
            file.sync()
        except SyncFailed as failure:
            self._sync_failure = failure
            raise
        self.synced_index = self.next_index - 1

    def _sync_directory(self, directory: Path) -> None:
        try:
            self._files.sync_directory(directory)
        except SyncFailed as failure:
            self._sync_failure = failure
            raise

    def _require_syncs(self) -> None:
        if self._sync_failure is not None:
            raise self._sync_failure

    def _write_mark(self) -> None:
        """Notes what is synced, for whoever opens the journal next. It is a help only: a full disk may refuse it."""
        try:
            if self._mark is None:
                self._mark = self._files.open(self._directory / MARK_NAME, create=True)
            self._mark.write(0, [records.packed_mark(self.synced_index)])
        except (StorageFull, StorageUnavailable):
            return

    # ------------------------------------------------------------------------------------------------------- reading

    def _end_of(self, at: int) -> int:
        """The index behind the last record of a segment."""
        if at + 1 < len(self._segments):
            return self._segments[at + 1].first_index
        return self.lost_indices.start if self._is_behind_lost(at) else self.next_index

    def _is_behind_lost(self, at: int) -> bool:
        return bool(self.lost_indices) and self._segments[at].first_index < self.lost_indices.stop

    def _records_of(self, segment: Segment, end: int, from_index: int) -> Iterator[Record]:
        with SegmentReader(self._files, segment) as reader:
            while reader.next_index < end:
                record = reader.read()
                if record is None:
                    raise JournalCorrupt(segment.path, reader.offset, f"record {reader.next_index} is not whole")
                if record.index >= from_index:
                    yield record
            if not reader.is_at_end and segment is not self._segments[-1]:
                raise JournalCorrupt(segment.path, reader.offset, f"something follows record {end - 1}, its last one")


def _flat(array: np.ndarray) -> np.ndarray:
    """The bytes of an array, without a copy."""
    if not array.flags.c_contiguous:
        raise ValueError(f"an array of shape {array.shape} is not contiguous: copy it first")
    return array.reshape(-1).view(np.uint8)
