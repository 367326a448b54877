"""A TCP proxy on loopback that can lose the server's answers, and cut connections."""

import asyncio
import threading
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, Self


class TcpProxy:
    """Forwards to `target` (HOST:PORT) from a free port; its switches may be used from any thread."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._loop = asyncio.new_event_loop()
        self._connections: set[asyncio.StreamWriter] = set()
        self._swallows_answers = False
        self.swallowed_byte_count = 0
        self._request_bytes_left: int | None = None
        self.cut_count = 0
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._server = self._call(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.address = "{}:{}".format(*self._server.sockets[0].getsockname())

    def swallow_answers(self) -> None:
        """From now on what the server sends is lost; what clients send still arrives."""
        self._swallows_answers = True

    def cut(self) -> None:
        """Ends every connection, and forwards both ways for those to come."""
        self._swallows_answers = False
        self._call(self._cut())

    def cut_after_request_bytes(self, count: int) -> None:
        """Cuts every connection once, when clients have sent so many bytes more."""
        self._request_bytes_left = count

    async def _cut(self) -> None:
        self.cut_count += 1
        for writer in list(self._connections):
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            server_reader, server_writer = await asyncio.open_connection(*self._target)
        except OSError:
            writer.transport.abort()
            return
        pair = {writer, server_writer}
        self._connections |= pair
        await asyncio.wait(
            [
                asyncio.create_task(self._forward(reader, server_writer, is_answer=False)),
                asyncio.create_task(self._forward(server_reader, writer, is_answer=True)),
            ],
            return_when=asyncio.FIRST_COMPLETED,
        )
        self._connections -= pair
        for one in pair:
            one.transport.abort()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, is_answer: bool) -> None:
        try:
            while data := await reader.read(1 << 16):
                if is_answer and self._swallows_answers:
                    self.swallowed_byte_count += len(data)
                    continue
                if not is_answer and self._is_time_to_cut(len(data)):
                    await self._cut()
                    return
                writer.write(data)
                await writer.drain()
        except OSError:
            pass

    def _is_time_to_cut(self, byte_count: int) -> bool:
        if self._request_bytes_left is None:
            return False
        self._request_bytes_left -= byte_count
        if self._request_bytes_left > 0:
            return False
        self._request_bytes_left = None
        return True

    def _call(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(timeout=10)

    async def _close(self) -> None:
        self._server.close()
        await self._cut()
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
