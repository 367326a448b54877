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


async def read(encoding: Encoding) -> list[bytes]:
    return [message async for message in encoding.messages()]


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
async def test_form_holds_the_weights_in_order(weights: str, parts: tuple[np.ndarray, ...]) -> None:
    expected = np.concatenate(parts)
    encoding = snapshot().encoding(weights, "float32")
    np.testing.assert_array_equal(decoded(encoding, await read(encoding), expected.size), expected)


async def test_readers_at_the_same_time_get_the_same_bytes_wherever_they_are() -> None:
    one = snapshot()
    first = one.encoding("fast", "float32")
    ahead = first.messages()
    begun = [await anext(ahead)]
    second = one.encoding("fast", "float32")
    late = await read(second)  # overtakes the first reader
    begun += [message async for message in ahead]
    assert len(late) == 2
    assert all(a is b for a, b in zip(begun, late, strict=True))
    assert first.crc32c == second.crc32c


async def test_reader_that_stops_midway_harms_no_other() -> None:
    one = snapshot()
    encoding = one.encoding("fast", "float32")
    stopped = encoding.messages()
    await anext(stopped)
    await stopped.aclose()
    np.testing.assert_array_equal(decoded(encoding, await read(encoding), 300_007), np.concatenate(FAST))


async def test_form_is_let_go_when_nobody_reads_it() -> None:
    one = snapshot()
    encoding = one.encoding("fast", "bfloat16")
    await read(encoding)
    alive = weakref.ref(encoding)
    del encoding
    gc.collect()
    assert alive() is None
