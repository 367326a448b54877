"""What comes to a port that speaks no HTTP/2, or speaks it badly: the bytes of one connection each."""

import contextlib
import random
import ssl
import struct
from collections.abc import Callable

from crowd import SERVICE, frame, message, request_headers

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _WINDOW_UPDATE, _CONTINUATION = 0, 1, 3, 4, 6, 8, 9
_END_STREAM = _ACK = 1
_END_HEADERS = 4
_PADDED = 8
_GREETING = PREFACE + frame(_SETTINGS, 0, 0)
_PULL = SERVICE + "PullWeights"
_BOUNDARIES = (0, 1, 2, 16383, 16384, 65535, (1 << 24) - 1, (1 << 31) - 1, 1 << 31, (1 << 32) - 1)

Assault = Callable[[random.Random], bytes]


def garbage(rng: random.Random) -> bytes:
    """Random bytes."""
    return rng.randbytes(int(2 ** rng.uniform(0, 11)))


def _hello() -> bytes:
    """What a client of TLS says first."""
    context, said = ssl.create_default_context(), ssl.MemoryBIO()
    context.set_alpn_protocols(["h2"])
    with contextlib.suppress(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), said, server_hostname="localhost").do_handshake()
    return said.read()


_HELLO = _hello()


def tls_hello(rng: random.Random) -> bytes:
    """What a client says first, with bytes replaced and the end cut off, or a record of random bytes."""
    if rng.random() < 0.5:
        raw = bytearray(_HELLO)
        for _ in range(rng.randint(0, 4)):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
        return bytes(raw[: rng.choice((len(raw), rng.randint(1, len(raw))))])
    body = rng.randbytes(rng.randrange(300))
    length = rng.choice((len(body), len(body), 0, 0xFFFF))
    hello = b"\x01" + struct.pack(">I", rng.choice((len(body), 0, 0xFFFFFF)))[1:] + body
    return b"\x16\x03" + rng.choice((b"\x01", b"\x03", b"\x00", b"\xff")) + struct.pack(">H", length) + hello


def http_1(rng: random.Random) -> bytes:
    """HTTP of another version."""
    method, version = rng.choice((b"GET", b"POST", b"PRI", b"X" * 3000)), rng.choice((b"1.1", b"1.0", b"2.0", b"9"))
    fields = b"".join(b"a%d: %s\r\n" % (number, b"x" * rng.randrange(200)) for number in range(rng.randrange(20)))
    path = rng.randbytes(rng.randrange(20)).hex().encode()
    return b"%s /%s HTTP/%s\r\n%s\r\n" % (method, path, version, fields)


def bad_preface(rng: random.Random) -> bytes:
    """A preface with something wrong, or cut."""
    raw = bytearray(_GREETING)
    raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    return bytes(raw[: rng.randrange(1, len(raw) + 1)]) + rng.choice((b"", _GREETING))


def bad_lengths(rng: random.Random) -> bytes:
    """Frames whose length is not that of their payload, or not one of their kind."""
    payload = rng.randbytes(rng.randrange(64))
    raw = frame(rng.randrange(12), rng.randrange(256), rng.randrange(4), payload)
    length = rng.choice((*_BOUNDARIES, len(payload) + 1)) & 0xFFFFFF
    return _GREETING + struct.pack(">I", length)[1:] + raw[3:]


def random_frames(rng: random.Random) -> bytes:
    """Frames of any kind on any stream, after a call has begun."""
    frames = [
        frame(rng.randrange(12), rng.choice((0, 1, 4, 5, 8, 32, 255)), rng.choice((0, 1, 2, 3, 1 << 31)), _payload(rng))
        for _ in range(rng.randint(1, 12))
    ]
    return _GREETING + request_headers(1, _PULL) + b"".join(frames)


def _payload(rng: random.Random) -> bytes:
    return rng.choice((rng.randbytes(rng.randrange(40)), rng.randbytes(4), rng.randbytes(8), bytes(8)))


def endless_headers(rng: random.Random) -> bytes:
    """HEADERS whose end never comes, and CONTINUATION after CONTINUATION."""
    begin = frame(_HEADERS, rng.choice((0, _END_STREAM)), 1, b"\x83\x86")
    pieces = rng.choice((0, 1, 10, 200))
    stream = rng.choice((1, 1, 1, 3, 0))
    return _GREETING + begin + frame(_CONTINUATION, 0, stream, rng.choice((b"", b"\x00\x01a\x01b"))) * pieces


