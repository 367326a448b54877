"""Registers services from their descriptors: one coroutine or async generator a method, named as the RPC in snake_case.

The handlers use the project's own (de)serializers, and every method is guarded: whatever a servicer raises becomes a
status with details, and nothing else does that; streams are counted, and dropped when they stand still.
"""

import asyncio
import contextlib
import re
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, NoReturn, TypeAlias, TypeVar

import grpc
import structlog
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from kedge.wire.codec import parse_message, serialize, stream_parser
from kedge.wire.errors import KedgeError
from kedge_server.rpc.gate import Gate
from kedge_server.rpc.outlet import Answer, Outlet
from kedge_server.rpc.status import abort
from kedge_server.rpc.streams import beginning_within, checked, only_message

_log = structlog.get_logger("kedge.rpc")

_RETRY_AFTER_SECONDS = 0.5
_UNCOUNTED = contextlib.nullcontext()

AnswerT = TypeVar("AnswerT")
_Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

# All take a stream of requests, on the wire the same as a single one: of that gRPC would read up to 4 MiB before
# anybody could ask who calls, and wait for the rest for ever.
_HANDLERS: dict[bool, "Callable[..., grpc.RpcMethodHandler[Any, Any]]"] = {
    False: grpc.stream_unary_rpc_method_handler,
    True: grpc.stream_stream_rpc_method_handler,
}


class StreamBounds:
    """How many streams a server holds, of all methods, and how long they may stand still. Small calls are no streams.

    Args:
        limit: how many may be open.
        begin_seconds: how long an upload may take to send its header. An Exchange may be idle between its requests.
        read_idle_seconds: how long a message may wait for its reader.
    """

    def __init__(self, limit: int, *, begin_seconds: float, read_idle_seconds: float) -> None:
        self._limit = limit
        self._open_count = 0
        self.begin_seconds = begin_seconds
        self.read_idle_seconds = read_idle_seconds

    @contextlib.contextmanager
    def one_more(self) -> Iterator[None]:
        """Counts a stream for as long as it is entered.

        Raises:
            KedgeError: TOO_MANY_STREAMS.
        """
        if self._open_count >= self._limit:
            raise KedgeError(
                "TOO_MANY_STREAMS",
                f"{self._open_count} streams are open, limits.streams is {self._limit}: try again after "
                f"{_RETRY_AFTER_SECONDS} s",
                retry_after_seconds=_RETRY_AFTER_SECONDS,
                limit=self._limit,
            )
        self._open_count += 1
        try:
            yield
        finally:
            self._open_count -= 1


def service_handler(service: ServiceDescriptor, servicer: object, guard: "Guard") -> grpc.GenericRpcHandler:
    """The handler of a service; the servicer has a method for every RPC."""
    methods = {method.name: _method_handler(method, servicer, guard) for method in service.methods}
    return grpc.method_handlers_generic_handler(service.full_name, methods)


class NoMethod(grpc.GenericRpcHandler):
    """Handles what nothing else does. Of such a call that its peer cancels, gRPC would keep the answer for ever."""

    def service(self, call: grpc.HandlerCallDetails) -> "grpc.RpcMethodHandler[Any, Any]":
        """Refuses any call."""
        message = f"{call.method} is no method of this server: bring client and server to the same version"

        async def refuse(_: AsyncIterator[bytes], context: _Context) -> NoReturn:
            await abort(context, KedgeError("UNSUPPORTED", message, method=call.method))

        return grpc.stream_unary_rpc_method_handler(refuse)


def _method_handler(method: MethodDescriptor, servicer: object, guard: "Guard") -> "grpc.RpcMethodHandler[Any, Any]":
    behaviour = getattr(servicer, re.sub(r"(?<!^)(?=[A-Z])", "_", method.name).lower())
    kind = method.client_streaming, method.server_streaming
    return _HANDLERS[method.server_streaming](
        guard.of_kind[kind](method.full_name, behaviour),
        request_deserializer=_parser(method),
        response_serializer=serialize,
    )


