"""A journal: appended, read again, cut, and found out where it is damaged."""

import errno
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from forgetful_files import ForgetfulFiles

from kedge_server.storage.errors import (
    JournalCorrupt,
    StorageError,
    StorageFull,
    StorageUnavailable,
    SyncFailed,
)
from kedge_server.storage.files import OsFiles
from kedge_server.storage.journal import MARK_NAME, Entry, Journal

SEGMENT_HEADER, RECORD_HEADER = 40, 64


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "journal"


def opened(directory: Path, segment_bytes: int = 1 << 20, **options: Any) -> Journal:
    return Journal.open(directory, OsFiles(), segment_bytes=segment_bytes, **options)


def entry(number: int, payload_bytes: int = 20) -> Entry:
    """One whose bytes are all its own."""
    payload = np.full(payload_bytes, 100 + number, np.uint8)
    return Entry(number, 10 * number, number + 0.25, f"body {number}".encode(), [payload])


def of(number: int, payload_bytes: int = 20) -> tuple[Any, ...]:
    """What is read of it, if it was the record of this index."""
    return number, number, 10 * number, number + 0.25, f"body {number}".encode(), bytes([100 + number]) * payload_bytes


SIZE = RECORD_HEADER + len("body 1") + 20


def read(journal: Journal, from_index: int = 1) -> list[tuple[Any, ...]]:
    return [(*record[:-1], record.payload.tobytes()) for record in journal.records(from_index)]


def written(directory: Path, count: int, **options: Any) -> Path:
    """A journal of so many records, synced and closed; its last segment."""
    journal = opened(directory, **options)
    journal.append([entry(number) for number in range(1, count + 1)])
    journal.sync()
    journal.close()
    return max(directory.glob("*.log"))


def unsynced(directory: Path, count: int) -> Path:
    """One whose process ended before it could sync."""
    journal = opened(directory)
    journal.append([entry(number) for number in range(1, count + 1)])
    journal.close()
    return max(directory.glob("*.log"))


def flip(path: Path, at: int, bit: int = 0) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1 << bit
    path.write_bytes(raw)


# Appending and reading


def test_new_journal_is_empty_and_leaves_nothing_behind(directory: Path) -> None:
    journal = opened(directory)
    assert (journal.first_index, journal.next_index, journal.synced_index) == (1, 1, 0)
    assert read(journal) == []
    journal.sync()
    assert not directory.exists()


def test_what_was_appended_is_read_by_this_journal_and_the_next(directory: Path) -> None:
    journal = opened(directory)
    journal.append([entry(1), entry(2, 0)])
    journal.append([entry(3)])
    expected = [of(1), of(2, 0), of(3)]
    assert read(journal) == expected
    assert read(journal, 3) == expected[2:]
    journal.close()
    again = opened(directory)
    assert read(again) == expected
    assert (again.next_index, again.synced_index, again.cut_bytes) == (4, 3, 0)


def test_arrays_of_all_kinds_are_written_one_after_the_other(directory: Path) -> None:
    arrays: Sequence[np.ndarray] = [
        np.arange(6, dtype=np.float32).reshape(2, 3),
        np.array(7, np.int64),
        np.zeros((0, 4), np.float32),
        np.ones(3, ml_dtypes.bfloat16),
    ]
    journal = opened(directory)
    journal.append([Entry(1, 0, 0.0, b"", arrays)])
    (record,) = journal.records(1)
    assert record.payload.tobytes() == b"".join(array.tobytes() for array in arrays)
    assert record.payload[:24].view(np.float32).tolist() == [0, 1, 2, 3, 4, 5]


def test_more_arrays_than_one_call_of_the_system_takes(directory: Path) -> None:
    arrays = [np.array([number], np.uint32) for number in range(3000)]
    journal = opened(directory)
    journal.append([Entry(1, 0, 0.0, b"", arrays)])
    (record,) = journal.records(1)
    assert record.payload.view(np.uint32).tolist() == list(range(3000))


