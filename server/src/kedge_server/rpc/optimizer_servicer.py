"""OptimizerService: the way of a gradient in, and of the weights out."""

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any, NamedTuple, Self

import numpy as np

from kedge.v1 import optimizer_service_pb2 as pb
from kedge.v1 import tensor_pb2
from kedge.wire import convert as wire
from kedge.wire import names
from kedge.wire.errors import KedgeError
from kedge_server.core.values import ContributionHeader, PushResult
from kedge_server.engine.readers import Readers
from kedge_server.engine.registry import Registry
from kedge_server.engine.run import RunEngine
from kedge_server.engine.snapshots import Snapshot
from kedge_server.rpc import convert, streams
from kedge_server.rpc.copies import Copies
from kedge_server.rpc.idle import IdleStreams
from kedge_server.rpc.memory import MemoryDesk, SharedMemory
from kedge_server.rpc.outlet import Answer, Outlet
from kedge_server.rpc.runs import Runs


class OptimizerServicer:
    """Answers OptimizerService from a registry.

    Args:
        registry: the runs.
        idle: where streams wait.
        desk: where workers hand memory over.
    """

    def __init__(self, registry: Registry, idle: IdleStreams, desk: MemoryDesk) -> None:
        self._registry = registry
        self._runs = Runs(registry)
        self._idle = idle
        self._desk = desk
        self._copies = Copies()
        self._readers = Readers(registry.limits.reading_bytes)

    async def offer_memory(self, request: pb.OfferMemoryRequest) -> pb.OfferMemoryResponse:
        """Says where a worker can hand its memory over. Its lease is asked for when it pushes, as in any Exchange."""
        run = self._runs.of_worker(names.parse_worker(request.worker), request.epoch)
        offer = self._desk.offer(run.config.manifest.element_count)
        return pb.OfferMemoryResponse(socket=offer.socket_name, ticket=offer.ticket)

    async def push_gradients(self, requests: AsyncIterator[Any]) -> pb.PushGradientsResponse:
        """Takes one contribution."""
        header: pb.PushHeader = await streams.read_header(requests)
        if header.HasField("in_memory"):
            _lent(None, header.in_memory)
        worker, contribution = convert.contribution_header(header)
        run = self._runs.of_worker(worker, contribution.epoch)
        result = await self._receive(requests, header, run, contribution)
        return pb.PushGradientsResponse(result=convert.push_result(result, run))

    async def pull_weights(self, request: pb.PullWeightsRequest) -> AsyncGenerator[Answer, None]:
        """Sends weights of one step."""
        run = self._runs.get(names.run_name(names.parse_run(request.run)))
        async with aclosing(self._pull(run, convert.pull(request.pull), pb.PullWeightsResponse)) as answer:
            async for message in answer:
                yield message

    async def exchange(self, requests: AsyncIterator[Any]) -> AsyncGenerator[Answer, None]:
        """Takes contributions and sends weights, in the order asked."""
        request, memory = await self._idle.next_request(requests), None
        if streams.kind_of(request) == "memory":
            memory = self._desk.claim(request.memory.ticket)
            request = await self._idle.next_request(requests)
        while request is not None:
            match streams.kind_of(request):
                case "push":
                    answer = self._answer_push(requests, request.push, memory)
                case "pull":
                    answer = self._answer_pull(request.pull, memory)
                case _:
                    raise streams.unexpected("push or pull", request)
            async with aclosing(answer):
                async for message in answer:
                    yield message
            request = await self._idle.next_request(requests)

    async def _answer_push(
        self, requests: AsyncIterator[Any], header: pb.PushHeader, memory: SharedMemory | None
    ) -> AsyncGenerator[Answer, None]:
        """Takes a contribution, and sends the weights that its header asks for."""
        worker, contribution = convert.contribution_header(header)
        run = self._runs.of_worker(worker, contribution.epoch)
        wish = None
        if header.HasField("pull"):
            wish = _wish(run, header.pull, contribution.worker_id, memory)
            run.require_weights(wish.pull.weights)
        if header.HasField("in_memory"):
            result = await self._copy(header, run, contribution, memory)
        else:
            result = await self._receive(requests, header, run, contribution)
        answer = convert.push_result(result, run)
        if wish is not None and result.outcome == "applied":
            wish = wish.from_step(result.step)
        if wish is not None and wish.into is not None:
            answer.weights.CopyFrom(await self._give(wish, wish.into))
            wish = None
        yield pb.ExchangeResponse(result=answer)
        if wish is None:
            return
        async with aclosing(self._pull(run, wish.pull, pb.ExchangeResponse, worker_id=wish.worker_id)) as messages:
            async for message in messages:
                yield message

    async def _answer_pull(self, request: pb.ExchangePull, memory: SharedMemory | None) -> AsyncGenerator[Answer, None]:
        """Sends weights, or puts them where they are wanted."""
        worker = names.parse_worker(request.worker)
        run = self._runs.of_worker(worker)
        wish = _wish(run, request.pull, worker.worker_id, memory)
        if wish.into is not None:
            header = await self._give(wish, wish.into)
            yield pb.ExchangeResponse(header=header)
            if header.is_unchanged:
                yield pb.ExchangeResponse(trailer=tensor_pb2.StreamTrailer())
            return
        async with aclosing(self._pull(run, wish.pull, pb.ExchangeResponse, worker_id=wish.worker_id)) as messages:
            async for message in messages:
                yield message

    async def _copy(
        self, header: pb.PushHeader, run: RunEngine, contribution: ContributionHeader, memory: SharedMemory | None
    ) -> PushResult:
        """Copies a contribution out of the worker's memory, submits it, and waits for what becomes of it."""
        dtype = convert.gradient_dtype(header, run.config)
        wait_seconds = wire.duration_from_wire(header, "wait") or 0.0
        run.check(contribution)
        source = _lent(memory, header.in_memory)
        _check_in_memory(header, dtype, run.config.manifest.element_count)
        async with self._idle.upload((run.config.name, contribution.worker_id, contribution.epoch)):
            gradient = self._registry.lend(run)
            inspection = await self._copies.take(source, gradient)
        return await run.result(run.submit(contribution, gradient, inspection), wait_seconds)

    async def _give(self, wish: "_Wish", into: np.ndarray) -> pb.WeightsHeader:
        """Copies weights into the worker's memory, unless they are unchanged; their header."""
        run, pull = wish.run, wish.pull
        run.require_weights(pull.weights)
        snapshot = await self._snapshot(run, pull, wish.worker_id)
        digest = run.config.manifest.digest
        header = convert.weights_header(snapshot, pull.weights, dtype=pull.dtype, size_bytes=0, digest=digest)
        if pull.is_answered_by(snapshot.step):
            header.is_unchanged = True
            return header
        fast = () if pull.weights == "slow" else snapshot.fast
        slow = () if pull.weights == "fast" else snapshot.slow or ()
        await self._copies.give(fast + slow, into)
        header.size_bytes, header.in_memory = into.nbytes, True
        return header

    @staticmethod
    async def _snapshot(run: RunEngine, pull: convert.Pull, worker_id: str | None) -> Snapshot:
        """What a pull is answered with. A worker that is to go on with fast weights may have to wait for others."""
        return await run.snapshot_for(
            worker_id if pull.weights != "slow" else None, min_step=pull.min_step, wait_seconds=pull.wait_seconds
        )

    async def _receive(
        self, requests: AsyncIterator[Any], header: pb.PushHeader, run: RunEngine, contribution: ContributionHeader
    ) -> PushResult:
        """Receives a contribution whole, submits it, and waits for what becomes of it."""
        dtype = convert.gradient_dtype(header, run.config)
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
        """Sends weights."""
        run.require_weights(pull.weights)
        snapshot = await self._snapshot(run, pull, worker_id)
        digest = run.config.manifest.digest
        header = convert.weights_header(snapshot, pull.weights, dtype=pull.dtype, size_bytes=0, digest=digest)
        if pull.is_answered_by(snapshot.step):
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


