"""Calls whose headers no gRPC client would send, many at once on one connection, and which of them were answered."""

from collections.abc import Sequence

from crowd import Connection, frame, message, request_headers

Header = tuple[bytes, bytes]

_DATA, _HEADERS = 0, 1
_END_STREAM, _END_HEADERS = 1, 4
_FRAME_HEAD_BYTES = 9


class _Caller(Connection):
    """Notes which streams have brought a message back."""

    def __init__(self, address: str) -> None:
        super().__init__(address)
        self.answered_streams: set[int] = set()

    def call(self, stream: int, path: str, headers: Sequence[Header]) -> None:
        """Makes a call with an empty message."""
        block = request_headers(stream, path)[_FRAME_HEAD_BYTES:] + b"".join(_literal(*header) for header in headers)
        self.send(frame(_HEADERS, _END_HEADERS, stream, block) + frame(_DATA, _END_STREAM, stream, message(b"")))

    def _take(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        super()._take(kind, flags, stream, payload)
        if kind == _DATA and payload:
            self.answered_streams.add(stream)


def answered(address: str, path: str, calls: Sequence[Sequence[Header]]) -> list[bool]:
    """Makes calls, all at once, and waits until each has ended.

    Args:
        address: HOST:PORT.
        path: /package.Service/Method.
        calls: the headers of each, besides those that every call has; up to 16 KiB of them.

    Returns:
        Of each call whether a message came back. A call that is refused has none.
    """
    streams = {2 * number + 1 for number in range(len(calls))}
    caller = _Caller(address)
    try:
        caller.greet()
        for stream, headers in zip(sorted(streams), calls, strict=True):
            caller.call(stream, path, headers)
        while not streams <= caller.ended_streams:
            caller.receive()
            assert not caller.is_closed, "the server hung up"
        return [stream in caller.answered_streams for stream in sorted(streams)]
    finally:
        caller.close()


def _literal(name: bytes, value: bytes) -> bytes:
    """A header without an index and without compression (RFC 7541, section 6.2.2)."""
    return b"\x00" + _string(name) + _string(value)


def _string(text: bytes) -> bytes:
    """Its length, as integers are written there (section 5.1), and itself."""
    if len(text) < 127:
        return bytes([len(text)]) + text
    rest, length = len(text) - 127, b"\x7f"
    while rest >= 128:
        length += bytes([rest % 128 + 128])
        rest //= 128
    return length + bytes([rest]) + text
