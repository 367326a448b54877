"""The standard health service. Whoever reaches the port may ask, without credentials."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from functools import partial
from typing import Any, Final, TypeAlias

import grpc
from grpc_health.v1.health_pb2 import DESCRIPTOR, HealthCheckRequest, HealthCheckResponse

from kedge.wire.codec import parse_message, serialize
from kedge.wire.errors import KedgeError
from kedge_server.rpc.methods import StreamBounds
from kedge_server.rpc.outlet import Outlet
from kedge_server.rpc.status import abort, let_cancellation_come
from kedge_server.rpc.streams import only_message

_ASKING_SECONDS: Final = 2.0
_ASKING_LIMIT: Final = 64
"""So many may be about to ask, for so long: what is not whole may be any message, and take 4 MiB."""

_SERVICE = DESCRIPTOR.services_by_name["Health"].full_name
_Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class HealthServicer:
    """All services serve from the beginning, and until `end`. Belongs to one loop.

    Args:
        names: the full names of the services.
        bounds: of those who watch.
    """

    def __init__(self, names: Iterable[str], bounds: StreamBounds) -> None:
        self._names = frozenset(["", *names])
        self._bounds = bounds
        self._asking = StreamBounds(
            _ASKING_LIMIT, begin_seconds=_ASKING_SECONDS, read_idle_seconds=bounds.read_idle_seconds
        )
        self._ending = asyncio.Event()

    @property
    def handler(self) -> grpc.GenericRpcHandler:
        """What a server is given. Requests are streams to it, as all are; see `kedge_server.rpc.methods`."""
        codec: Any = {
            "request_deserializer": partial(parse_message, HealthCheckRequest),
            "response_serializer": serialize,
        }
        methods = {
            "Check": grpc.stream_unary_rpc_method_handler(self._check, **codec),
            "Watch": grpc.stream_stream_rpc_method_handler(self._watch, **codec),
        }
        return grpc.method_handlers_generic_handler(_SERVICE, methods)

    def end(self) -> None:
        """From now on nothing serves. Those who watch are told, and their calls end."""
        self._ending.set()

    async def _check(self, _: AsyncIterator[Any], context: _Context) -> HealthCheckResponse:
        try:
            request = await self._only(context)
        except KedgeError as error:
            return await abort(context, error)
        if request.service not in self._names:
            await context.abort(grpc.StatusCode.NOT_FOUND, "there is no such service")
        return self._answer(request)

    async def _watch(self, _: AsyncIterator[Any], context: _Context) -> None:
        try:
            request = await self._only(context)
            with self._bounds.one_more():
                await Outlet(context, self._bounds.read_idle_seconds).send_all(self._answers(request))
        except KedgeError as error:
            await abort(context, error)

    async def _only(self, context: _Context) -> HealthCheckRequest:
        with self._asking.one_more():
            request: HealthCheckRequest = await only_message(self._asking.begin_seconds, context)
            await let_cancellation_come()
            return request

    async def _answers(self, request: HealthCheckRequest) -> AsyncGenerator[HealthCheckResponse, None]:
        yield self._answer(request)
        await self._ending.wait()
        yield self._answer(request)
        raise KedgeError("SERVER_DRAINING", "the server is shutting down: watch it again later")

    def _answer(self, request: HealthCheckRequest) -> HealthCheckResponse:
        if request.service not in self._names:
            return HealthCheckResponse(status=HealthCheckResponse.SERVICE_UNKNOWN)
        is_ending = self._ending.is_set()
        return HealthCheckResponse(status=HealthCheckResponse.NOT_SERVING if is_ending else HealthCheckResponse.SERVING)
