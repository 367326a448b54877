"""Reading records of compressed gradients: what they mean, in whatever chunks they come, and what is refused.

The oracle is `plain_records`; the bytes are made here, by `struct`.
"""

import struct
from collections.abc import Sequence

import google_crc32c
import numpy as np
import plain_records
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kedge import optim
from kedge.errors import KedgeError
from kedge.wire.codec import Chunk, decode_chunk
from kedge.wire.compressed import RecordEncoder, check_safe, decoded, gradient_decoder

DTYPES = ["int8", "sign", "top_k"]


@st.composite
def streams(draw: st.DrawFn) -> tuple[str, int, bytes, int]:
    """A dtype, an element count, the records and the length of one."""
    dtype, count = draw(st.sampled_from(DTYPES)), draw(st.sampled_from([1, 7, 8, 1023, 1024, 1025, 3000]))
    random = np.random.default_rng(draw(st.integers(0, 1000)))
    if dtype == "top_k":
        indices = np.flatnonzero(random.random(count) < draw(st.sampled_from([0.0, 0.01, 0.5, 1.0])))
        return dtype, count, b"".join(struct.pack("<If", at, random.normal()) for at in indices), 8
    data = b""
    for begin in range(0, count, 1024):
        size = min(1024, count - begin)
        data += struct.pack("<f", random.normal() * 10.0 ** random.integers(-30, 20))
        data += int8_body(random, size) if dtype == "int8" else sign_body(random, size)
    return dtype, count, data, 1028 if dtype == "int8" else 132


def int8_body(random: np.random.Generator, size: int) -> bytes:
    return random.integers(-127, 128, size).astype(np.int8).tobytes()