class _Wish(NamedTuple):
    """Weights that are asked for in an Exchange."""

    run: RunEngine
    pull: convert.Pull
    worker_id: str
    into: np.ndarray | None
    """Where they are wanted in the worker's memory; None if they are to be sent."""

    def from_step(self, step: int) -> Self:
        """The same, of this step or a later one."""
        return self._replace(pull=self.pull._replace(min_step=max(self.pull.min_step, step)))


def _wish(run: RunEngine, spec: pb.PullSpec, worker_id: str, memory: SharedMemory | None) -> _Wish:
    pull, into = convert.pull(spec), None
    if spec.HasField("into"):
        room = _lent(memory, spec.into)
        count = run.config.manifest.element_count * (2 if pull.weights == "fast_and_slow" else 1)
        into = room[:count] if pull.dtype == "float32" and room.size >= count else None
    return _Wish(run, pull, worker_id, into)


def _lent(memory: SharedMemory | None, wanted: tensor_pb2.MemoryRange) -> np.ndarray:
    """A range of the stream's memory.

    Raises:
        KedgeError: UNEXPECTED_MESSAGE if it has none; CHUNK_MISALIGNED or CHUNK_OUT_OF_RANGE.
    """
    if memory is None:
        raise KedgeError(
            "UNEXPECTED_MESSAGE",
            "a range of memory is named, and the stream has none: ask OfferMemory for a ticket, hand the memory over, "
            "and say the ticket in the first message of an Exchange",
            expected="no range of memory",
            got="a range of memory",
        )
    return memory.floats(wanted.offset, wanted.size_bytes)


def _check_in_memory(header: pb.PushHeader, dtype: str, element_count: int) -> None:
    if dtype != "float32":
        message = f"a gradient in shared memory is float32, not {dtype}: send others in chunks"
        raise KedgeError("UNSUPPORTED_DTYPE", message, tensor="", dtype=dtype)
    for got in (header.size_bytes, header.in_memory.size_bytes):
        if got != 4 * element_count:
            raise KedgeError(
                "SIZE_MISMATCH",
                f"the header declares {header.size_bytes} bytes in a range of {header.in_memory.size_bytes}; the "
                f"manifest has {element_count} elements, which are {4 * element_count} bytes of float32",
                expected=4 * element_count,
                got=got,
            )
