"""What the server reads of disks, written by people or by itself."""

from collections.abc import Callable
from pathlib import Path

import google_crc32c
import numpy as np

from kedge import policies
from kedge_server import config
from kedge_server.core.commits import ArraySpec, Created, Joined
from kedge_server.core.stored import CheckpointInfo
from kedge_server.security.access import parse_uri
from kedge_server.security.tokens import parse_tokens
from kedge_server.storage import contents, plain, records
from kedge_server.storage.errors import StorageError
from kedge_server.storage.segments import Segment, SegmentReader

from .decoder import CONFIG, ELEMENTS, GROUPS, OPTIMIZERS, POLICIES, SCHEDULES, VALUES, Decoder, Refused


class _InMemory:
    """A file of a journal, and the file system that has it."""

    def __init__(self, raw: bytes) -> None:
        self._raw = np.frombuffer(raw, np.uint8)

    def open(self, _: Path) -> "_InMemory":
        return self

    def close(self) -> None:
        pass

    def read_into(self, offset: int, buffer: np.ndarray) -> int:
        piece = self._raw[offset : offset + len(buffer)]
        buffer[: len(piece)] = piece
        return len(piece)


def _segment(count: int = 3) -> bytes:
    header = records.SegmentHeader(1, 0, 77)
    raw = records.packed_segment(header)
    for index in range(1, count + 1):
        body, payload = plain.encode(Joined("w", index, 60.0)), VALUES[:9].view(np.uint8)
        content_sum = records.content_sum(body, [payload], header.salt_sum)
        record = records.RecordHeader(1, index, index, 1.5, 0, payload.size, len(body), content_sum)
        raw += records.packed_record(record, header.salt_sum) + body + payload.tobytes()
    return raw


def _mended(raw: bytes) -> bytes:
    """The input with the sums of its segment's and its first record's header put right: a lie that is well signed."""
    data = bytearray(raw)
    _sign(data, 0, records.SEGMENT_BYTES, 0)
    salt_sum = google_crc32c.value(bytes(data[24:32]))
    _sign(data, records.SEGMENT_BYTES, records.SEGMENT_BYTES + records.RECORD_BYTES, salt_sum)
    return bytes(data)


def _sign(data: bytearray, begin: int, end: int, start: int) -> None:
    if len(data) >= end:
        data[end - 4 : end] = google_crc32c.extend(start, bytes(data[begin : end - 4])).to_bytes(4, "little")


def _read_segment(raw: bytes) -> None:
    found = 0
    for content in (raw, _mended(raw)):
        header = records.parsed_segment(content)
        if not isinstance(header, records.SegmentHeader):
            continue
        segment = Segment(Path("1.log"), header, len(content))
        with SegmentReader(_InMemory(content), segment) as reader:
            while reader.read() is not None:
                found += 1
            list(reader.headers_after())
            reader.sum_of(3)
    if not found:
        raise Refused


def _contents() -> bytes:
    info = CheckpointInfo("4-8", 4, 8, 1.5, 100, {"loss": 0.5})
    files = (contents.FileEntry("state/a", 10, 7),)
    return contents.encode(contents.Contents(info, files, (contents.array_entry("fast", VALUES),)))


def _sealed(raw: bytes) -> None:
    """As it comes, and with its checksum put right."""
    try:
        contents.decode(raw)
    except ValueError:
        contents.decode(contents.seal(raw.rpartition(b"\ncrc32c")[0]))


_STORED = [
    plain.encode(value)
    for value in (
        Joined("w", 3, 60.0),
        Created(CONFIG, POLICIES[0], policies.Admission(), (ArraySpec("weights", "float32", (ELEMENTS,)),)),
        *OPTIMIZERS,
        *SCHEDULES,
        *POLICIES,
        GROUPS,
        {1: (b"\0\xff", [1.5, None])},
    )
]


def _load(directory: Path) -> Callable[[bytes], object]:
    path = directory / "kedge.toml"

    def load(raw: bytes) -> object:
        path.write_bytes(raw)
        return config.load(path)

    return load


_TOML = b"""[server]
listen = "127.0.0.1:50051"
insecure = false
grace_seconds = 3.5
[limits]
staging_bytes = 1048576
[device]
count = "all"
[log]
format = "json"
"""
_TOKENS = b"# a comment\nalice:admin:" + b"0a" * 32 + b"\nbob:worker:digits,exp-*:" + b"1b" * 32 + b"\n"


def kept(directory: Path) -> dict[str, Decoder]:
    """What is read from disks, by people's hands or by the server's own."""
    return {
        "journal": Decoder(_read_segment, [_segment(), _segment(1)], (Refused,)),
        "journal's mark": Decoder(records.parsed_mark, [records.packed_mark(12)], ()),
        "stored values": Decoder(plain.decode, _STORED, (StorageError,)),
        "checkpoint's manifest": Decoder(_sealed, [_contents()], (ValueError,)),
        "tokens": Decoder(lambda raw: parse_tokens(raw.decode("utf-8-sig", "replace")), [_TOKENS], (ValueError,)),
        "certificate's URI": Decoder(
            lambda raw: parse_uri(raw.decode("utf-8", "replace")), [b"kedge://a/worker/x-*", b"kedge://a/admin"], ()
        ),
        "configuration": Decoder(_load(directory), [_TOML], (config.ConfigError,)),
    }