def _parser(method: MethodDescriptor) -> Callable[[bytes], Any]:
    message_type: type[Message] = GetMessageClass(method.input_type)
    if "payload" in method.input_type.oneofs_by_name:
        return stream_parser(message_type)
    return lambda raw: parse_message(message_type, raw)


class Guard:
    """Wraps the methods of services: who may call them does, what they raise becomes a status, streams are bounded.

    Args:
        gate: lets calls in.
        bounds: of the streams.
        generation: of the server; every call that is let in is told of it, before anything else.
    """

    def __init__(self, gate: Gate, bounds: StreamBounds, generation: int) -> None:
        self._gate = gate
        self._bounds = bounds
        self._generation = (("kedge-server-generation", str(generation)),)
        self.of_kind: dict[tuple[bool, bool], Callable[[str, Callable[..., Any]], Callable[..., Any]]] = {
            (False, False): self._unary,
            (False, True): self._download,
            (True, False): self._upload,
            (True, True): self._exchange,
        }

    def _unary(self, method: str, behaviour: Callable[..., Awaitable[Message]]) -> Callable[..., Awaitable[Message]]:
        async def guarded(_: AsyncIterator[Any], context: _Context) -> Message:
            async def call() -> Message:
                await self._greet(context)
                return await behaviour(await only_message(self._bounds.begin_seconds, context))

            return await self._answer(method, context, call)

        return guarded

    def _upload(self, method: str, behaviour: Callable[..., Awaitable[Message]]) -> Callable[..., Awaitable[Message]]:
        async def guarded(requests: AsyncIterator[Any], context: _Context) -> Message:
            async def call() -> Message:
                await self._greet(context)
                return await behaviour(beginning_within(self._bounds.begin_seconds, _checked_stream(requests)))

            return await self._answer(method, context, call, self._bounds.one_more())

        return guarded

    def _download(
        self, method: str, behaviour: Callable[..., AsyncGenerator[Answer, None]]
    ) -> Callable[..., Awaitable[None]]:
        async def guarded(_: AsyncIterator[Any], context: _Context) -> None:
            async def begin() -> AsyncGenerator[Answer, None]:
                return behaviour(await only_message(self._bounds.begin_seconds, context))

            await self._send(method, context, begin)

        return guarded

    def _exchange(
        self, method: str, behaviour: Callable[..., AsyncGenerator[Answer, None]]
    ) -> Callable[..., Awaitable[None]]:
        async def guarded(requests: AsyncIterator[Any], context: _Context) -> None:
            async def begin() -> AsyncGenerator[Answer, None]:
                return behaviour(_checked_stream(requests))

            await self._send(method, context, begin)

        return guarded

    async def _greet(self, context: _Context) -> None:
        try:
            await context.send_initial_metadata(self._generation)
        except grpc.aio.InternalError:  # the peer has gone
            raise asyncio.CancelledError from None

    async def _send(
        self, method: str, context: _Context, begin: Callable[[], Awaitable[AsyncGenerator[Answer, None]]]
    ) -> None:
        # A coroutine that writes, since a generator that yields to gRPC could not be woken from a write that is stuck.
        outlet = Outlet(context, self._bounds.read_idle_seconds, self._generation)

        async def call() -> None:
            await outlet.send_all(await begin())

        await self._answer(method, context, call, self._bounds.one_more())

    async def _answer(
        self,
        method: str,
        context: _Context,
        call: Callable[[], Awaitable[AnswerT]],
        count: contextlib.AbstractContextManager[None] = _UNCOUNTED,
    ) -> AnswerT:
        """Makes a call, which is counted once it is let in; whatever goes wrong becomes its status."""
        try:
            async with self._gate.entered(method, context):
                with count:
                    return await call()
        except Exception as error:
            failure = _as_kedge_error(error)
        # Outside of the except clause and without its traceback: a status may wait for its reader for a while, and
        # nothing that the call has held is to wait along with it.
        return await abort(context, failure.with_traceback(None))


async def _checked_stream(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for message in requests:
        yield checked(message)


def _as_kedge_error(error: Exception) -> KedgeError:
    if isinstance(error, KedgeError):
        return error
    _log.exception("defect", error=type(error).__name__)
    return KedgeError("INTERNAL", "the server failed at this call; its log has the cause")