def flood_of_settings(rng: random.Random) -> bytes:
    """SETTINGS, with settings that mean the worst, or PINGs, none of whose answers is read."""
    if rng.random() < 0.5:
        return _GREETING + frame(_PING, 0, 0, bytes(8)) * rng.choice((1, 100, 1000))
    values = [struct.pack(">HI", rng.randrange(8), rng.choice(_BOUNDARIES)) for _ in range(rng.randint(1, 5))]
    return _GREETING + frame(_SETTINGS, 0, 0, b"".join(values)) * rng.choice((1, 10, 300))


def rapid_reset(rng: random.Random) -> bytes:
    """Calls that are cancelled as soon as they have begun."""
    calls = (
        request_headers(stream, _PULL) + frame(_RST_STREAM, 0, stream, struct.pack(">I", 8))
        for stream in range(1, 2 * rng.choice((1, 10, 60)), 2)
    )
    return _GREETING + b"".join(calls)


def huge_headers(rng: random.Random) -> bytes:
    """More of headers than a server takes, in fields or in numbers of them."""
    size, count = rng.choice(((100, 1), (8000, 1), (8000, 4), (1, 4000), (120, 120)))
    block = b"\x83\x86" + (b"\x00\x01x" + _integer(size) + b"v" * size) * count
    pieces = [block[at : at + 16384] for at in range(0, len(block), 16384)]
    kinds = [_HEADERS, *[_CONTINUATION] * (len(pieces) - 1)]
    flags = [*[0] * (len(pieces) - 1), _END_HEADERS]
    return _GREETING + b"".join(frame(*each[:2], 1, each[2]) for each in zip(kinds, flags, pieces, strict=True))


def hpack_bomb(rng: random.Random) -> bytes:
    """A large field that is told once and referred to ever after, broken indices, and Huffman codes of none."""
    size = rng.choice((100, 3000))
    entry = b"\x40\x01x" + _integer(size) + b"v" * size
    reference = rng.choice((b"\xbe", b"\xff\xff\xff\xff\x7f", b"\x3f\xe1\xff\xff\x07"))
    block = b"\x83\x86" + entry + reference * rng.choice((1, 4000))
    if rng.random() < 0.3:
        block = b"\x83\x86\x04\xff" + rng.randbytes(rng.randrange(200))
    return _GREETING + frame(_HEADERS, _END_HEADERS, 1, block[:16384])


def window_tricks(rng: random.Random) -> bytes:
    """Windows that overflow, shrink or stay shut, and more data than they allow."""
    shut = PREFACE + frame(_SETTINGS, 0, 0, struct.pack(">HI", 4, rng.choice((0, 1, (1 << 31) - 1, 1 << 31))))
    update = struct.pack(">I", rng.choice(_BOUNDARIES))
    grow = frame(_WINDOW_UPDATE, 0, rng.choice((0, 1, 5)), update) * rng.choice((1, 3, 50))
    data = frame(_DATA, rng.choice((0, _END_STREAM, _PADDED)), 1, bytes(16384)) * rng.choice((0, 0, 1, 5))
    return shut + request_headers(1, _PULL) + grow + data


def lying_messages(rng: random.Random) -> bytes:
    """Messages of gRPC that say that they are compressed, or of another length, and headers that are not gRPC's."""
    head = struct.pack(">BI", rng.choice((0, 1, 2, 255)), rng.choice(_BOUNDARIES))
    data = head + rng.randbytes(rng.randrange(50))
    method = rng.choice((_PULL, SERVICE + "PushGradients", SERVICE + "None", "/", "x" * 120))
    ends = rng.choice((0, _END_STREAM))
    return _GREETING + request_headers(1, method) + frame(_DATA, ends, 1, rng.choice((data, message(data), data[:3])))


ASSAULTS: dict[str, Assault] = {
    "raw garbage": garbage,
    "TLS hellos": tls_hello,
    "HTTP/1": http_1,
    "broken prefaces": bad_preface,
    "frames with bad lengths": bad_lengths,
    "random frames": random_frames,
    "HEADERS without end": endless_headers,
    "SETTINGS and PING floods": flood_of_settings,
    "rapid resets": rapid_reset,
    "huge headers": huge_headers,
    "HPACK bombs": hpack_bomb,
    "window tricks": window_tricks,
    "lying messages": lying_messages,
}

BEFORE_TLS = ("raw garbage", "TLS hellos", "HTTP/1", "broken prefaces")
"""What a port of TLS takes for a bad handshake; the others come after a good one."""


def _integer(value: int) -> bytes:
    """The length of a text that is not compressed (RFC 7541, section 5.1)."""
    if value < 127:
        return bytes([value])
    rest, out = value - 127, b"\x7f"
    while rest >= 128:
        out += bytes([rest % 128 + 128])
        rest //= 128
    return out + bytes([rest])
