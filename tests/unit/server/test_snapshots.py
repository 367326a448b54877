"""Snapshots and their wire forms: whole, shared by readers at the same time, and let go afterwards."""

import gc
import weakref

import numpy as np
import pytest

from kedge.wire.codec import FlatDecoder, decode_chunk
from kedge_server.engine.snapshots import Encoding, Snapshot

FAST = (np.arange(300_000, dtype=np.float32), np.arange(7, dtype=np.float32))
SLOW = tuple(-part for part in FAST)


def snapshot() -> Snapshot:
    return Snapshot(3, 1, FAST, SLOW)


def read(encoding: Encoding) -> list[bytes]:
    return list(encoding.messages())


def decoded(encoding: Encoding, messages: list[bytes], count: int) -> np.ndarray:
    out = np.empty(count, np.float32)
    decoder = FlatDecoder(out, dtype="float32", size_bytes=encoding.size_bytes)
    for message in messages:
        decoder.add(decode_chunk(message))
    decoder.finish(encoding.crc32c)
    return out


@pytest.mark.parametrize(
    ("weights", "parts"), [("fast", FAST), ("slow", SLOW), ("fast_and_slow", (*FAST, *SLOW))], ids=str
)
def test_form_holds_the_weights_in_order(weights: str, parts: tuple[np.ndarray, ...]) -> None:
    expected = np.concatenate(parts)
    encoding = snapshot().encoding(weights, "float32")
    np.testing.assert_array_equal(decoded(encoding, read(encoding), expected.size), expected)


def test_readers_at_the_same_time_get_the_same_bytes_wherever_they_are() -> None:
    one = snapshot()
    first = one.encoding("fast", "float32")
    ahead = first.messages()
    begun = [next(ahead)]
    second = one.encoding("fast", "float32")
    late = read(second)  # overtakes the first reader
    begun += ahead
    assert [len(decode_chunk(message).data) for message in late] == [
        64 << 10,
        (1 << 20) - (64 << 10),
        4 * 300_007 - (1 << 20),
    ]
    assert all(a is b for a, b in zip(begun, late, strict=True))
    assert first.crc32c == second.crc32c


def test_reader_that_stops_midway_harms_no_other() -> None:
    one = snapshot()
    encoding = one.encoding("fast", "float32")
    stopped = encoding.messages()
    next(stopped)
    stopped.close()
    np.testing.assert_array_equal(decoded(encoding, read(encoding), 300_007), np.concatenate(FAST))


def test_form_is_let_go_when_nobody_reads_it() -> None:
    one = snapshot()
    encoding = one.encoding("fast", "bfloat16")
    read(encoding)
    alive = weakref.ref(encoding)
    del encoding
    gc.collect()
    assert alive() is None


def test_first_chunk_is_no_larger_than_the_window_that_a_reader_opens_with() -> None:
    encoding = snapshot().encoding("fast", "float32")
    assert len(decode_chunk(next(encoding.messages())).data) == 64 << 10


@pytest.mark.parametrize(
    ("count", "message_count"),
    [(1, 1), ((64 << 10) // 4, 1), ((64 << 10) // 4 + 1, 1), ((1 << 20) // 4, 1), ((1 << 20) // 4 + 1, 3)],
)
def test_weights_that_fit_into_one_chunk_come_in_one_message(count: int, message_count: int) -> None:
    weights = np.arange(count, dtype=np.float32)
    encoding = Snapshot(0, 0, (weights,), None).encoding("fast", "float32")
    messages = read(encoding)
    assert len(messages) == message_count
    np.testing.assert_array_equal(decoded(encoding, messages, count), weights)


LARGE = np.arange((40 << 20) // 4, dtype=np.float32)
"""More than the messages that are kept: 40 MiB."""


def test_reader_far_behind_another_gets_the_same_bytes() -> None:
    encoding = Snapshot(0, 0, (LARGE,), None).encoding("fast", "float32")
    late = encoding.messages()
    begun = [next(late)]
    ahead = read(encoding)
    assert [*begun, *late] == ahead
    np.testing.assert_array_equal(decoded(encoding, ahead, LARGE.size), LARGE)


def test_readers_that_go_along_with_each_other_share_their_messages() -> None:
    encoding = Snapshot(0, 0, (LARGE,), None).encoding("fast", "float32")
    for one, other in zip(encoding.messages(), encoding.messages(), strict=True):
        assert one is other


def test_reader_that_begins_when_another_has_ended_gets_the_same_bytes() -> None:
    encoding = Snapshot(0, 0, (LARGE,), None).encoding("fast", "bfloat16")
    first = read(encoding)
    crc32c = encoding.crc32c
    assert read(encoding) == first
    assert encoding.crc32c == crc32c


def test_held_bytes_are_the_weights_and_the_last_messages() -> None:
    encoding = Snapshot(0, 0, (LARGE,), None).encoding("fast", "float32")
    assert encoding.held_bytes == LARGE.nbytes
    messages = encoding.messages()
    first = next(messages)
    assert encoding.held_bytes == LARGE.nbytes + len(first)
    rest = list(messages)
    assert encoding.held_bytes == LARGE.nbytes + sum(map(len, rest[-16:]))


def test_weights_are_let_go_with_the_form() -> None:
    weights = np.arange(300_000, dtype=np.float32)
    alive = weakref.ref(weights)
    encoding = Snapshot(0, 0, (weights,), None).encoding("fast", "float32")
    del weights
    read(encoding)
    assert alive() is not None
    del encoding
    assert alive() is None
