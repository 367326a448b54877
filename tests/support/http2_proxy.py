"""A proxy of HTTP/2 connections on loopback that loses answers, resets streams and sends requests twice.

TCP itself loses nothing and repeats nothing, so faults of single calls are made a layer above it, frame by frame:

- An answer is lost: its DATA frame is dropped, and the TCP connection is reset, as when a peer dies before it is sent.
- A stream is reset: RST_STREAM to both sides, before the request is through or before its answer is.
- A request is repeated: when its answer passes, the same DATA frames are sent to the server once more, and the answer
  to these is swallowed. Only streams that go on after their requests can be repeated: `Exchange`.

HEADERS are always passed on, since each changes what the following ones mean (HPACK, RFC 7541).
"""

import asyncio
import contextlib
import random
import socket
import struct
import threading
from collections import Counter
from types import TracebackType
from typing import NamedTuple, Self

_DATA, _RST_STREAM, _WINDOW_UPDATE = 0, 3, 8
_END_STREAM = 1
_REFUSED_STREAM = 7  # what gRPC calls UNAVAILABLE
_PREFACE_BYTES = 24
_NO_LINGER = struct.pack("ii", 1, 0)


class Shares(NamedTuple):
    """How often what happens."""

    lost: float
    """Of the answers."""
    reset: float
    """Of the requests, in half of the cases before the server has it."""
    repeated: float
    """Of the answers to streams that go on."""


class _Frame(NamedTuple):
    kind: int
    flags: int
    stream: int
    raw: bytes

    @property
    def is_data(self) -> bool:
        return self.kind == _DATA

    @property
    def payload_size(self) -> int:
        return len(self.raw) - 9


class _Stream:
    """What is known of one stream."""

    def __init__(self) -> None:
        self.request: list[bytes] = []
        """The frames since the last answer."""
        self.is_dead = False
        self.is_repeating = False
        self.held: list[bytes] = []
        """Of the next request, until the repeated one is answered."""
        self.goes_on = True


class _Link:
    """A connection of a client, and the one to the server that is made for it."""

    def __init__(
        self, client: asyncio.StreamWriter, server: asyncio.StreamWriter, shares: Shares, dice: random.Random
    ) -> None:
        self.client, self.server = client, server
        self._shares, self._dice = shares, dice
        self._streams: dict[int, _Stream] = {}
        self.counts: Counter[str] = Counter()

    def on_request(self, frame: _Frame) -> None:
        """A frame from the client."""
        stream = self._streams.setdefault(frame.stream, _Stream())
        if frame.is_data and frame.flags & _END_STREAM:
            stream.goes_on = False
        if not frame.is_data or not frame.payload_size:
            self.server.write(frame.raw)
            return
        if stream.is_dead:
            self._credit(self.client, frame, is_stream_open=False)
            return
        is_new = not stream.request
        stream.request.append(frame.raw)
        if is_new and self._dice.random() < self._shares.reset:
            self._reset(frame, stream)
        elif stream.is_repeating:
            stream.held.append(frame.raw)
        else:
            self.server.write(frame.raw)

    def on_answer(self, frame: _Frame) -> None:
        """A frame from the server."""
        stream = self._streams.setdefault(frame.stream, _Stream())
        if not frame.is_data or not frame.payload_size:
            self.client.write(frame.raw)
            return
        if stream.is_dead or stream.is_repeating:
            self._credit(self.server, frame, is_stream_open=not stream.is_dead)
            self._end_repetition(stream)
            return
        self.counts["answers"] += 1
        if self._dice.random() < self._shares.lost:
            self.counts["lost"] += 1
            self.abort()
            return
        self.client.write(frame.raw)
        request, stream.request = stream.request, []
        if request and stream.goes_on and self._dice.random() < self._shares.repeated:
            self.counts["repeated"] += 1
            stream.is_repeating = True
            self.server.writelines(request)

    def abort(self) -> None:
        """Resets both connections."""
        for end in (self.client, self.server):
            with contextlib.suppress(OSError):  # it may be closed by now
                end.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
            end.transport.abort()

    def _reset(self, frame: _Frame, stream: _Stream) -> None:
        self.counts["reset"] += 1
        stream.is_dead = True
        if self._dice.random() < 0.5:
            self.server.write(frame.raw)
            self.counts["reset with the request"] += 1
        else:
            self._credit(self.client, frame, is_stream_open=False)
        for end in (self.client, self.server):
            end.write(_frame(_RST_STREAM, frame.stream, _REFUSED_STREAM))

    def _end_repetition(self, stream: _Stream) -> None:
        stream.is_repeating = False
        if not stream.is_dead:
            self.server.writelines(stream.held)
        stream.held.clear()

    def _credit(self, sender: asyncio.StreamWriter, frame: _Frame, *, is_stream_open: bool) -> None:
        """Gives the sender back the room in its window that a dropped frame took."""
        sender.write(_frame(_WINDOW_UPDATE, 0, frame.payload_size))
        if is_stream_open:
            sender.write(_frame(_WINDOW_UPDATE, frame.stream, frame.payload_size))


class Http2Proxy:
    """Forwards to `target` (HOST:PORT) from a free port.

    Args:
        target: the server.
        shares: how often what happens.
        seed: of the dice.

    Attributes:
        counts: "answers" seen, and of these "lost"; "reset" and "repeated".
    """

    def __init__(self, target: str, shares: Shares, *, seed: int) -> None:
        host, _, port = target.rpartition(":")
        self._target, self._shares, self._dice = (host, int(port)), shares, random.Random(seed)
        self._links: set[_Link] = set()
        self.counts: Counter[str] = Counter()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        listening = asyncio.run_coroutine_threadsafe(asyncio.start_server(self._serve, "127.0.0.1", 0), self._loop)
        self._server = listening.result(10)
        self.address = "{}:{}".format(*self._server.sockets[0].getsockname())

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.CancelledError):  # asyncio would log it when the proxy is closed
            try:
                server_reader, server_writer = await asyncio.open_connection(*self._target)
            except OSError:
                writer.transport.abort()
                return
            await self._forward_both_ways(_Link(writer, server_writer, self._shares, self._dice), reader, server_reader)

    async def _forward_both_ways(
        self, link: _Link, reader: asyncio.StreamReader, server_reader: asyncio.StreamReader
    ) -> None:
        self._links.add(link)
        ways = [self._requests(link, reader), self._answers(link, server_reader)]
        tasks = [asyncio.create_task(way) for way in ways]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        link.abort()
        await asyncio.wait(tasks)
        self._links.discard(link)
        self.counts += link.counts

    async def _requests(self, link: _Link, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            link.server.write(await reader.readexactly(_PREFACE_BYTES))
            while True:
                link.on_request(await _read_frame(reader))
                await link.server.drain()

    async def _answers(self, link: _Link, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while not link.client.is_closing():
                link.on_answer(await _read_frame(reader))
                await link.client.drain()

    async def _close(self) -> None:
        self._server.close()
        for link in self._links:
            link.abort()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        await asyncio.wait(tasks, timeout=5) if tasks else None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(timeout=10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)
        self._loop.close()


async def _read_frame(reader: asyncio.StreamReader) -> _Frame:
    head = await reader.readexactly(9)
    size = int.from_bytes(head[:3], "big")
    stream = int.from_bytes(head[5:], "big") & 0x7FFF_FFFF
    return _Frame(head[3], head[4], stream, head + await reader.readexactly(size))


def _frame(kind: int, stream: int, number: int) -> bytes:
    """A frame whose payload is one number of 32 bits."""
    return struct.pack(">I", 4)[1:] + struct.pack(">BBII", kind, 0, stream, number)
