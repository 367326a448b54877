"""What both sides read: messages, chunks, records, names."""

import struct
from collections.abc import Callable
from typing import Any

import numpy as np
from google.protobuf.message import Message
from wire_client import manifest, stream

from kedge import optim, policies
from kedge.v1 import optimizer_pb2, run_pb2, schedule_pb2, tensor_pb2
from kedge.v1 import optimizer_service_pb2 as optimizer_pb
from kedge.v1 import run_service_pb2 as run_pb
from kedge.wire import compressed, names
from kedge.wire import convert as wire
from kedge.wire.codec import FlatDecoder, Malformed, decode_chunk, stream_parser
from kedge.wire.errors import KedgeError
from kedge.wire.groups import change_from_wire, change_to_wire, group_to_wire, groups_from_wire
from kedge.wire.policies import (
    admission_from_wire,
    admission_to_wire,
    checkpoints_from_wire,
    checkpoints_to_wire,
    policy_from_wire,
    policy_to_wire,
)
from kedge.wire.schedules import rate_from_wire, rate_to_wire
from kedge_server.storage import plain

from .decoder import (
    ELEMENTS,
    GROUPS,
    MANIFEST,
    OPTIMIZERS,
    POLICIES,
    SCHEDULES,
    VALUES,
    Decoder,
    Refused,
    of_messages,
    pieces,
)


def _read_stream(message_type: Callable[[], Message]) -> Callable[[bytes], None]:
    parse = stream_parser(message_type)

    def read(raw: bytes) -> None:
        if isinstance(parse(raw), Malformed):
            raise Refused

    return read


def _streamed(message_type: Callable[..., Any], header: Message | None = None) -> Decoder:
    kind: Any = message_type
    head = kind(header=header) if header is not None else kind()
    corpus = [one.SerializeToString() for one in stream(kind, head, VALUES[:40].tobytes())]
    return Decoder(_read_stream(message_type), corpus, (Refused,), message_type)


def _chunk_sequence(raw: bytes) -> None:
    """Chunks in whatever order and place, of a gradient of few elements."""
    dtype = ("float32", "bfloat16", "float16")[raw[0] % 3 if raw else 0]
    decoder = FlatDecoder(np.empty(40, np.float32), dtype=dtype, size_bytes=40 * compressed.DTYPES[dtype].itemsize)
    for piece in pieces(raw[1:]):
        chunk = decode_chunk(piece)
        if chunk is not None:
            decoder.add(chunk)
    decoder.finish(0)


def _in_chunks(size: int) -> bytes:
    kind = optimizer_pb.PushGradientsRequest
    data = VALUES[:40].tobytes()
    return b"\0" + b"|".join(one.SerializeToString() for one in stream(kind, kind(), data)[1:2]) + bytes(size % 2)


def _records(dtype: str) -> Decoder:
    """Records of a compressed gradient, their length as it comes."""
    raw = _valid_records(dtype)

    def read(raw: bytes) -> None:
        compressed.decoded(np.frombuffer(raw, np.uint8), dtype, ELEMENTS)

    return Decoder(read, [raw, raw[:64], b""])


def _valid_records(dtype: str) -> bytes:
    if dtype == "top_k":
        return b"".join(struct.pack("<If", index, 0.5) for index in range(0, ELEMENTS, 37))
    counts = (1024, 1024, ELEMENTS - 2048)
    lengths = counts if dtype == "int8" else [count // 8 for count in counts]
    return b"".join(struct.pack("<f", 0.5) + bytes(at % 127 for at in range(length)) for length in lengths)


def _names(raw: bytes) -> None:
    text = raw.decode("utf-8", "replace")
    refusals = [refusal for parse in _PARSERS if (refusal := _refusal(parse, text)) is not None]
    assert all(refusal.reason == "INVALID_NAME" and len(str(refusal)) < 500 for refusal in refusals)
    if len(refusals) == len(_PARSERS):
        raise Refused


def _refusal(parse: Callable[[str], object], text: str) -> KedgeError | None:
    try:
        parse(text)
    except KedgeError as error:
        return error
    return None


_PARSERS = (
    names.run_name,
    names.parse_run,
    names.parse_worker,
    names.parse_checkpoint,
    names.check_checkpoint_id,
)


def _again(read: Callable[[Any], Any], write: Callable[[Any], object]) -> Callable[[Any], object]:
    """What is taken can be told again, and kept."""

    def both(message: Any) -> None:
        value = read(message)
        write(value)
        assert plain.decode(plain.encode(value)) is not None

    return both


WIRE: dict[str, Decoder] = {
    "chunks": Decoder(decode_chunk, _streamed(optimizer_pb.PushGradientsRequest).corpus),
    "PushGradientsRequest": _streamed(optimizer_pb.PushGradientsRequest, optimizer_pb.PushHeader(worker="runs/a")),
    "ExchangeRequest": _streamed(optimizer_pb.ExchangeRequest),
    "CreateRunRequest": _streamed(run_pb.CreateRunRequest, run_pb.CreateRunHeader(run_id="a", manifest=manifest((3,)))),
    "PullWeightsResponse": _streamed(optimizer_pb.PullWeightsResponse, optimizer_pb.WeightsHeader(step=4)),
    "ExchangeResponse": _streamed(optimizer_pb.ExchangeResponse),
    "flat range": Decoder(_chunk_sequence, [_in_chunks(0), _in_chunks(1)]),
    **{f"records of {dtype}": _records(dtype) for dtype in compressed.COMPRESSED},
    "names": Decoder(_names, [b"runs/a", b"runs/a/workers/w.1", b"runs/a/checkpoints/7-12", b"a-b_c"], (Refused,)),
    "manifest": of_messages(
        tensor_pb2.Manifest,
        lambda message: wire.manifest_to_wire(wire.manifest_from_wire(message)),
        [wire.manifest_to_wire(MANIFEST), manifest((3, 4), (5,))],
    ),
    "optimizer": of_messages(
        optimizer_pb2.Optimizer,
        _again(wire.optimizer_from_wire, wire.optimizer_to_wire),
        map(wire.optimizer_to_wire, OPTIMIZERS),
    ),
    "learning rate": of_messages(
        schedule_pb2.LearningRate,
        _again(lambda message: rate_from_wire(message, "lr"), rate_to_wire),
        map(rate_to_wire, [0.1, *SCHEDULES]),
    ),
    "groups": of_messages(
        run_pb.CreateRunHeader,
        _again(lambda message: groups_from_wire(message.groups), lambda groups: list(map(group_to_wire, groups))),
        [run_pb.CreateRunHeader(groups=map(group_to_wire, GROUPS))],
    ),
    "change": of_messages(
        run_pb2.HyperparameterChange,
        _again(change_from_wire, lambda made: change_to_wire(made.group, made.change, step=made.step)),
        [change_to_wire("bias", optim.controls.Change(lr=SCHEDULES[1], grad_clip_norm=2.0), step=3)],
    ),
    "policy": of_messages(run_pb2.Aggregation, _again(policy_from_wire, policy_to_wire), map(policy_to_wire, POLICIES)),
    "admission": of_messages(
        run_pb2.Admission,
        _again(admission_from_wire, admission_to_wire),
        [admission_to_wire(policies.Admission(max_norm=3.0, outlier_factor=9.0, quarantine_after=2))],
    ),
    "checkpointing": of_messages(
        run_pb2.Checkpointing,
        _again(checkpoints_from_wire, checkpoints_to_wire),
        [checkpoints_to_wire(policies.Checkpoints(every_steps=5, keep_latest=2, keep_best=1, metric="loss"))],
    ),
}
