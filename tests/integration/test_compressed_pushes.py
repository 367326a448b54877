"""Compressed gradients from a client that knows only the .proto files, byte by byte, and what the server refuses."""

import re
import struct
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from wire_client import WireClient, crc32c, error_info, floats, push_header, sgd, stream

import kedge
from kedge import optim
from kedge.compression import encoding_of
from kedge.v1 import optimizer_service_pb2 as pb
from kedge.v1 import run_pb2, tensor_pb2
from kedge.wire.convert import optimizer_to_wire

PUSH = pb.PushGradientsRequest
INT8 = struct.pack("<f4b", 0.5, 4, -2, 0, 127)
TOP_K = struct.pack("<IfIf", 1, -1.5, 3, 0.25)
SIGN = struct.pack("<fB", 2.0, 0b0101)
NUMBERS = {"int8": tensor_pb2.DTYPE_INT8, "top_k": tensor_pb2.DTYPE_TOP_K, "sign": tensor_pb2.DTYPE_SIGN}
DOCUMENT = Path(__file__).parents[2] / "docs" / "protocol.md"
EXAMPLES = dict(re.findall(r"<!-- example: (\w+) records -->\n```text\n(.*?)```", DOCUMENT.read_text(), re.DOTALL))


@pytest.fixture
def run(wire: WireClient, run_id: str) -> Any:
    return wire.create(run_id, floats(0, 0, 0, 0), optimizer=sgd(lr=1.0))


def push_of(run: Any, lease: Any, dtype: str, data: bytes, **fields: Any) -> list[Any]:
    defaults = {"dtype": NUMBERS[dtype], "size_bytes": len(data)}
    return stream(PUSH, PUSH(header=push_header(lease, run.manifest.digest, **(defaults | fields))), data)


def refused(wire: WireClient, requests: list[Any]) -> Any:
    with pytest.raises(grpc.RpcError) as caught:
        wire.push(requests)
    return error_info(caught.value)


@pytest.mark.parametrize(
    ("dtype", "data", "weights"),
    [
        ("int8", INT8, [-2.0, 1.0, 0.0, -63.5]),
        ("top_k", TOP_K, [0.0, 1.5, 0.0, -0.25]),
        ("top_k", b"", [0.0, 0.0, 0.0, 0.0]),
        ("sign", SIGN, [2.0, -2.0, 2.0, -2.0]),
    ],
)
def test_records_are_what_the_proto_file_says(
    wire: WireClient, run: Any, dtype: str, data: bytes, weights: Any
) -> None:
    result = wire.push(push_of(run, wire.join(run.name), dtype, data))
    assert result.outcome == pb.PUSH_OUTCOME_APPLIED
    assert wire.pull(run.name)[1].tolist() == weights


@pytest.mark.parametrize(
    ("dtype", "values"),
    [("int8", [127, 0, 1, -2, 0, 1]), ("sign", [2, -2, 2, -2, 2, 2]), ("top_k", [127, 0, 0, -2, 0, 0])],
)
def test_the_documents_examples_are_what_it_says(wire: WireClient, run_id: str, dtype: str, values: Any) -> None:
    run = wire.create(run_id, np.zeros(6, np.float32), optimizer=sgd(lr=1.0))
    data = bytes.fromhex("".join(line.partition("#")[0] for line in EXAMPLES[dtype].splitlines()))
    wire.push(push_of(run, wire.join(run.name), dtype, data))
    assert (-wire.pull(run.name)[1]).tolist() == values


@pytest.mark.parametrize(("wire_dtype", "name"), [("int8", "int8"), (kedge.TopK(1 / 3), "top_k")])
def test_the_sdk_makes_the_documents_examples(wire_dtype: str | kedge.TopK, name: str) -> None:
    (records,) = encoding_of(wire_dtype, None).encode([floats(127, -0.25, 0.75, -2, 0, 1)])
    assert records.tobytes() == bytes.fromhex("".join(line.partition("#")[0] for line in EXAMPLES[name].splitlines()))


@pytest.mark.parametrize(
    ("dtype", "data", "reason"),
    [
        ("int8", INT8[:-1], "SIZE_MISMATCH"),
        ("int8", INT8 + b"\0", "SIZE_MISMATCH"),
        ("sign", SIGN + b"\0", "SIZE_MISMATCH"),
        ("top_k", TOP_K[:-1], "SIZE_MISMATCH"),
        ("top_k", TOP_K * 3, "SIZE_MISMATCH"),
        ("int8", struct.pack("<f4b", 0.5, 4, -128, 0, 1), "MALFORMED_MESSAGE"),
        ("sign", struct.pack("<fB", 2.0, 0b10101), "MALFORMED_MESSAGE"),
        ("top_k", TOP_K[8:] + TOP_K[:8], "MALFORMED_MESSAGE"),
        ("top_k", struct.pack("<If", 4, 1.0), "MALFORMED_MESSAGE"),
    ],
)
def test_records_that_no_value_is_written_as_are_refused(
    wire: WireClient, run: Any, dtype: str, data: bytes, reason: str
) -> None:
    lease = wire.join(run.name)
    assert refused(wire, push_of(run, lease, dtype, data)).reason == reason
    # Nothing was recorded, and no buffer of what was refused is used: the same sequence is free.
    assert wire.push(push_of(run, lease, "int8", INT8)).step == 1


