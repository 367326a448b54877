"""Registers services from their descriptors: one coroutine or async generator a method, named as the RPC in snake_case.

The handlers use the project's own (de)serializers, and every method is guarded: whatever a servicer raises becomes a
status with details, and nothing else does that.
"""

import re
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import structlog
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from kedge.wire.codec import Malformed, parse_message, serialize, stream_parser
from kedge.wire.errors import KedgeError
from kedge_server.rpc.status import abort

_log = structlog.get_logger("kedge.rpc")

_HANDLERS: dict[tuple[bool, bool], "Callable[..., grpc.RpcMethodHandler[Any, Any]]"] = {
    (False, False): grpc.unary_unary_rpc_method_handler,
    (False, True): grpc.unary_stream_rpc_method_handler,
    (True, False): grpc.stream_unary_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}


def service_handler(service: ServiceDescriptor, servicer: object) -> grpc.GenericRpcHandler:
    """The handler of a service; the servicer has a method for every RPC."""
    methods = {method.name: _method_handler(method, servicer) for method in service.methods}
    return grpc.method_handlers_generic_handler(service.full_name, methods)


def _method_handler(method: MethodDescriptor, servicer: object) -> "grpc.RpcMethodHandler[Any, Any]":
    behaviour = getattr(servicer, re.sub(r"(?<!^)(?=[A-Z])", "_", method.name).lower())
    guard = _guard_stream if method.server_streaming else _guard_unary
    return _HANDLERS[method.client_streaming, method.server_streaming](
        guard(behaviour, is_streamed_to=method.client_streaming),
        request_deserializer=_parser(method),
        response_serializer=serialize,
    )


def _parser(method: MethodDescriptor) -> Callable[[bytes], Any]:
    message_type: type[Message] = GetMessageClass(method.input_type)
    if method.client_streaming:
        return stream_parser(message_type)
    return lambda raw: parse_message(message_type, raw)


def _guard_unary(
    behaviour: Callable[..., Awaitable[Message]], *, is_streamed_to: bool
) -> Callable[..., Awaitable[Message]]:
    async def guarded(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Message:
        try:
            return await behaviour(_checked(request, is_stream=is_streamed_to))
        except Exception as error:
            await abort(context, _as_kedge_error(error))

    return guarded


def _guard_stream(
    behaviour: Callable[..., AsyncIterator[Message | bytes]], *, is_streamed_to: bool
) -> Callable[..., AsyncIterator[Message | bytes]]:
    async def guarded(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Message | bytes]:
        try:
            async for message in behaviour(_checked(request, is_stream=is_streamed_to)):
                yield message
        except Exception as error:
            await abort(context, _as_kedge_error(error))

    return guarded


def _checked(request: Any, *, is_stream: bool) -> Any:
    return _checked_stream(request) if is_stream else _checked_message(request)


async def _checked_stream(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for message in requests:
        yield _checked_message(message)


def _checked_message(message: Any) -> Any:
    if isinstance(message, Malformed):
        raise KedgeError("MALFORMED_MESSAGE", f"the bytes are not this method's message: {message.detail}")
    return message


def _as_kedge_error(error: Exception) -> KedgeError:
    if isinstance(error, KedgeError):
        return error
    _log.exception("defect", error=type(error).__name__)
    return KedgeError("INTERNAL", "the server failed at this call; its log has the cause")