def sign_body(random: np.random.Generator, size: int) -> bytes:
    return int("0" + "".join(map(str, random.integers(0, 2, size))), 2).to_bytes((size + 7) // 8, "little")


def chunks(data: bytes, record: int, lengths: Sequence[int]) -> list[Chunk]:
    """The data in chunks of so many records, over and over."""
    out, at = [], 0
    while at < len(data):
        size = record * lengths[len(out) % len(lengths)]
        out.append(Chunk(at, memoryview(data[at : at + size])))
        at += size
    return out


def read(dtype: str, count: int, given_chunks: Sequence[Chunk], size_bytes: int, crc: int | None = None) -> np.ndarray:
    out = np.full(count, np.nan, np.float32)
    decoder = gradient_decoder(out, dtype=dtype, size_bytes=size_bytes)
    pieces = [piece for chunk in given_chunks for piece in decoder.pieces(chunk)]
    data = b"".join(chunk.data for chunk in given_chunks)
    decoder.finish(google_crc32c.value(data) if crc is None else crc)
    pieces += decoder.rest()
    got = np.concatenate([np.zeros(0, np.float32), *pieces])
    assert got.tobytes() == out.tobytes(), "the pieces are the whole, in order"
    return out


@given(streams(), st.lists(st.integers(1, 5), min_size=1, max_size=3))
@settings(deadline=None, max_examples=60)
def test_records_mean_the_same_in_whatever_chunks_they_come(stream, lengths):
    dtype, count, data, record = stream
    want = [float(np.float32(float(value))) for value in plain_records.read(data, dtype, count)]
    assert read(dtype, count, chunks(data, record, lengths), len(data)).tolist() == want
    assert decoded(np.frombuffer(data, np.uint8), dtype, count).tolist() == want


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_records_travel_in_chunks_of_whole_ones(dtype):
    random, count = np.random.default_rng(0), 2_500_000
    if dtype == "top_k":
        records = np.empty(count // 10, [("index", "<u4"), ("value", "<f4")])
        records["index"], records["value"] = np.arange(0, count, 10), random.normal(size=count // 10)
        data = records.tobytes()
        want = np.zeros(count)
        want[::10] = records["value"]
    else:
        size = 1028 if dtype == "int8" else 132
        whole = random.integers(0, 128, (count // 1024, size)).astype(np.uint8)
        whole[:, :4] = np.frombuffer(struct.pack("<f", 0.5), np.uint8)
        last = np.zeros(4 + (count % 1024 if dtype == "int8" else (count % 1024 + 7) // 8), np.uint8)
        data = whole.tobytes() + last.tobytes()
        body = whole[:, 4:]
        signs = 1 - 2.0 * np.unpackbits(body, axis=1, bitorder="little")
        want = np.concatenate([(body if dtype == "int8" else signs).reshape(-1) * 0.5, np.zeros(count % 1024)])
    encoder = RecordEncoder([np.frombuffer(data, np.uint8)], dtype)
    sent = [decode_chunk(message) for message in encoder]
    assert len(sent) > 2
    assert encoder.size_bytes == len(data)
    assert b"".join(chunk.data for chunk in sent) == data
    assert max(len(chunk.data) for chunk in sent) <= 1 << 20
    assert read(dtype, count, sent, len(data), encoder.crc32c).tolist() == want.tolist()


TOP_K = [struct.pack("<If", at, 1.0) for at in range(12)]
INT8 = struct.pack("<f", 1.0) + bytes(1024)
INT8_TAIL = struct.pack("<f", 1.0) + bytes(10)
SIGN_TAIL = struct.pack("<f", 1.0) + bytes(2)


def cut(data: bytes, *at: int) -> list[Chunk]:
    ends = [*at, len(data)]
    return [Chunk(begin, memoryview(data[begin:end])) for begin, end in zip([0, *at], ends, strict=True)]


@pytest.mark.parametrize(
    ("dtype", "count", "size_bytes"),
    [
        ("int8", 10, 13),
        ("int8", 1034, 1034 + 4),
        ("int8", 1024, 1024 + 8),
        ("sign", 10, 7),
        ("sign", 1034, 132 + 4 + 3),
        ("top_k", 10, 81),
        ("top_k", 10, 88),
        ("int8", 10, 0),
        ("int8", 10, 1 << 62),
    ],
)
def test_size_that_cannot_be_that_of_the_elements_is_refused(dtype, count, size_bytes):
    with pytest.raises(KedgeError) as caught:
        gradient_decoder(np.empty(count, np.float32), dtype=dtype, size_bytes=size_bytes)
    assert caught.value.reason == "SIZE_MISMATCH"
    assert caught.value.metadata["got"] == str(size_bytes)


@pytest.mark.parametrize(
    ("dtype", "count", "given_chunks", "reason"),
    [
        ("int8", 1034, cut(INT8 + INT8_TAIL, 512), "CHUNK_MISALIGNED"),
        ("int8", 1034, cut(INT8 + INT8_TAIL, 1028, 1032), "CHUNK_MISALIGNED"),
        ("int8", 1034, [Chunk(0, memoryview(b""))], "CHUNK_MISALIGNED"),
        ("sign", 1034, cut(bytes(132) + SIGN_TAIL, 131), "CHUNK_MISALIGNED"),
        ("top_k", 12, cut(b"".join(TOP_K[:2]), 4), "CHUNK_MISALIGNED"),
        ("int8", 1034, [Chunk(1028, memoryview(INT8_TAIL))], "CHUNK_GAP"),
        ("int8", 2058, [*cut(INT8), *cut(INT8)], "CHUNK_OVERLAP"),
        ("int8", 1034, [*cut(INT8), Chunk(1028, memoryview(INT8))], "CHUNK_OUT_OF_RANGE"),
        ("int8", 10, cut(struct.pack("<f", 1.0) + bytes([1, 2, 128, 0, 0, 0, 0, 0, 0, 0])), "MALFORMED_MESSAGE"),
        ("sign", 10, cut(struct.pack("<f", 1.0) + bytes([255, 0b100])), "MALFORMED_MESSAGE"),
        ("sign", 9, cut(struct.pack("<f", 1.0) + bytes([255, 0b10000000])), "MALFORMED_MESSAGE"),
        ("top_k", 12, cut(TOP_K[3] + TOP_K[2]), "MALFORMED_MESSAGE"),
        ("top_k", 12, cut(TOP_K[3] + TOP_K[3]), "MALFORMED_MESSAGE"),
        ("top_k", 12, cut(TOP_K[3] + TOP_K[3], 8), "MALFORMED_MESSAGE"),
        ("top_k", 12, cut(TOP_K[3] + TOP_K[1], 8), "MALFORMED_MESSAGE"),
        ("top_k", 11, cut(TOP_K[3] + TOP_K[11]), "MALFORMED_MESSAGE"),
        ("top_k", 11, cut(struct.pack("<If", (1 << 32) - 1, 1.0)), "MALFORMED_MESSAGE"),
    ],
)
def test_records_that_no_encoder_makes_are_refused(dtype, count, given_chunks, reason):
    size_bytes = {
        "int8": count + 4 * -(-count // 1024),
        "sign": count // 1024 * 132 + (4 + (count % 1024 + 7) // 8),
        "top_k": sum(len(chunk.data) for chunk in given_chunks),
    }[dtype]
    with pytest.raises(KedgeError) as caught:
        read(dtype, count, given_chunks, size_bytes)
    assert caught.value.reason == reason


@pytest.mark.parametrize(("dtype", "data"), [("int8", INT8), ("top_k", TOP_K[0]), ("sign", bytes(132))])
def test_stream_that_is_not_whole_or_not_what_was_sent_is_refused(dtype, data):
    size_bytes = 2 * len(data)
    with pytest.raises(KedgeError) as caught:
        read(dtype, 2048, cut(data), size_bytes)
    assert caught.value.reason == "SIZE_MISMATCH"
    with pytest.raises(KedgeError) as caught:
        read(dtype, 1024, cut(data), len(data), crc=1)
    assert caught.value.reason == "CHECKSUM_MISMATCH"


@pytest.mark.parametrize("element_count", [(1 << 32) + 1, 1 << 33])
def test_top_k_is_refused_where_its_indices_are_too_short(element_count):
    out = np.broadcast_to(np.float32(0), element_count)
    with pytest.raises(KedgeError) as caught:
        gradient_decoder(out, dtype="top_k", size_bytes=8)
    assert caught.value.reason == "UNSUPPORTED_DTYPE"


@pytest.mark.parametrize("scale", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["int8", "sign"])
def test_scale_that_is_not_finite_makes_all_its_elements_so(dtype, scale):
    body = bytes([0, 1, 2]) + bytes(7) if dtype == "int8" else bytes(2)
    data = struct.pack("<f", scale) + body
    with np.errstate(all="raise"):
        values = read(dtype, 10, cut(data), len(data))
    assert not np.isfinite(values).any()


UNSAFE = [
    optim.AdaBelief(),
    optim.Lookahead(optim.AdaBelief(lr=0.1)),
    optim.Optax("adabelief"),
    optim.Lookahead(optim.Optax("adabelief", b1=0.8)),
    optim.RMSprop(centered=True),
    optim.Optax("rmsprop", centered=True),
]
SAFE = [
    optim.AdaBelief(max_direction=10.0),
    optim.Lookahead(optim.AdaBelief(max_direction=0.5)),
    optim.Optax("adam"),
    optim.Optax("rmsprop"),
    optim.RMSprop(),
    optim.SGD(),
]


@pytest.mark.parametrize("optimizer", UNSAFE, ids=repr)
def test_signs_are_refused_for_what_divides_by_how_much_gradients_vary(optimizer):
    with pytest.raises(KedgeError) as caught:
        check_safe(optimizer, "sign")
    assert caught.value.reason == "COMPRESSION_UNSAFE"
    assert caught.value.metadata["wire_dtype"] == "sign"
    assert "max_direction" in caught.value.message
    for dtype in ("int8", "top_k", "float32"):
        check_safe(optimizer, dtype)


@pytest.mark.parametrize("optimizer", SAFE, ids=repr)
def test_signs_are_taken_elsewhere(optimizer):
    check_safe(optimizer, "sign")
