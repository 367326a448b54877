"""Calls of every RPC with what it does not expect, a batch on a connection, in HTTP/2 of our own."""

import random
import struct
import time
from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

from crowd import Connection, data_frames, frame
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message_factory import GetMessageClass
from wire_client import chunks, manifest, push_header, push_stream, sgd, stream, synchronous

from kedge.v1 import checkpoint_service_pb2 as checkpoint_pb
from kedge.v1 import optimizer_service_pb2 as optimizer_pb
from kedge.v1 import run_service_pb2 as run_pb
from kedge.v1 import tensor_pb2
from kedge.wire import convert as wire

from .decoder import OPTIMIZERS, VALUES
from .mutations import Mutator
from .request_decoders import REQUESTS

METHODS: dict[str, MethodDescriptor] = {
    method.name: method
    for module in (run_pb, optimizer_pb, checkpoint_pb)
    for service in module.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}
MAY_WAIT = frozenset({"WatchRun", "PushGradients", "PullWeights", "Exchange", "CreateRun"})
DEADLINE_SECONDS = 0.1
"""Of calls that may wait for something: their client says so, and the server ends them."""

BATCH_CALLS = 200
BATCH_STREAMS = 50
BATCH_BYTES = 50_000
"""A connection takes 65 535 before it has to be told that more may come (RFC 9113, section 6.9.2)."""

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_HEADERS, _RST_STREAM, _SETTINGS, _WINDOW_UPDATE = 1, 3, 4, 8
_END_STREAM, _END_HEADERS = 1, 4
_CANCEL = struct.pack(">I", 8)
_STREAM_WINDOW = frame(_SETTINGS, 0, 0, struct.pack(">HI", 4, 1 << 20))
_WINDOW = _STREAM_WINDOW + frame(_WINDOW_UPDATE, 0, 0, struct.pack(">I", 1 << 30))
_PATIENCE_SECONDS = 10


class Target(NamedTuple):
    """What valid inputs are about: a run of four elements, and a lease of it."""

    run: Any
    lease: Any


def literal(name: bytes, value: bytes) -> bytes:
    """A header without an index and without compression (RFC 7541, section 6.2.2)."""
    return b"\x00" + b"".join(bytes([len(text)]) + text for text in (name, value))


class Caller(Connection):
    """Makes calls, and waits until each has ended.

    Args:
        address: HOST:PORT.
        token: goes along with each call, if given.
    """

    def __init__(self, address: str, token: str | None) -> None:
        super().__init__(address)
        self._token = token
        self._open: set[int] = set()
        self.send(_PREFACE + _WINDOW)

    def call(self, method: MethodDescriptor, data: bytes, rng: random.Random) -> bytes:
        """The frames of a call. A few are left open or are cancelled at once."""
        stream_id, self._next_stream = self._next_stream, self._next_stream + 2
        path = f"/{method.containing_service.full_name}/{method.name}".encode()
        fields = b"\x83\x86" + b"\x04" + bytes([len(path)]) + path + b"\x01\x05kedge"
        fields += literal(b"te", b"trailers") + literal(b"content-type", b"application/grpc")
        if method.name in MAY_WAIT:
            fields += literal(b"grpc-timeout", b"%dm" % round(1e3 * DEADLINE_SECONDS))
        if self._token is not None:
            fields += literal(b"authorization", b"Bearer " + self._token.encode())
        chance = rng.random()
        frames = frame(_HEADERS, _END_HEADERS, stream_id, fields) + data_frames(stream_id, data, ends=chance >= 0.1)
        if chance < 0.1:
            return frames + (frame(_RST_STREAM, 0, stream_id, _CANCEL) if chance < 0.05 else b"")  # nobody waits
        self._open.add(stream_id)
        return frames

    def finish(self) -> float:
        """Waits until all calls have ended, but for those that nobody waits for. Returns the seconds that it took."""
        begun = time.monotonic()
        while not self._open <= self.ended_streams and not self.is_closed:
            assert time.monotonic() < begun + _PATIENCE_SECONDS, f"{len(self._open - self.ended_streams)} calls hang"
            self.receive()
        assert not self.is_closed, "the server hung up"
        return time.monotonic() - begun


