"""The bytes of a journal, against the description and a CRC-32C that is written out here."""

import struct
from pathlib import Path

import numpy as np
import pytest

from kedge_server.storage import records
from kedge_server.storage.errors import StorageError
from kedge_server.storage.files import OsFiles
from kedge_server.storage.journal import Entry, Journal
from kedge_server.storage.records import RecordHeader, SegmentHeader


def crc32c(raw: bytes, start: int = 0) -> int:
    """Bit by bit, with the polynomial of RFC 3720."""
    value = start ^ 0xFFFFFFFF
    for byte in raw:
        value ^= byte
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
    return value ^ 0xFFFFFFFF


def summed(raw: bytes, start: int = 0) -> bytes:
    return raw + struct.pack("<I", crc32c(raw, start))


def test_the_oracle_knows_the_check_value_of_the_rfc() -> None:
    assert crc32c(b"123456789") == 0xE3069283


def test_journal_is_laid_out_as_described(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path, OsFiles(), segment_bytes=200)
    payload = np.array([1.5, -2.0], np.float32)
    journal.append([Entry(6, 77, 1234.5, b'{"a":1}', [payload])])
    journal.sync()
    journal.append([Entry(1, 78, 1235.5, b"x" * 100)])
    journal.sync()
    first = (tmp_path / f"{1:020}.log").read_bytes()
    salt = first[24:32]
    assert first[:40] == summed(b"KJSG" + struct.pack("<HHQQ", 1, 0, 1, 0) + salt + bytes(4))
    salted = crc32c(salt)
    content = b'{"a":1}' + payload.tobytes()
    header = b"KJRC" + struct.pack("<BBHQQdQQIII", 1, 6, 0, 1, 77, 1234.5, 0, 8, 7, crc32c(content, salted), 0)
    assert first[40:] == summed(header, salted) + content
    second = (tmp_path / f"{2:020}.log").read_bytes()
    assert second[24:32] != salt
    assert second[:24] == b"KJSG" + struct.pack("<HHQQ", 1, 0, 2, 1)
    assert struct.unpack_from("<Q", second, 40 + 32) == (1,), "record 1 was synced when record 2 was written"
    assert (tmp_path / "synced").read_bytes() == summed(b"KJSY" + struct.pack("<HHQI", 1, 0, 2, 0))


def test_headers_come_back() -> None:
    segment = SegmentHeader(5, 2, 99)
    assert records.parsed_segment(records.packed_segment(segment)) == segment
    record = RecordHeader(255, 2**64 - 1, 3, 0.25, 4, 2**40, 2**32 - 1, 7)
    packed = records.packed_record(record, segment.salt_sum)
    assert records.parsed_record(packed, segment.salt_sum) == record
    assert records.parsed_record(b"abc" + packed, segment.salt_sum, 3) == record
    assert records.parsed_record(packed, segment.salt_sum + 1) is None
    assert records.parsed_record(packed[:-1], segment.salt_sum) is None


def test_sum_of_a_large_payload_is_made_in_pieces_and_the_same() -> None:
    payload = np.random.default_rng(3).integers(0, 256, 9 << 20, np.uint8)
    whole = records.content_sum(b"", [payload], 5)
    assert whole == records.content_sum(payload[:1000].tobytes(), [payload[1000:]], 5)
    assert records.content_sum(b"12345", [np.frombuffer(b"6789", np.uint8)], 0) == 0xE3069283


@pytest.mark.parametrize("at", range(records.MARK_BYTES))
def test_mark_that_is_not_whole_claims_nothing(at: int) -> None:
    raw = bytearray(records.packed_mark(12))
    assert records.parsed_mark(bytes(raw)) == 12
    assert records.parsed_mark(bytes(raw[:at])) == 0
    raw[at] ^= 16
    assert records.parsed_mark(bytes(raw)) == 0


def test_journal_of_a_newer_version_is_refused_by_its_version(tmp_path: Path) -> None:
    raw = summed(b"KJSG" + struct.pack("<HHQQQI", 2, 0, 1, 0, 5, 0))
    (tmp_path / f"{1:020}.log").write_bytes(raw)
    with pytest.raises(StorageError, match="is of version 2 of the format, and this is of 1: use the newer server"):
        Journal.open(tmp_path, OsFiles(), segment_bytes=200)
