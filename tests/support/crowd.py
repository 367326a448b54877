"""A crowd of peers that only stand in the way, in raw HTTP/2 on sockets: silent, idle, dribbling, never reading.

One thread moves all of them: it sends a byte here and a small chunk there once a second, answers the server's SETTINGS
and PINGs on the connections that are polite, and notes which streams the server has ended. It never opens a window.

Run as a script, with ADDRESS and RUN: the whole crowd, which says `gathered`, and goes when its input ends.
"""

import contextlib
import resource
import selectors
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, Self

from google.protobuf.duration_pb2 import Duration
from wire_client import WireClient, push_header

from kedge.v1 import optimizer_service_pb2 as pb
from kedge.v1 import tensor_pb2

DESCRIPTORS = 2048
"""What a process needs that is the crowd, or serves it."""

SERVICE = "/kedge.v1.OptimizerService/"

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _GOAWAY, _WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
_END_STREAM = _ACK = 1
_END_HEADERS = 4
_MAX_FRAME_BYTES = 1 << 14


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """An HTTP/2 frame (RFC 9113, section 4.1)."""
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def message(payload: bytes) -> bytes:
    """A message of gRPC: uncompressed, its length, its bytes."""
    return struct.pack(">BI", 0, len(payload)) + payload


def data_frames(stream: int, payload: bytes, *, ends: bool = False) -> bytes:
    """DATA frames of a payload."""
    at = range(0, len(payload), _MAX_FRAME_BYTES)
    frames = [frame(_DATA, 0, stream, payload[begin : begin + _MAX_FRAME_BYTES]) for begin in at]
    return b"".join(frames) + (frame(_DATA, _END_STREAM, stream) if ends else b"")


def request_headers(stream: int, method: str) -> bytes:
    """The HEADERS of a call: nothing compressed, nothing indexed but what the static table of RFC 7541 has."""
    fields = b"\x83\x86" + b"\x04" + _text(method) + b"\x01" + _text("kedge")
    fields += b"\x00" + _text("te") + _text("trailers") + b"\x00" + _text("content-type") + _text("application/grpc")
    return frame(_HEADERS, _END_HEADERS, stream, fields)


def _text(value: str) -> bytes:
    return bytes([len(value)]) + value.encode()


class Connection:
    """A client's end of one HTTP/2 connection."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self.socket = socket.create_connection((host, int(port)), timeout=30)
        self.ended_streams: set[int] = set()
        self.is_closed = False
        self._received = bytearray()
        self._next_stream = 1

    def greet(self) -> None:
        """Begins to speak HTTP/2."""
        self.send(_PREFACE + frame(_SETTINGS, 0, 0))

    def open(self, method: str, payload: bytes = b"", *, ends: bool = False) -> int:
        """Opens a stream."""
        stream, self._next_stream = self._next_stream, self._next_stream + 2
        self.send(request_headers(stream, method) + data_frames(stream, payload, ends=ends))
        return stream

    def send(self, payload: bytes) -> None:
        """Sends bytes, unless the server has closed the connection."""
        try:
            self.socket.sendall(payload)
        except OSError:
            self.is_closed = True

    def receive(self) -> None:
        """Takes what has come, and answers what has to be answered."""
        try:
            received = self.socket.recv(1 << 20)
        except OSError:
            received = b""
        self.is_closed = self.is_closed or not received
        self._received += received
        while len(self._received) >= 9 and len(self._received) >= 9 + (size := self._size()):
            kind, flags, stream = struct.unpack_from(">BBI", self._received, 3)
            self._take(kind, flags, stream, bytes(self._received[9 : 9 + size]))
            del self._received[: 9 + size]

    def _size(self) -> int:
        return int.from_bytes(self._received[:3], "big")

    def _take(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == _SETTINGS and not flags & _ACK:
            self.send(frame(_SETTINGS, _ACK, 0))
        elif kind == _PING and not flags & _ACK:
            self.send(frame(_PING, _ACK, 0, payload))
        elif kind == _RST_STREAM or (kind in (_DATA, _HEADERS) and flags & _END_STREAM):
            self.ended_streams.add(stream)

    def close(self) -> None:
        """Goes without a word."""
        self.socket.close()


class Crowd:
    """Peers of a server. Made and used from one thread; moved by another, until it is left."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._lock = threading.Lock()
        self._selector = selectors.DefaultSelector()
        self._connections: list[Connection] = []
        self._dribbles: list[Callable[[], None]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._move, daemon=True)
        self._thread.start()

    def connect(self, *, greets: bool = True, is_polite: bool = True) -> Connection:
        """A connection; one that is not polite is never read from."""
        connection = Connection(self._address)
        if greets:
            connection.greet()
        with self._lock:
            self._connections.append(connection)
            if is_polite:
                self._selector.register(connection.socket, selectors.EVENT_READ, connection)
        return connection

    def dribble(self, connection: Connection, pieces: Iterable[bytes]) -> None:
        """Sends a piece a second."""
        remaining = iter(pieces)

        def send_one() -> None:
            if (piece := next(remaining, None)) is not None:
                connection.send(piece)

        with self._lock:
            self._dribbles.append(send_one)

    def _move(self) -> None:
        dribble_at = time.monotonic()
        while not self._stop.is_set():
            for key, _ in self._selector.select(timeout=0.1):
                self._receive(key.data)
            if time.monotonic() >= dribble_at:
                dribble_at += 1
                with self._lock:
                    dribbles = list(self._dribbles)
                for send_one in dribbles:
                    send_one()

    def _receive(self, connection: Connection) -> None:
        connection.receive()
        if connection.is_closed:
            with self._lock, contextlib.suppress(KeyError):
                self._selector.unregister(connection.socket)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(timeout=10)
        self._selector.close()
        for connection in self._connections:
            connection.close()