def test_array_with_gaps_is_refused_and_nothing_is_written(directory: Path) -> None:
    journal = opened(directory)
    with pytest.raises(ValueError, match="contiguous"):
        journal.append([entry(1), Entry(2, 0, 0.0, b"", [np.zeros(10, np.float32)[::2]])])
    assert (journal.next_index, read(journal)) == (1, [])


def test_system_that_writes_a_little_at_a_time_is_asked_again(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def little(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        return os.pwrite(descriptor, b"".join(buffers)[:7], offset)

    monkeypatch.setattr(os, "pwritev", little)
    journal = opened(directory)
    journal.append([entry(1), entry(2)])
    assert read(journal) == [of(1), of(2)]


# Segments


def test_segment_does_not_grow_beyond_its_size(directory: Path) -> None:
    written(directory, 5, segment_bytes=SEGMENT_HEADER + 2 * SIZE)
    files = sorted(directory.glob("*.log"))
    assert [int(path.stem) for path in files] == [1, 3, 5]
    assert [path.stat().st_size - SEGMENT_HEADER for path in files] == [2 * SIZE, 2 * SIZE, SIZE]
    assert read(opened(directory)) == [of(number) for number in range(1, 6)]


def test_record_larger_than_a_segment_has_one_of_its_own(directory: Path) -> None:
    journal = opened(directory, 300)
    journal.append([entry(1), entry(2, 1000), entry(3)])
    assert [int(path.stem) for path in sorted(directory.glob("*.log"))] == [1, 2, 3]
    assert read(journal) == [of(1), of(2, 1000), of(3)]


def test_rotation_by_hand_begins_a_segment_with_the_next_record(directory: Path) -> None:
    journal = opened(directory)
    for number in (1, 2):
        journal.append([entry(number)])
        journal.rotate()
        journal.rotate()
    assert len(list(directory.glob("*.log"))) == 2
    assert read(journal) == [of(1), of(2)]


def test_segments_are_dropped_only_whole_and_never_the_last(directory: Path) -> None:
    journal = opened(directory, SEGMENT_HEADER + 2 * SIZE)
    journal.append([entry(number) for number in range(1, 6)])
    journal.drop_before(2)
    assert journal.first_index == 1
    journal.drop_before(4)
    assert journal.first_index == 3
    assert read(journal, 3) == [of(3), of(4), of(5)]
    journal.drop_before(100)
    assert journal.first_index == 5
    journal.close()
    again = opened(directory)
    assert (again.first_index, again.next_index) == (5, 6)
    with pytest.raises(StorageError, match="begins with record 5, and record 4 is asked for"):
        list(again.records(4))


def test_size_is_that_of_the_records_from_an_index_on(directory: Path) -> None:
    journal = opened(directory, SEGMENT_HEADER + 2 * SIZE)
    assert journal.size_bytes(1) == 0
    journal.append([entry(number) for number in range(1, 6)])
    assert journal.size_bytes(1) == 5 * SIZE + 3 * SEGMENT_HEADER
    assert journal.size_bytes(3) == 3 * SIZE + 2 * SEGMENT_HEADER
    assert journal.size_bytes(4) == 2 * SIZE + 1.5 * SEGMENT_HEADER
    assert journal.size_bytes(6) == 0


def test_journal_goes_on_behind_a_checkpoint_that_has_all_of_it(directory: Path) -> None:
    journal = opened(directory, next_index_at_least=41)
    assert (journal.first_index, journal.next_index) == (41, 41)
    journal.append([entry(1)])
    journal.close()
    assert [record.index for record in opened(directory, next_index_at_least=41).records(41)] == [41]


def test_records_that_a_checkpoint_has_may_be_lost(directory: Path) -> None:
    written(directory, 2)
    journal = opened(directory, next_index_at_least=9)
    assert (journal.lost_indices, journal.first_index, journal.next_index) == (range(3, 9), 9, 9)
    journal.append([entry(1)])
    journal.close()
    again = opened(directory, next_index_at_least=9)
    assert [record.index for record in again.records(9)] == [9]
    with pytest.raises(StorageError, match="begins with record 9, and record 2 is asked for"):
        list(again.records(2))
    again.drop_before(9)
    assert [path.name for path in directory.glob("*.log")] == [f"{9:020}.log"]


def test_files_of_others_are_left_alone_and_half_made_segments_removed(directory: Path) -> None:
    written(directory, 2)
    (directory / "notes.txt").write_text("mine")
    (directory / f"{3:020}.log.tmp").write_bytes(b"half")
    assert read(opened(directory, repairs=False)) == [of(1), of(2)]
    assert (directory / f"{3:020}.log.tmp").exists()
    assert read(opened(directory)) == [of(1), of(2)]
    assert sorted(path.name for path in directory.iterdir()) == [f"{1:020}.log", "notes.txt", MARK_NAME]


# Torn tails


@pytest.mark.parametrize("left", range(SIZE))
def test_torn_last_record_is_cut_wherever_it_is_torn(directory: Path, left: int) -> None:
    path = unsynced(directory, 3)
    os.truncate(path, SEGMENT_HEADER + 2 * SIZE + left)
    before = path.read_bytes()
    looked = opened(directory, repairs=False)
    assert (looked.cut_bytes, looked.next_index, read(looked)) == (left, 3, [of(1), of(2)])
    assert path.read_bytes() == before
    journal = opened(directory)
    assert (journal.cut_bytes, journal.next_index) == (left, 3)
    assert path.stat().st_size == SEGMENT_HEADER + 2 * SIZE
    journal.append([entry(3)])
    assert read(journal) == [of(1), of(2), of(3)]


def test_zeros_at_the_end_are_a_torn_tail(directory: Path) -> None:
    path = unsynced(directory, 2)
    os.truncate(path, path.stat().st_size + 5000)
    journal = opened(directory)
    assert (journal.cut_bytes, read(journal)) == (5000, [of(1), of(2)])


def test_unsynced_record_that_is_lost_before_another_takes_it_along(directory: Path) -> None:
    path = unsynced(directory, 3)
    flip(path, SEGMENT_HEADER + SIZE + 5)
    journal = opened(directory)
    assert (journal.cut_bytes, read(journal)) == (2 * SIZE, [of(1)])


def test_forged_record_in_a_payload_is_no_proof_of_anything(directory: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    forged = np.frombuffer(written(other, 3).read_bytes()[SEGMENT_HEADER:], np.uint8)
    journal = opened(directory)
    journal.append([entry(1), Entry(2, 0, 0.0, b"", [forged])])
    journal.close()
    path = directory / f"{1:020}.log"
    flip(path, SEGMENT_HEADER + SIZE)
    again = opened(directory)
    assert (again.next_index, read(again)) == (2, [of(1)])


# Damage


@pytest.mark.parametrize("at", range(SIZE))
def test_flipped_bit_in_a_synced_record_is_corruption(directory: Path, at: int) -> None:
    path = written(directory, 3)
    (directory / MARK_NAME).unlink()
    journal = opened(directory)
    journal.append([entry(4)])
    journal.close()
    (directory / MARK_NAME).unlink()
    for index in (1, 2, 3):
        place = SEGMENT_HEADER + (index - 1) * SIZE
        flip(path, place + at, at % 8)
        with pytest.raises(JournalCorrupt) as refused:
            opened(directory)
        assert (refused.value.path, refused.value.offset) == (path, place)
        flip(path, place + at, at % 8)
    assert len(read(opened(directory))) == 4


@pytest.mark.parametrize("at", range(SEGMENT_HEADER + SIZE, SEGMENT_HEADER + 2 * SIZE))
def test_flipped_bit_in_the_last_record_is_corruption_if_it_was_synced(directory: Path, at: int) -> None:
    path = written(directory, 2)
    flip(path, at, at % 8)
    with pytest.raises(JournalCorrupt, match="record 2 had been brought to the disk") as refused:
        opened(directory)
    assert (refused.value.path, refused.value.offset) == (path, SEGMENT_HEADER + SIZE)


@pytest.mark.parametrize("size", [0, 1, SEGMENT_HEADER, SEGMENT_HEADER + SIZE - 1, SEGMENT_HEADER + SIZE])
def test_file_that_lost_synced_records_at_its_end_is_corrupt(directory: Path, size: int) -> None:
    os.truncate(written(directory, 2), size)
    with pytest.raises(JournalCorrupt):
        opened(directory)


def test_all_segments_gone_is_corruption(directory: Path) -> None:
    written(directory, 2).unlink()
    with pytest.raises(JournalCorrupt, match="records 1 to 2 had been brought to the disk"):
        opened(directory)


@pytest.mark.parametrize("at", range(SEGMENT_HEADER + 2 * SIZE))
def test_flipped_bit_in_an_older_segment_is_corruption(directory: Path, at: int) -> None:
    written(directory, 5, segment_bytes=SEGMENT_HEADER + 2 * SIZE)
    path = directory / f"{3:020}.log"
    flip(path, at, at % 8)
    with pytest.raises(JournalCorrupt) as refused:
        read(opened(directory))
    begins = {True: 0, at >= SEGMENT_HEADER: SEGMENT_HEADER, at >= SEGMENT_HEADER + SIZE: SEGMENT_HEADER + SIZE}
    assert (refused.value.path, refused.value.offset) == (path, begins[True])


def test_records_before_the_damage_are_yielded(directory: Path) -> None:
    written(directory, 5, segment_bytes=SEGMENT_HEADER + 2 * SIZE)
    flip(directory / f"{3:020}.log", SEGMENT_HEADER + SIZE + 70)
    records = opened(directory).records(1)
    assert [next(records).index for _ in range(3)] == [1, 2, 3]
    with pytest.raises(JournalCorrupt):
        next(records)


@pytest.mark.parametrize("size", [SEGMENT_HEADER + SIZE, SEGMENT_HEADER + SIZE + 10, SEGMENT_HEADER + 2 * SIZE + 1])
def test_older_segment_that_ends_early_or_late_is_corrupt(directory: Path, size: int) -> None:
    written(directory, 5, segment_bytes=SEGMENT_HEADER + 2 * SIZE)
    os.truncate(directory / f"{3:020}.log", size)
    with pytest.raises(JournalCorrupt) as refused:
        read(opened(directory))
    assert refused.value.offset == SEGMENT_HEADER + (2 if size > SEGMENT_HEADER + 2 * SIZE else 1) * SIZE


def test_missing_segment_is_found_on_opening(directory: Path) -> None:
    written(directory, 7, segment_bytes=SEGMENT_HEADER + 2 * SIZE)
    (directory / f"{3:020}.log").unlink()
    with pytest.raises(JournalCorrupt, match=f"{3:020}.log, which comes before it, is missing"):
        opened(directory)


def test_missing_last_segment_is_found_on_opening(directory: Path) -> None:
    written(directory, 7, segment_bytes=SEGMENT_HEADER + 2 * SIZE).unlink()
    with pytest.raises(JournalCorrupt, match="record 7 had been brought to the disk"):
        opened(directory)


def test_segment_under_another_name_is_refused(directory: Path) -> None:
    path = written(directory, 2)
    path.rename(directory / f"{2:020}.log")
    with pytest.raises(JournalCorrupt, match="it begins with record 1"):
        opened(directory)
    (directory / f"{2:020}.log").rename(directory / "old.log")
    with pytest.raises(JournalCorrupt, match="20 digits"):
        opened(directory)


def test_segment_of_another_journal_is_refused(directory: Path, tmp_path: Path) -> None:
    written(directory, 3, segment_bytes=SEGMENT_HEADER + SIZE)
    path = written(tmp_path / "other", 1)
    (directory / f"{2:020}.log").write_bytes(path.read_bytes())
    with pytest.raises(JournalCorrupt):
        opened(directory)


def test_gap_in_the_indices_is_corruption(directory: Path) -> None:
    path = written(directory, 3)
    raw = path.read_bytes()
    cut = SEGMENT_HEADER + SIZE
    path.write_bytes(raw[:cut] + raw[cut + SIZE :])
    with pytest.raises(JournalCorrupt) as refused:
        opened(directory)
    assert refused.value.offset == cut


def test_older_segment_of_damage_that_nobody_needs_is_not_read(directory: Path) -> None:
    written(directory, 5, segment_bytes=SEGMENT_HEADER + 2 * SIZE)
    flip(directory / f"{1:020}.log", SEGMENT_HEADER + 3)
    assert read(opened(directory), 3) == [of(3), of(4), of(5)]


# A disk that refuses


def test_full_disk_takes_what_fits_and_goes_on_when_there_is_room(directory: Path) -> None:
    files = ForgetfulFiles(4096, directory.parent)
    journal = Journal.open(directory, files, segment_bytes=1 << 20)
    files.room = SEGMENT_HEADER + 2 * SIZE + 75
    with pytest.raises(StorageFull):
        journal.append([entry(number) for number in (1, 2, 3, 4)])
    assert (journal.next_index, read(journal)) == (3, [of(1), of(2)])
    assert len(files.names[directory / f"{1:020}.log"].content) == SEGMENT_HEADER + 2 * SIZE
    with pytest.raises(StorageFull):
        journal.append([entry(3)])
    files.room = None
    journal.append([entry(3)])
    journal.sync()
    assert read(Journal.open(directory, files, segment_bytes=1 << 20)) == [of(1), of(2), of(3)]


def test_record_that_could_not_be_cut_off_is_cut_before_the_next(directory: Path) -> None:
    files = ForgetfulFiles(4096, directory.parent)
    journal = Journal.open(directory, files, segment_bytes=1 << 20)
    journal.append([entry(1)])
    files.room, files.cuts = 75, False
    with pytest.raises(StorageFull):
        journal.append([entry(2, 500)])
    assert read(journal) == [of(1)]
    files.room = None
    with pytest.raises(StorageUnavailable):
        journal.append([entry(2)])
    files.cuts = True
    journal.append([entry(2)])
    assert read(journal) == [of(1), of(2)]
    assert read(Journal.open(directory, files, segment_bytes=1 << 20)) == [of(1), of(2)]


def test_full_disk_at_a_rotation_leaves_the_journal_usable(directory: Path) -> None:
    files = ForgetfulFiles(4096, directory.parent)
    journal = Journal.open(directory, files, segment_bytes=SEGMENT_HEADER + SIZE)
    journal.append([entry(1)])
    files.room = 10
    with pytest.raises(StorageFull):
        journal.append([entry(2)])
    assert files.list(directory) == [f"{1:020}.log"]
    files.room = None
    journal.append([entry(2)])
    assert read(Journal.open(directory, files, segment_bytes=1 << 20)) == [of(1), of(2)]


@pytest.mark.parametrize(
    ("number", "error"),
    [(errno.ENOSPC, StorageFull), (errno.EDQUOT, StorageFull), (errno.EROFS, StorageUnavailable)],
)
def test_refusals_of_the_system_have_names(
    directory: Path, monkeypatch: pytest.MonkeyPatch, number: int, error: type[Exception]
) -> None:
    journal = opened(directory)
    journal.append([entry(1)])

    def refuse(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", refuse)
        with pytest.raises(error, match=str(directory)):
            journal.append([entry(2)])
    journal.append([entry(2)])
    assert read(journal) == [of(1), of(2)]


def test_failed_sync_is_final(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = opened(directory)
    journal.append([entry(1)])

    def refuse(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", refuse)
        with pytest.raises(SyncFailed):
            journal.sync()
    for act in (journal.sync, lambda: journal.append([entry(2)]), lambda: journal.drop_before(1)):
        with pytest.raises(SyncFailed):
            act()
    assert journal.synced_index == 0


def test_failed_sync_of_the_directory_is_final(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = opened(directory)

    def refuse(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        with pytest.raises(SyncFailed):
            journal.append([entry(1)])
    with pytest.raises(SyncFailed):
        journal.append([entry(1)])
