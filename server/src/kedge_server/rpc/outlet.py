"""The way out of a server-streaming method: messages, as fast as their reader takes them."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextvars import ContextVar
from typing import Any, TypeAlias

import grpc
from google.protobuf.message import Message

from kedge.wire.errors import KedgeError

Answer: TypeAlias = Message | bytes
"""What is sent: a message, or one that is encoded already."""

_of_this_call: ContextVar["Outlet"] = ContextVar("outlet")


class Outlet:
    """Where the answers of one call are sent to, one message at a time.

    Args:
        context: the call.
        idle_seconds: how long a message may wait for its reader.
        metadata: what is said before all messages.
    """

    def __init__(
        self,
        context: grpc.aio.ServicerContext[Any, Any],
        idle_seconds: float,
        metadata: tuple[tuple[str, str], ...] = (),
    ) -> None:
        self._metadata = metadata
        self._context = context
        self._idle_seconds = idle_seconds
        self._sending: asyncio.Timeout | None = None
        self._is_dropped = False

    @staticmethod
    def of_this_call() -> "Outlet":
        """That of the call that is being answered, for a method that may have to drop it."""
        return _of_this_call.get()

    async def send_all(self, messages: AsyncGenerator[Answer, None]) -> None:
        """Sends what a method yields, each message when the reader has made room for the one before.

        Raises:
            KedgeError: READER_STALLED, or what the method raises.
        """
        _of_this_call.set(self)
        if not await self._all_are_taken(messages):
            # Raised here, where no traceback is chained to it that would keep what was read alive.
            raise self._stalled()

    async def _all_are_taken(self, messages: AsyncGenerator[Answer, None]) -> bool:
        patience = asyncio.timeout(None)
        try:
            async with contextlib.aclosing(messages), patience:
                # By itself, since with a first message that is not taken it would keep a status from being sent.
                await self._send(patience, self._context.send_initial_metadata, self._metadata)
                async for message in messages:
                    await self._send(patience, self._context.write, message)
        except TimeoutError:
            if not (self._is_dropped or patience.expired()):
                raise
            return False
        except grpc.aio.InternalError:  # the peer has gone, and there is nobody to tell
            raise asyncio.CancelledError from None
        finally:
            self._sending = None  # it refers to this task, and a call that is referred to cannot be hung up
        return True

    async def _send(
        self, patience: asyncio.Timeout, operation: Callable[[Any], Awaitable[None]], argument: object
    ) -> None:
        """Sends one message. The patience runs only meanwhile: what a method waits for is its own affair."""
        if self._is_dropped:
            raise TimeoutError
        patience.reschedule(asyncio.get_running_loop().time() + self._idle_seconds)
        self._sending = patience
        await operation(argument)
        self._sending = None
        patience.reschedule(None)

    def drop(self) -> None:
        """Ends the call as if its reader had stalled."""
        self._is_dropped = True
        if self._sending is not None:
            with contextlib.suppress(RuntimeError):  # it is expiring already
                self._sending.reschedule(0)

    def _stalled(self) -> KedgeError:
        what = (
            "newer weights took the memory of the ones that were read so slowly (limits.reading_bytes)"
            if self._is_dropped
            else f"no message was taken for {self._idle_seconds:g} s (limits.read_idle_seconds)"
        )
        return KedgeError("READER_STALLED", f"{what}: pull again", idle_seconds=self._idle_seconds)
