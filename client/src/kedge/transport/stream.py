"""Streams over gRPC: weights coming in, contributions going out, the long-lived Exchange, and the events of a run."""

import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from queue import SimpleQueue
from typing import Any, NamedTuple, Self

import grpc
import numpy as np
from google.protobuf.message import Message

from kedge.buffers import Buffers
from kedge.transport import convert
from kedge.transport.channels import Connection
from kedge.transport.memory import LentMemory, Range
from kedge.transport.status import cancelled_error, internal_error
from kedge.transport.values import Event, PullRequest, Push, PushResult, WeightsOfStep
from kedge.v1.optimizer_service_pb2 import (
    ExchangeMemory,
    ExchangePull,
    ExchangeRequest,
    ExchangeResponse,
    PullSpec,
    WeightsHeader,
)
from kedge.v1.run_service_pb2 import WatchRunResponse
from kedge.v1.tensor_pb2 import DTYPE_FLOAT32, WEIGHTS_FAST_AND_SLOW, StreamTrailer
from kedge.wire.codec import Chunk, FlatDecoder, FlatEncoder, Malformed, serialize, stream_parser
from kedge.wire.compressed import RecordEncoder, gradient_encoder
from kedge.wire.convert import dtype_from_wire
from kedge.wire.errors import KedgeError
from kedge.wire.manifest import Manifest

ErrorOf = Callable[..., KedgeError]
"""Makes an error of what gRPC raises, and `is_closed`: whether this side has closed the call."""

BufferOf = Callable[[int], np.ndarray]


def messages_of(
    header: Message, encoder: FlatEncoder | RecordEncoder, request_type: Callable[..., Message]
) -> Iterator[bytes | Message]:
    """The rest of a stream after its header: chunks, encoded as they are asked for, and the trailer."""
    yield header
    yield from encoder
    yield request_type(trailer=StreamTrailer(crc32c=encoder.crc32c))  # known only once the chunks are out


def reported(messages: Iterable[bytes | Message], connection: Connection) -> Iterator[bytes | Message]:
    """The messages, and a word to their connection when gRPC, asking for the next one, has sent one."""
    for message in messages:
        yield message
        connection.sent()


def answers(call: Iterable[Any], error_of: ErrorOf, connection: Connection) -> Iterator[Any]:
    """The messages of a call, with its failures as `KedgeError`s."""
    try:
        for message in call:
            connection.heard()
            if isinstance(message, Malformed):
                raise internal_error(f"the server sent a message that cannot be read: {message.detail}")
            yield message
    except grpc.RpcError as error:
        raise error_of(error) from None


def _fresh(element_count: int) -> np.ndarray:
    return np.empty(element_count, np.float32)


def read_weights(messages: Iterator[Any], manifest: Manifest) -> WeightsOfStep:
    """Reads header, chunks and trailer; without chunks where the weights are unchanged.

    Raises:
        KedgeError: MANIFEST_MISMATCH if the run is another by now, CHECKSUM_MISMATCH, or INTERNAL.
    """
    header = _field(_next(messages), "header")
    _check_digest(header, manifest)
    return _read_values(messages, header, manifest, _fresh)


def _check_digest(header: WeightsHeader, manifest: Manifest) -> None:
    if header.manifest_digest != manifest.digest:
        raise KedgeError(
            "MANIFEST_MISMATCH",
            "the run has other tensors than when it was opened: it was deleted and created anew, get it again",
            expected=manifest.digest.hex(),
            got=header.manifest_digest.hex(),
        )


def _read_values(messages: Iterator[Any], header: WeightsHeader, manifest: Manifest, buffer: BufferOf) -> WeightsOfStep:
    """What follows a header."""
    try:
        return WeightsOfStep(header.step, _read_flat(messages, header, manifest, buffer))
    except KedgeError as error:
        if error.entry.status != "INVALID_ARGUMENT":
            raise
        raise internal_error(f"the server's stream of weights is wrong: {error.message}") from error


def _read_flat(
    messages: Iterator[Any], header: WeightsHeader, manifest: Manifest, buffer: BufferOf
) -> np.ndarray | None:
    if header.is_unchanged:
        _check_nothing(messages, header)
        return None
    parts = 2 if header.weights == WEIGHTS_FAST_AND_SLOW else 1
    flat = buffer(manifest.element_count * parts)
    decoder = FlatDecoder(flat, dtype=dtype_from_wire(header.dtype), size_bytes=header.size_bytes)
    message = _next(messages)
    while isinstance(message, Chunk):
        decoder.add(message)
        message = _next(messages)
    decoder.finish(_field(message, "trailer").crc32c)
    return flat


def _check_nothing(messages: Iterator[Any], header: WeightsHeader) -> None:
    crc32c = _field(_next(messages), "trailer").crc32c
    if header.size_bytes or crc32c:
        raise internal_error(f"the server says that nothing changed, and sent {header.size_bytes} bytes, CRC {crc32c}")


def _next(messages: Iterator[Any]) -> Any:
    message = next(messages, None)
    if message is None:
        # A server that drains may end a stream in good order.
        raise KedgeError("SERVER_UNAVAILABLE", "the server ended the stream before its answer was whole", address="")
    return message


def _field(message: Any, name: str) -> Any:
    kind = "chunk" if isinstance(message, Chunk) else message.WhichOneof("payload")
    if kind != name:
        raise internal_error(f"the server sent {kind or 'an unknown message'} where {name} was due")
    return getattr(message, name)


class Room(NamedTuple):
    """Where weights were asked for."""

    memory: LentMemory
    place: Range


