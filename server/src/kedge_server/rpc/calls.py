"""What gRPC's aio server leaves to others: to end a call whose peer takes nothing, and to read without losing memory.

A status waits behind the message before it, for ever if the peer opens no window for that, and a method of gRPC's aio
server cannot cancel its call. But gRPC's core resets the stream of a call that nobody refers to any more. Two tasks
do: the method's own, and the one that made it, which watches for a cancellation by the peer. Both are ended here.

The cyclic collector may have to come by first, which on an idle server takes its time.

Should a later gRPC hold a call in another way, this one stays until its connection ends, with one message in gRPC's
memory; what the method held is let go in any case.
"""

import asyncio
import weakref
from collections.abc import Coroutine, Generator
from typing import Any, NoReturn

import grpc

_LAST_READ_SECONDS = 0.1


class _Task(asyncio.Task[Any]):
    """A task that knows which one made it."""

    maker: "weakref.ref[asyncio.Task[Any]] | None" = None


def make_task(
    loop: asyncio.AbstractEventLoop,
    coroutine: Coroutine[Any, Any, Any] | Generator[Any, None, Any],
    **options: Any,
) -> asyncio.Task[Any]:
    """The task factory of a loop whose calls can be hung up."""
    task = _Task(coroutine, loop=loop, **options)
    maker = asyncio.current_task(loop)
    task.maker = weakref.ref(maker) if maker is not None else None
    return task


def hang_up() -> NoReturn:
    """Ends the call that the current task answers, without a status. Its peer sees CANCELLED, as soon as it looks."""
    task = asyncio.current_task()
    maker = task.maker() if isinstance(task, _Task) and task.maker is not None else None
    if maker is not None:
        maker.cancel()
    raise asyncio.CancelledError


async def read(context: "grpc.aio.ServicerContext[Any, Any]", seconds: float) -> Any:
    """Reads one message, which a cancellation of the call does not interrupt.

    What gRPC prepares for a read that is interrupted it never frees (grpc/grpc#43360), about 100 bytes. One that is
    left alone when the peer has cancelled the call ends at once.

    Args:
        context: the call.
        seconds: how long the message may take.

    Returns:
        The message, or `grpc.aio.EOF`.

    Raises:
        TimeoutError: it did not come in time.
    """
    reading = asyncio.ensure_future(context.read())
    try:
        async with asyncio.timeout(seconds):
            return await asyncio.shield(reading)
    finally:
        if not reading.done():  # it refers to the call, which could not be hung up for long
            asyncio.get_running_loop().call_later(_LAST_READ_SECONDS, reading.cancel)