def requests(*messages: Any) -> bytes:
    """Messages of protobuf as gRPC sends them."""
    return b"".join(message(one.SerializeToString()) for one in messages)


def silent_connections(crowd: Crowd, count: int) -> list[Connection]:
    """Connections that say nothing, and read nothing."""
    return [crowd.connect(greets=False, is_polite=False) for _ in range(count)]


def idle_streams(crowd: Crowd, count: int) -> list[Connection]:
    """Exchanges that never begin, a hundred on a connection."""
    connections = [crowd.connect() for _ in range(count // 100)]
    for connection in connections:
        for _ in range(100):
            connection.open(SERVICE + "Exchange")
    return connections


def reader(crowd: Crowd, run: str, *, is_polite: bool) -> Connection:
    """A pull that is never read; a polite one answers PINGs at least, the other leaves even its socket unread."""
    connection = crowd.connect(is_polite=is_polite)
    connection.open(SERVICE + "PullWeights", requests(pb.PullWeightsRequest(run=run)), ends=True)
    return connection


def openers(crowd: Crowd, count: int) -> list[Connection]:
    """Those that open a stream byte by byte."""
    connections = [crowd.connect() for _ in range(count)]
    for connection in connections:
        crowd.dribble(connection, [bytes([byte]) for byte in request_headers(1, SERVICE + "PushGradients")])
    return connections


def pushers(crowd: Crowd, count: int, header: pb.PushHeader) -> list[Connection]:
    """Those that push, byte by byte or in tiny chunks, some of them from the header on."""
    begin = requests(pb.PushGradientsRequest(header=header))
    connections = [crowd.connect() for _ in range(count)]
    for number, connection in enumerate(connections):
        stream = connection.open(SERVICE + "PushGradients", begin if number % 4 else b"")
        pieces = [bytes([byte]) for byte in message(bytes(100))] if number % 2 else _tiny_chunks()
        crowd.dribble(connection, [data_frames(stream, piece) for piece in pieces])
    return connections


def _tiny_chunks() -> list[bytes]:
    chunks = [tensor_pb2.Chunk(offset=offset, data=bytes(4)) for offset in range(0, 400, 4)]
    return [requests(pb.PushGradientsRequest(chunk=chunk)) for chunk in chunks]


def allow_descriptors(count: int) -> int:
    """Lets this process open so many, if it may. Returns how many it may open now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = count if hard == resource.RLIM_INFINITY else min(count, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, allowed), hard))
    return max(soft, allowed)


def main(address: str, run: str) -> None:
    """Gathers, says so, and goes when the input ends."""
    allow_descriptors(DESCRIPTORS)
    wire = WireClient(address)
    lease = wire.join(run, lease=Duration(seconds=3600))
    described = wire.run(run, full=True)
    header = push_header(lease, described.manifest.digest, size_bytes=4 * described.parameter_count)
    with Crowd(address) as crowd:
        silent_connections(crowd, 500)
        idle_streams(crowd, 500)
        for number in range(50):
            reader(crowd, run, is_polite=number % 2 == 0)
        openers(crowd, 10)
        pushers(crowd, 40, header)
        print("gathered", flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