def _make_room(memory: LentMemory | None, spec: PullSpec) -> Room | None:
    """Says where weights are wanted, if they can come into the memory."""
    if memory is None or spec.dtype != DTYPE_FLOAT32 or spec.weights == WEIGHTS_FAST_AND_SLOW:
        return None
    place = memory.room()
    spec.into.offset, spec.into.size_bytes = place
    return Room(memory, place)


class GrpcExchange:
    """The Exchange stream of one worker. gRPC's thread encodes and sends, the caller's reads and decodes.

    Args:
        connection: what it goes over.
        manifest: the run's.
        error_of: makes an error of what gRPC raises.
        memory: where float32 payloads are put instead, handed over to the server; None if all go over the connection.
        is_outdated: whether there are other credentials by now than it was opened with.
    """

    def __init__(
        self,
        connection: Connection,
        manifest: Manifest,
        error_of: ErrorOf,
        memory: LentMemory | None = None,
        *,
        is_outdated: Callable[[], bool] = lambda: False,
    ) -> None:
        self._is_outdated = is_outdated
        self._manifest = manifest
        self._memory = memory
        self._buffers = Buffers()
        self._is_closed = False
        self._requests: SimpleQueue[Iterable[bytes | Message] | None] = SimpleQueue()
        method = connection.channel.stream_stream(
            "/kedge.v1.OptimizerService/Exchange",
            request_serializer=serialize,
            response_deserializer=stream_parser(ExchangeResponse),
        )
        call = method(reported(_chained(self._requests), connection), metadata=connection.metadata)
        self._answers = answers(call, lambda error: error_of(error, is_closed=self._is_closed), connection)
        # Also when it is forgotten: gRPC's thread would wait for another request for ever.
        self._end = weakref.finalize(self, _end, self._requests, call)
        self._end.atexit = False
        if memory is not None:
            self._send([ExchangeRequest(memory=ExchangeMemory(ticket=memory.ticket))])

    @property
    def is_outdated(self) -> bool:
        """Whether another is to be opened before the next operation, for the sake of other credentials."""
        return self._is_outdated()

    def push(self, push: Push) -> tuple[PushResult, WeightsOfStep | None]:
        """Sends one contribution; blocks until its result, and the weights if it asks for them, are here."""
        header, memory = convert.push_header(push, self._manifest), self._memory
        into = _make_room(memory, header.pull) if push.pull else None
        if memory is not None and push.dtype == "float32":
            memory.put(push.arrays)
            header.in_memory.offset, header.in_memory.size_bytes = memory.gradient
            self._send([ExchangeRequest(push=header)])
        else:
            encoder = gradient_encoder(push.arrays, push.dtype)
            self._send(messages_of(ExchangeRequest(push=header), encoder, ExchangeRequest))
        message = _field(_next(self._answers), "result")
        result = convert.push_result(message, push)
        if not push.pull:
            return result, None
        if message.HasField("weights"):
            return result, self._weights_at_once(message.weights, into)
        return result, self._read(into)

    def pull(self, worker: str, request: PullRequest) -> WeightsOfStep:
        """Fetches weights of the worker's run; blocks until they are here."""
        spec = convert.pull_spec(request)
        into = _make_room(self._memory, spec)
        self._send([ExchangeRequest(pull=ExchangePull(worker=worker, pull=spec))])
        return self._read(into)

    def close(self) -> None:
        """Ends the stream."""
        self._is_closed = True
        self._memory = None  # an exchange is part of a cycle, and so much memory is not to wait for the collector
        self._end()

    def _read(self, into: Room | None) -> WeightsOfStep:
        """The weights that were asked for, in messages of their own."""
        header = _field(_next(self._answers), "header")
        if header.in_memory:
            return self._weights_at_once(header, into)
        _check_digest(header, self._manifest)
        return _read_values(self._answers, header, self._manifest, self._buffers.take)

    def _weights_at_once(self, header: WeightsHeader, into: Room | None) -> WeightsOfStep:
        """The weights that nothing follows the header of."""
        _check_digest(header, self._manifest)
        if header.in_memory and into is not None:
            return WeightsOfStep(header.step, into.memory.take(into.place))
        if header.in_memory or not header.is_unchanged:
            raise internal_error("the server says that weights are where none were wanted")
        return WeightsOfStep(header.step, None)

    def _send(self, messages: Iterable[bytes | Message]) -> None:
        if self._is_closed:
            raise cancelled_error()
        self._requests.put(messages)


class GrpcWatch:
    """The events of a run, an iterator. Made when the server's first message is here: the watch has begun then."""

    def __init__(self, call: Any, error_of: ErrorOf, connection: Connection) -> None:
        self._call = call
        self._is_closed = False
        self._messages = answers(call, lambda error: error_of(error, is_closed=call.cancelled()), connection)
        self._pending: deque[Event] = deque()
        try:
            first = self._read()
            self.last_number: int = first.last_number
            self.server_generation: int = first.server_generation
        except BaseException:
            call.cancel()
            raise

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Event:
        while not self._is_closed:
            if self._pending:
                return self._pending.popleft()
            self._read()
        raise cancelled_error()

    def close(self) -> None:
        """Ends the stream, from any thread."""
        self._is_closed = True
        self._call.cancel()

    def _read(self) -> WatchRunResponse:
        message: WatchRunResponse = _next(self._messages)
        self._pending.extend(convert.events(message.events))
        return message


def _end(requests: "SimpleQueue[Iterable[bytes | Message] | None]", call: grpc.Call) -> None:
    requests.put(None)
    call.cancel()


def _chained(groups: "SimpleQueue[Iterable[bytes | Message] | None]") -> Iterator[bytes | Message]:
    """The request iterator. gRPC asks for a message when the one before is sent: at most two chunks are in memory."""
    while (messages := groups.get()) is not None:
        yield from messages
