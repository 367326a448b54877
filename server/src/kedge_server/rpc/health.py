"""The standard health service. Whoever reaches the port may ask, without credentials."""

import asyncio
from collections.abc import AsyncGenerator, Iterable
from typing import Any

import grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthServicer as Base

from kedge.wire.errors import KedgeError
from kedge_server.rpc.methods import StreamBounds
from kedge_server.rpc.outlet import Outlet
from kedge_server.rpc.status import abort


class HealthServicer(Base):
    """All services serve from the beginning, and until `end`. Belongs to one loop.

    Args:
        names: the full names of the services.
        bounds: of those who watch.
    """

    def __init__(self, names: Iterable[str], bounds: StreamBounds) -> None:
        self._names = frozenset(["", *names])
        self._bounds = bounds
        self._ending = asyncio.Event()

    def end(self) -> None:
        """From now on nothing serves. Those who watch are told, and their calls end."""
        self._ending.set()

    async def Check(  # noqa: N802
        self, request: HealthCheckRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> HealthCheckResponse:
        """Answers with the status."""
        if request.service not in self._names:
            await context.abort(grpc.StatusCode.NOT_FOUND, "there is no such service")
        return self._answer(request)

    async def Watch(  # noqa: N802
        self, request: HealthCheckRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> None:
        """Answers with the status, and with the one that follows."""
        try:
            with self._bounds.one_more():
                await Outlet(context, self._bounds.read_idle_seconds).send_all(self._answers(request))
        except KedgeError as error:
            await abort(context, error)

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