def test_non_finite_scale_is_a_non_finite_gradient(wire: WireClient, run: Any) -> None:
    result = wire.push(push_of(run, wire.join(run.name), "sign", struct.pack("<fB", float("nan"), 0)))
    assert (result.outcome, result.reason) == (pb.PUSH_OUTCOME_REJECTED, "NON_FINITE_GRADIENT")


def test_norm_is_that_of_the_elements_and_not_of_the_bytes(wire: WireClient, run_id: str) -> None:
    run = wire.create(run_id, floats(0, 0, 0, 0), admission=run_pb2.Admission(max_norm=3.9))
    lease = wire.join(run.name)
    result = wire.push(push_of(run, lease, "sign", SIGN))  # four elements of 2: the norm is 4
    assert (result.outcome, result.reason) == (pb.PUSH_OUTCOME_REJECTED, "NORM_ABOVE_LIMIT")
    small = struct.pack("<fB", 1.9, 0)
    assert wire.push(push_of(run, lease, "sign", small, sequence=2)).outcome == pb.PUSH_OUTCOME_APPLIED


@pytest.mark.parametrize("optimizer", [optim.AdaBelief(), optim.Lookahead(optim.Optax("adabelief"))], ids=repr)
def test_signs_are_refused_before_they_are_read(wire: WireClient, run_id: str, optimizer: optim.Optimizer) -> None:
    run = wire.create(run_id, floats(0, 0, 0, 0), optimizer=optimizer_to_wire(optimizer))
    lease = wire.join(run.name)
    header, *_ = push_of(run, lease, "sign", SIGN)
    assert refused(wire, [header, header]).reason == "COMPRESSION_UNSAFE"  # what follows is no chunk, and not looked at
    assert wire.push(push_of(run, lease, "int8", INT8)).outcome == pb.PUSH_OUTCOME_APPLIED


def test_signs_are_taken_by_adabelief_with_a_greatest_direction(wire: WireClient, run_id: str) -> None:
    optimizer = optimizer_to_wire(optim.AdaBelief(lr=1.0, max_direction=0.25))
    run = wire.create(run_id, floats(0, 0, 0, 0), optimizer=optimizer)
    assert run.optimizer.adabelief.max_direction == 0.25
    wire.push(push_of(run, wire.join(run.name), "sign", SIGN))
    assert wire.pull(run.name)[1].tolist() == [0.25, -0.25, 0.25, -0.25]


@pytest.mark.parametrize("dtype", NUMBERS)
def test_weights_do_not_come_compressed(wire: WireClient, run: Any, dtype: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        wire.pull(run.name, dtype=NUMBERS[dtype])
    assert error_info(caught.value).reason == "UNSUPPORTED_DTYPE"


@pytest.mark.parametrize(("dtype", "data"), [("int8", INT8), ("top_k", TOP_K), ("sign", SIGN)])
def test_runs_are_not_created_from_compressed_weights(wire: WireClient, run_id: str, dtype: str, data: bytes) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        wire.create(run_id, floats(0, 0, 0, 0), dtype=NUMBERS[dtype], size_bytes=len(data))
    assert error_info(caught.value).reason == "UNSUPPORTED_DTYPE"


def test_many_records_in_one_large_message(wire: WireClient, run_id: str) -> None:
    count = 1_500_000
    run = wire.create(run_id, np.zeros(count, np.float32))
    indices = np.arange(0, count, 7, dtype="<u4")
    records = np.empty(len(indices), [("index", "<u4"), ("value", "<f4")])
    records["index"], records["value"] = indices, -1.0 - indices
    data = records.tobytes()
    header = PUSH(
        header=push_header(wire.join(run.name), run.manifest.digest, dtype=tensor_pb2.DTYPE_TOP_K, size_bytes=len(data))
    )
    chunk = PUSH(chunk=tensor_pb2.Chunk(offset=0, data=data))
    wire.push([header, chunk, PUSH(trailer=tensor_pb2.StreamTrailer(crc32c=crc32c(data)))])
    want = np.zeros(count, np.float32)
    want[::7] = 1.0 + indices
    assert wire.pull(run.name)[1].tobytes() == want.tobytes()