class Requests:
    """Makes the data of calls of one method.

    Args:
        method: which one.
        target: what valid ones are about.
        seed: what they follow from.
    """

    def __init__(self, method: MethodDescriptor, target: Target, seed: int) -> None:
        self._streams = valid(method, target)
        corpus = list(chain.from_iterable(self._streams))
        self._mutator = Mutator(seed, corpus, GetMessageClass(method.input_type))
        self._is_stream = method.client_streaming
        self.batch_size = BATCH_STREAMS if self._is_stream else BATCH_CALLS
        self.random = self._mutator.random

    def next(self) -> bytes:
        """The messages of another call, as gRPC frames them, or nearly so."""
        messages = self._messages() if self._is_stream else [self._mutator.next()]
        data = b"".join(struct.pack(">BI", 0, len(message)) + message for message in messages)
        return self._lying(data) if self.random.random() < 0.1 else data

    def _messages(self) -> list[bytes]:
        """A stream with one to three things wrong."""
        messages = list(self.random.choice(self._streams))
        for _ in range(self.random.randint(1, 3)):
            at = self.random.randrange(len(messages) + 1)
            match self.random.randrange(5):
                case 0:
                    messages.insert(at, self._mutator.next())
                case 1:
                    messages[at : at + 1] = map(self._mutator.mutated, messages[at : at + 1])
                case 2:
                    messages[at : at + 1] = []
                case 3:
                    self.random.shuffle(messages)
                case _:
                    messages[at:at] = messages[at : at + 1]
        return messages

    def _lying(self, data: bytes) -> bytes:
        """Says that it is compressed, or of another length, or stops in the middle."""
        head = bytearray(data[:5])
        match self.random.randrange(4):
            case 0:
                head[:1] = b"\x01"
            case 1:
                head[1:5] = struct.pack(">I", self.random.choice((0, 1, 100, 5 << 20, 1 << 31, (1 << 32) - 1)))
            case 2:
                head[:1] = self.random.randbytes(1)
            case _:
                return data[: self.random.randrange(len(data) + 1)]
        return bytes(head) + data[5:]


def valid(method: MethodDescriptor, target: Target) -> list[list[bytes]]:
    """Valid calls of a method, each the messages of one."""
    if method.name in _STREAMS:
        return [[message.SerializeToString() for message in one] for one in _STREAMS[method.name](target)]
    message_type: Any = GetMessageClass(method.input_type)
    decoder = REQUESTS.get(method.name)
    texts = {"run": "runs/fuzz", "name": "runs/fuzz", "worker": target.lease.worker}
    calls = []
    for raw in decoder.corpus if decoder else [b""]:
        message = message_type.FromString(raw)
        for field in message.DESCRIPTOR.fields_by_name.keys() & texts.keys():
            of_checkpoint = method.name in ("RestoreCheckpoint", "ForkCheckpoint")
            setattr(message, field, texts[field] + ("/checkpoints/1-2" if of_checkpoint else ""))
        if "epoch" in message.DESCRIPTOR.fields_by_name:
            message.epoch = target.lease.epoch
        calls.append([message.SerializeToString()])
    return calls


def _creations(_: Target) -> list[list[Any]]:
    kind, data = run_pb.CreateRunRequest, VALUES[:12].tobytes()
    fields: dict[str, Any] = {"manifest": manifest((3, 4)), "dtype": tensor_pb2.DTYPE_FLOAT32, "size_bytes": len(data)}
    headers = [run_pb.CreateRunHeader(run_id="x", optimizer=sgd(), aggregation=synchronous(1), **fields)]
    headers += [
        run_pb.CreateRunHeader(
            run_id=f"x{number}",
            optimizer=wire.optimizer_to_wire(optimizer),
            aggregation=synchronous(2),
            **fields,
        )
        for number, optimizer in enumerate(OPTIMIZERS)
    ]
    return [stream(kind, kind(header=header), data) for header in headers]


def _pushes(target: Target) -> list[list[Any]]:
    digest, kind, data = target.run.manifest.digest, optimizer_pb.PushGradientsRequest, VALUES[:4].tobytes()
    header = push_header(target.lease, digest, size_bytes=len(data), loss=0.5)
    trailer = kind(trailer=tensor_pb2.StreamTrailer(crc32c=1))
    return [push_stream(target.lease, digest, VALUES[:4]), [kind(header=header), *chunks(kind, data, 4), trailer]]


def _exchanges(target: Target) -> list[list[Any]]:
    kind = optimizer_pb.ExchangeRequest
    pull = optimizer_pb.ExchangePull(worker=target.lease.worker, pull=optimizer_pb.PullSpec())
    pushes = [
        [kind(push=message.header) if message.HasField("header") else kind.FromString(message.SerializeToString())]
        for message in _pushes(target)[0]
    ]
    memory = kind(memory=optimizer_pb.ExchangeMemory(ticket=b"0123456789abcdef"))
    return [[kind(pull=pull)], list(chain.from_iterable(pushes)), [memory, kind(pull=pull)]]


_STREAMS = {"CreateRun": _creations, "PushGradients": _pushes, "Exchange": _exchanges}


def batches(requests: Requests, count: int) -> Sequence[list[bytes]]:
    """The data of so many calls, as much together as a connection takes."""
    made: list[list[bytes]] = []
    room = 0
    for _ in range(count):
        data = requests.next()
        if not made or room < len(data) or len(made[-1]) == requests.batch_size:
            made.append([])
            room = BATCH_BYTES
        room -= len(data)
        made[-1].append(data)
    return made
