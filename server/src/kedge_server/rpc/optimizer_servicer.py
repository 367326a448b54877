"""OptimizerService: the way of a gradient in, and of the weights out."""

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

from kedge.v1 import optimizer_service_pb2 as pb
from kedge.v1 import tensor_pb2
from kedge.wire import convert as wire
from kedge.wire import names
from kedge_server.core.values import ContributionHeader, PushResult
from kedge_server.engine.readers import Readers
from kedge_server.engine.registry import Registry
from kedge_server.engine.run import RunEngine
from kedge_server.rpc import convert, streams
from kedge_server.rpc.idle import IdleStreams
from kedge_server.rpc.outlet import Answer, Outlet


class OptimizerServicer:
    """Answers OptimizerService from a registry."""

    def __init__(self, registry: Registry, idle: IdleStreams) -> None:
        self._registry = registry
        self._idle = idle
        self._readers = Readers(registry.limits.reading_bytes)

    async def push_gradients(self, requests: AsyncIterator[Any]) -> pb.PushGradientsResponse:
        """Takes one contribution."""
        header: pb.PushHeader = await streams.read_header(requests)
        run_name, contribution = convert.contribution_header(header)
        run = self._registry.get(run_name)
        result = await self._receive(requests, header, run, contribution)
        return pb.PushGradientsResponse(result=convert.push_result(result, run))

    async def pull_weights(self, request: pb.PullWeightsRequest) -> AsyncGenerator[Answer, None]:
        """Sends weights of one step."""
        run = self._registry.get(f"runs/{names.parse_run(request.run)}")
        async with aclosing(self._pull(run, convert.pull(request.pull), pb.PullWeightsResponse)) as answer:
            async for message in answer:
                yield message

    async def exchange(self, requests: AsyncIterator[Any]) -> AsyncGenerator[Answer, None]:
        """Takes contributions and sends weights, in the order asked."""
        while (request := await self._idle.next_request(requests)) is not None:
            match streams.kind_of(request):
                case "push":
                    answer = self._answer_push(requests, request.push)
                case "pull":
                    worker = names.parse_worker(request.pull.worker)
                    run = self._registry.get(worker.run)
                    pull = convert.pull(request.pull.pull)
                    answer = self._pull(run, pull, pb.ExchangeResponse, worker_id=worker.worker_id)
                case _:
                    raise streams.unexpected("push or pull", request)
            async with aclosing(answer):
                async for message in answer:
                    yield message

    async def _answer_push(self, requests: AsyncIterator[Any], header: pb.PushHeader) -> AsyncGenerator[Answer, None]:
        """Takes a contribution, and sends the weights that its header asks for."""
        run_name, contribution = convert.contribution_header(header)
        run = self._registry.get(run_name)
        pull = convert.pull(header.pull) if header.HasField("pull") else None
        if pull is not None:
            run.require_weights(pull.weights)
        result = await self._receive(requests, header, run, contribution)
        yield pb.ExchangeResponse(result=convert.push_result(result, run))
        if pull is None:
            return
        if result.outcome == "applied":
            pull = pull._replace(min_step=max(pull.min_step, result.step))
        async with aclosing(self._pull(run, pull, pb.ExchangeResponse, worker_id=contribution.worker_id)) as answer:
            async for message in answer:
                yield message

    async def _receive(
        self, requests: AsyncIterator[Any], header: pb.PushHeader, run: RunEngine, contribution: ContributionHeader
    ) -> PushResult:
        """Receives a contribution whole, submits it, and waits for what becomes of it."""
        dtype = wire.dtype_from_wire(header.dtype)
        wait_seconds = wire.duration_from_wire(header, "wait") or 0.0
        run.check(contribution)
        patience = streams.Patience.of(self._registry.limits, header.size_bytes, lambda: run.check(contribution))
        async with self._idle.upload((run.config.name, contribution.worker_id, contribution.epoch)):
            upload = streams.Upload(requests, patience)
            await upload.begin()
            gradient = self._registry.lend(run)
            try:
                inspection = await upload.read(gradient.array, dtype=dtype, size_bytes=header.size_bytes)
            except BaseException:
                gradient.release()
                raise
        return await run.result(run.submit(contribution, gradient, inspection), wait_seconds)

    async def _pull(
        self, run: RunEngine, pull: convert.Pull, response: type[Any], *, worker_id: str | None = None
    ) -> AsyncGenerator[Answer, None]:
        """Sends weights. A worker that is to go on with fast ones may have to wait for others."""
        run.require_weights(pull.weights)
        snapshot = await run.snapshot_for(
            worker_id if pull.weights != "slow" else None, min_step=pull.min_step, wait_seconds=pull.wait_seconds
        )
        digest = run.config.manifest.digest
        header = convert.weights_header(snapshot, pull.weights, dtype=pull.dtype, size_bytes=0, digest=digest)
        if pull.if_newer_than is not None and snapshot.step <= pull.if_newer_than:
            header.is_unchanged = True
            yield response(header=header)
            yield response(trailer=tensor_pb2.StreamTrailer())
            return
        encoding = snapshot.encoding(pull.weights, pull.dtype)
        del snapshot  # once it is superseded and its messages are made, its weights may go
        header.size_bytes = encoding.size_bytes
        drop = Outlet.of_this_call().drop
        with self._readers.reading(encoding, is_served=lambda: run.serves(header.step), drop=drop) as moved:
            yield response(header=header)
            for message in encoding.messages():
                yield message
                moved()
            yield response(trailer=tensor_pb2.StreamTrailer(crc32c=encoding.crc32c))
