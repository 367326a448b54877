"""A TCP proxy on loopback that does to connections what networks do to them."""

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, Literal, Self

Fault = Literal["cut", "refused", "held", "black hole", "answers lost", "requests lost", "slow"]
"""What can befall the connections, until `heal`:

- cut: each is reset; new ones are made as ever.
- refused: each is reset, and nobody listens any more.
- held: nothing passes, and nothing is lost: it arrives when the network is healed.
- black hole: what is sent is lost both ways, and neither side hears of it. The network forgets each connection: after
  it is healed only new ones get through, and the old ones stay silent.
- answers lost: what the server sends is lost. When the network is healed each connection that lost something is reset.
- requests lost: the same of what clients send.
- slow: SLOW_BYTES_PER_SECOND each way.
"""

SLOW_BYTES_PER_SECOND = 100_000
_READ_BYTES = 1 << 16
_NO_LINGER = struct.pack("ii", 1, 0)  # a socket that is closed with it sends RST instead of FIN


class _Link:
    """A client's connection, and the one to the server that is made for it."""

    def __init__(self, client: asyncio.StreamWriter, server: asyncio.StreamWriter) -> None:
        self.ends = (client, server)
        self.is_forgotten = False
        self.has_lost = False

    def reset(self) -> None:
        for end in self.ends:
            with contextlib.suppress(OSError):  # it may be closed by now
                end.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
            end.transport.abort()

    def close(self) -> None:
        for end in self.ends:
            end.close()


class TcpProxy:
    """Forwards to `target` (HOST:PORT) from a free port; its switches may be used from any thread."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._loop = asyncio.new_event_loop()
        self._links: set[_Link] = set()
        self._fault: Fault | None = None
        self._passes = asyncio.Event()
        self._passes.set()
        self._planned: tuple[int, Fault] | None = None
        self._socket = _bound("127.0.0.1", 0)
        self._server: asyncio.Server | None = None
        self.struck = threading.Event()
        self.swallowed_byte_count = 0
        self.cut_count = 0
        self.address = "{}:{}".format(*self._socket.getsockname())
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._call(self._listen())

    def strike(self, fault: Fault) -> None:
        """Lets a fault begin. One at a time."""
        self._call(self._strike(fault))

    def strike_after_request_bytes(self, count: int, fault: Fault) -> None:
        """Lets a fault begin, once, when clients have sent so many bytes more. `struck` is set then."""
        self.struck.clear()
        self._planned = count, fault

    def heal(self) -> None:
        """Ends the fault."""
        self._call(self._heal())

    def swallow_answers(self) -> None:
        """From now on what the server sends is lost; what clients send still arrives."""
        self.strike("answers lost")

    def cut(self) -> None:
        """Ends every connection, and forwards both ways for those to come."""
        self.strike("cut")
        self.heal()

    def cut_after_request_bytes(self, count: int) -> None:
        """Cuts every connection once, when clients have sent so many bytes more."""
        self.strike_after_request_bytes(count, "cut")

    async def _strike(self, fault: Fault) -> None:
        self._fault = fault
        if fault in ("cut", "refused"):
            self._reset_all()
        if fault == "refused":
            self._stop_listening()
        if fault == "held":
            self._passes.clear()
        if fault == "black hole":
            for link in self._links:
                link.is_forgotten = True
        self.struck.set()

    async def _heal(self) -> None:
        for link in self._links:
            if link.has_lost and not link.is_forgotten:
                link.reset()
        self._fault = None
        self._passes.set()
        await self._listen()

    def _reset_all(self) -> None:
        self.cut_count += 1
        for link in self._links:
            link.reset()

    async def _listen(self) -> None:
        if self._server is None:
            self._server = await asyncio.start_server(self._serve, sock=self._socket)

    def _stop_listening(self) -> None:
        """Keeps the port, so that nobody else gets it; what is bound and does not listen refuses connections."""
        address = self._socket.getsockname()
        self._server.close()
        self._server = None
        self._socket = _bound(*address)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.CancelledError):  # asyncio would log it when the proxy is closed
            await self._connect(reader, writer)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._passes.wait()
        try:
            server_reader, server_writer = await asyncio.open_connection(*self._target)
        except OSError:
            writer.transport.abort()
            return
        link = _Link(writer, server_writer)
        link.is_forgotten = self._fault == "black hole"
        self._links.add(link)
        await self._forward_both_ways(link, reader, server_reader)
        self._links.discard(link)
        link.close()

    async def _forward_both_ways(
        self, link: _Link, reader: asyncio.StreamReader, server_reader: asyncio.StreamReader
    ) -> None:
        tasks = [
            asyncio.create_task(self._forward(link, reader, is_answer=False)),
            asyncio.create_task(self._forward(link, server_reader, is_answer=True)),
        ]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if link.is_forgotten:
            await asyncio.wait(tasks)  # neither side hears of the other's end

    async def _forward(self, link: _Link, reader: asyncio.StreamReader, *, is_answer: bool) -> None:
        writer = link.ends[0 if is_answer else 1]
        try:
            while data := await reader.read(_READ_BYTES):
                if not is_answer:
                    await self._count(len(data))
                await self._passes.wait()
                if link.is_forgotten or self._loses(is_answer=is_answer):
                    link.has_lost = True
                    self.swallowed_byte_count += len(data)
                    continue
                if self._fault == "slow":
                    await asyncio.sleep(len(data) / SLOW_BYTES_PER_SECOND)
                writer.write(data)
                await writer.drain()
        except OSError:
            pass

    def _loses(self, *, is_answer: bool) -> bool:
        return self._fault == ("answers lost" if is_answer else "requests lost")

    async def _count(self, request_byte_count: int) -> None:
        if self._planned is None:
            return
        left, fault = self._planned
        self._planned = left - request_byte_count, fault
        if left <= request_byte_count:
            self._planned = None
            await self._strike(fault)

    def _call(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(timeout=10)

    async def _close(self) -> None:
        if self._server is not None:
            self._server.close()
        self._socket.close()
        for link in self._links:
            link.reset()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._call(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)
        self._loop.close()


def _bound(host: str, port: int) -> socket.socket:
    bound = socket.socket()
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.bind((host, port))
    return bound
