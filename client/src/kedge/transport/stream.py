"""Streams over gRPC: weights coming in, contributions going out, the long-lived Exchange, and the events of a run."""

import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from queue import SimpleQueue
from typing import Any, Self

import grpc
import numpy as np
from google.protobuf.message import Message

from kedge.transport import convert
from kedge.transport.channels import Connection
from kedge.transport.status import cancelled_error, internal_error
from kedge.transport.values import Event, PullRequest, Push, PushResult, WeightsOfStep
from kedge.v1.optimizer_service_pb2 import ExchangePull, ExchangeRequest, ExchangeResponse, WeightsHeader
from kedge.v1.run_service_pb2 import WatchRunResponse
from kedge.v1.tensor_pb2 import WEIGHTS_FAST_AND_SLOW, StreamTrailer
from kedge.wire.codec import Chunk, FlatDecoder, FlatEncoder, Malformed, serialize, stream_parser
from kedge.wire.convert import dtype_from_wire
from kedge.wire.errors import KedgeError
from kedge.wire.manifest import Manifest

ErrorOf = Callable[[grpc.RpcError], KedgeError]


def messages_of(
    header: Message, encoder: FlatEncoder, request_type: Callable[..., Message]
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


def read_weights(messages: Iterator[Any], manifest: Manifest) -> WeightsOfStep:
    """Reads header, chunks and trailer; without chunks where the weights are unchanged.

    Raises:
        KedgeError: MANIFEST_MISMATCH if the run is another by now, CHECKSUM_MISMATCH, or INTERNAL.
    """
    header = _field(_next(messages), "header")
    if header.manifest_digest != manifest.digest:
        raise KedgeError(
            "MANIFEST_MISMATCH",
            "the run has other tensors than when it was opened: it was deleted and created anew, get it again",
            expected=manifest.digest.hex(),
            got=header.manifest_digest.hex(),
        )
    try:
        return WeightsOfStep(header.step, _read_flat(messages, header, manifest))
    except KedgeError as error:
        if error.entry.status != "INVALID_ARGUMENT":
            raise
        raise internal_error(f"the server's stream of weights is wrong: {error.message}") from error


def _read_flat(messages: Iterator[Any], header: WeightsHeader, manifest: Manifest) -> np.ndarray | None:
    if header.is_unchanged:
        _check_nothing(messages, header)
        return None
    parts = 2 if header.weights == WEIGHTS_FAST_AND_SLOW else 1
    flat = np.empty(manifest.element_count * parts, np.float32)
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


class GrpcExchange:
    """The Exchange stream of one worker. gRPC's thread encodes and sends, the caller's reads and decodes."""

    def __init__(self, connection: Connection, manifest: Manifest, error_of: Callable[..., KedgeError]) -> None:
        self._manifest = manifest
        self._is_closed = False
        self._requests: SimpleQueue[Iterable[bytes | Message] | None] = SimpleQueue()
        method = connection.channel.stream_stream(
            "/kedge.v1.OptimizerService/Exchange",
            request_serializer=serialize,
            response_deserializer=stream_parser(ExchangeResponse),
        )
        call = method(reported(_chained(self._requests), connection))
        self._answers = answers(call, lambda error: error_of(error, is_closed=self._is_closed), connection)
        # Also when it is forgotten: gRPC's thread would wait for another request for ever.
        self._end = weakref.finalize(self, _end, self._requests, call)
        self._end.atexit = False

    def push(self, push: Push) -> tuple[PushResult, WeightsOfStep | None]:
        """Sends one contribution; blocks until its result, and the weights if it asks for them, are here."""
        header = ExchangeRequest(push=convert.push_header(push, self._manifest))
        self._send(messages_of(header, FlatEncoder(push.arrays, push.dtype), ExchangeRequest))
        result = convert.push_result(_field(_next(self._answers), "result"), push)
        return result, read_weights(self._answers, self._manifest) if push.pull else None

    def pull(self, worker: str, request: PullRequest) -> WeightsOfStep:
        """Fetches weights of the worker's run; blocks until they are here."""
        self._send([ExchangeRequest(pull=ExchangePull(worker=worker, pull=convert.pull_spec(request)))])
        return read_weights(self._answers, self._manifest)

    def close(self) -> None:
        """Ends the stream."""
        self._is_closed = True
        self._end()

    def _send(self, messages: Iterable[bytes | Message]) -> None:
        if self._is_closed:
            raise cancelled_error()
        self._requests.put(messages)


class GrpcWatch:
    """The events of a run, an iterator. Made when the server's first message is here: the watch has begun then."""

    def __init__(self, call: Any, error_of: Callable[..., KedgeError], connection: Connection) -> None:
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
