"""Answers what the services are, for tools that have no .proto files."""

from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from typing import Any

from grpc_reflection.v1alpha import reflection, reflection_pb2

from kedge_server.rpc.idle import IdleStreams

SERVICE: Any = reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"]


class ReflectionServicer:
    """The service of gRPC's own, by this server's rules for callers and streams.

    Args:
        names: the full names of the services that it lists.
        idle: where streams wait.
    """

    def __init__(self, names: Iterable[str], idle: IdleStreams) -> None:
        self._answers: Any = reflection.aio.ReflectionServicer([*names, SERVICE.full_name])
        self._idle = idle

    async def server_reflection_info(
        self, requests: AsyncIterator[reflection_pb2.ServerReflectionRequest]
    ) -> AsyncGenerator[reflection_pb2.ServerReflectionResponse, None]:
        """Answers one question after the other."""
        async for answer in self._answers.ServerReflectionInfo(self._until_the_end(requests), None):
            yield answer

    async def _until_the_end(
        self, requests: AsyncIterator[reflection_pb2.ServerReflectionRequest]
    ) -> AsyncIterator[reflection_pb2.ServerReflectionRequest]:
        while (request := await self._idle.next_request(requests)) is not None:
            yield request
