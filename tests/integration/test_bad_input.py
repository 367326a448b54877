"""Each bad input has its reason and changes nothing: no weight, no moment, no counter, no sequence."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import grpc
import numpy as np
import pytest
from google.protobuf.duration_pb2 import Duration
from server_process import ServerProcess
from wire_client import (
    WireClient,
    chunks,
    crc32c,
    error_info,
    floats,
    manifest,
    push_header,
    push_stream,
    reason_of,
    sgd,
)

from kedge.v1 import optimizer_pb2, run_pb2, run_service_pb2, tensor_pb2
from kedge.v1 import optimizer_service_pb2 as pb
from kedge.wire.errors import CATALOGUE

WEIGHTS = floats(4, 3, 2, 1)
GRADIENT = floats(1, 1, 1, 1)
GOOD = GRADIENT.tobytes()
PUSH = pb.PushGradientsRequest


class Target(NamedTuple):
    """A run with momentum and Lookahead, one contribution applied, and a worker on it."""

    wire: WireClient
    run: run_pb2.Run
    lease: run_service_pb2.JoinRunResponse
    step: int = 1
    sequence: int = 2
    """The worker's next one."""

    def header(self, **fields: Any) -> Any:
        defaults = {"sequence": self.sequence, "base_step": self.step, "size_bytes": len(GOOD)}
        return PUSH(header=push_header(self.lease, self.run.manifest.digest, **(defaults | fields)))

    def good(self, gradient: np.ndarray = GRADIENT, **fields: Any) -> list[Any]:
        defaults = {"sequence": self.sequence, "base_step": self.step}
        return push_stream(self.lease, self.run.manifest.digest, gradient, **(defaults | fields))

    def state(self) -> tuple[Any, ...]:
        state = self.wire.run(self.run.name).state
        worker = state.workers[0]
        _, both = self.wire.pull(self.run.name, weights=tensor_pb2.WEIGHTS_FAST_AND_SLOW)
        counters = (state.step, state.lookahead_sync_count, state.applied_count, dict(state.rejected_counts))
        return (*counters, worker.last_sequence, worker.applied_count, worker.rejected_count, both.tobytes())


@pytest.fixture
def target(wire: WireClient, run_id: str) -> Iterator[Target]:
    optimizer = sgd(lr=1, sync_period=3, alpha=0.5)
    optimizer.sgd.momentum = 0.5
    run = wire.create(run_id, WEIGHTS, optimizer=optimizer, shapes=[(2,), (2,)])
    target = Target(wire, run, wire.join(run.name, lease=Duration(seconds=60)))
    wire.push(target.good(sequence=1, base_step=0))
    yield target
    # Whatever happened, the next good contribution does what it would have done: the moments are as they were.
    # v = 1, then 0.5 * 1 + 1 = 1.5; weights 4 -> 3 -> 1.5.
    sequence = wire.run(run.name).state.workers[0].last_sequence + 1
    assert wire.push(target.good(sequence=sequence)).outcome == pb.PUSH_OUTCOME_APPLIED
    assert wire.pull(run.name)[1].tolist() == [1.5, 0.5, -0.5, -1.5]


def trailer(checksum: int) -> Any:
    return PUSH(trailer=tensor_pb2.StreamTrailer(crc32c=checksum))


def chunk(offset: int, data: bytes) -> Any:
    return PUSH(chunk=tensor_pb2.Chunk(offset=offset, data=data))


GOOD_TAIL = [*chunks(PUSH, GOOD), trailer(crc32c(GOOD))]

NOT_WORKERS = {
    "no name": "",
    "a run's name": "runs/r",
    "an id alone": "w1",
    "no runs/": "digits/w1",
    "a slash before": "/runs/r/workers/w1",
    "a slash behind": "runs/r/workers/w1/",
    "one part more": "runs/r/workers/w1/x",
    "an empty run": "runs//workers/w1",
    "an empty worker": "runs/r/workers/",
    "another collection": "runs/r/nodes/w1",
    "capital letters": "RUNS/r/WORKERS/w1",
    "a dash before": "runs/r/workers/-w1",
    "a space": "runs/r/workers/w 1",
    "a line feed behind": "runs/r/workers/w1\n",
    "a letter of no ASCII": "runs/r/workers/w\u00fc",
    "64 characters": f"runs/r/workers/{'w' * 64}",
}

ERRORS: dict[str, tuple[str, Callable[[Target], list[Any]]]] = {
    "garbage": ("MALFORMED_MESSAGE", lambda t: [b"\xff\xff\xff\xff"]),
    "garbage after the header": ("MALFORMED_MESSAGE", lambda t: [t.header(), b"\x12\xff"]),
    "garbage for a trailer": ("MALFORMED_MESSAGE", lambda t: [t.header(), *GOOD_TAIL[:-1], b"\x1a\x05\x0d\x00"]),
    "endless varint": ("MALFORMED_MESSAGE", lambda t: [t.header(), b"\x12" + b"\x80" * 4096]),
    "a header cut in the middle": ("MALFORMED_MESSAGE", lambda t: [t.header().SerializeToString()[:-3], *GOOD_TAIL]),
    "a name that is no UTF-8": ("MALFORMED_MESSAGE", lambda t: [b"\x0a\x03\x0a\x01\xff", *GOOD_TAIL]),
    "nothing": ("UNEXPECTED_MESSAGE", lambda t: []),
    "empty message": ("UNEXPECTED_MESSAGE", lambda t: [PUSH()]),
    "an unknown field alone": ("UNEXPECTED_MESSAGE", lambda t: [b"\xaa\x06\x01x", *GOOD_TAIL]),
    "no header": ("UNEXPECTED_MESSAGE", lambda t: GOOD_TAIL),
    "trailer alone": ("UNEXPECTED_MESSAGE", lambda t: [trailer(0)]),
    "chunk before the header": ("UNEXPECTED_MESSAGE", lambda t: [chunk(0, GOOD), t.header(), trailer(crc32c(GOOD))]),
    "two headers": ("UNEXPECTED_MESSAGE", lambda t: [t.header(), t.header(), *GOOD_TAIL]),
    "header between chunks": ("UNEXPECTED_MESSAGE", lambda t: [t.header(), chunk(0, GOOD[:8]), t.header()]),
    "empty message between chunks": ("UNEXPECTED_MESSAGE", lambda t: [t.header(), chunk(0, GOOD[:8]), PUSH()]),
    "header alone": ("UNEXPECTED_MESSAGE", lambda t: [t.header()]),
    "no trailer": ("UNEXPECTED_MESSAGE", lambda t: [t.header(), *GOOD_TAIL[:-1]]),
    **{
        f"worker's name is {what}": ("INVALID_NAME", lambda t, name=name: [t.header(worker=name), *GOOD_TAIL])
        for what, name in NOT_WORKERS.items()
    },
    "unknown run": ("RUN_NOT_FOUND", lambda t: [t.header(worker="runs/nowhere/workers/w"), *GOOD_TAIL]),
    "unknown worker": ("WORKER_NOT_FOUND", lambda t: [t.header(worker=f"{t.run.name}/workers/no"), *GOOD_TAIL]),
    "epoch 0": ("WORKER_SUPERSEDED", lambda t: [t.header(epoch=0), *GOOD_TAIL]),
    "epoch of before": ("WORKER_SUPERSEDED", lambda t: [t.header(epoch=t.lease.epoch - 1), *GOOD_TAIL]),
    "epoch of an earlier run": ("RUN_NOT_FOUND", lambda t: [t.header(epoch=1), *GOOD_TAIL]),
    "epoch of the future": ("WORKER_NOT_FOUND", lambda t: [t.header(epoch=t.lease.epoch + 1_000_000), *GOOD_TAIL]),
    "epoch of 2**64 - 1": ("WORKER_NOT_FOUND", lambda t: [t.header(epoch=(1 << 64) - 1), *GOOD_TAIL]),
    "wrong manifest": ("MANIFEST_MISMATCH", lambda t: [t.header(manifest_digest=b"\0" * 32), *GOOD_TAIL]),
    "no manifest": ("MANIFEST_MISMATCH", lambda t: [t.header(manifest_digest=b""), *GOOD_TAIL]),
    "half a digest": (
        "MANIFEST_MISMATCH",
        lambda t: [t.header(manifest_digest=t.run.manifest.digest[:16]), *GOOD_TAIL],
    ),
    "no examples": ("INVALID_EXAMPLE_COUNT", lambda t: [t.header(example_count=0), *GOOD_TAIL]),
    "step of the future": ("BASE_STEP_AHEAD", lambda t: [t.header(base_step=t.step + 1), *GOOD_TAIL]),
    "step 2**64 - 1": ("BASE_STEP_AHEAD", lambda t: [t.header(base_step=(1 << 64) - 1), *GOOD_TAIL]),
    "sequence 0": ("SEQUENCE_GAP", lambda t: [t.header(sequence=0), *GOOD_TAIL]),
    "sequence skipped": ("SEQUENCE_GAP", lambda t: [t.header(sequence=t.sequence + 1), *GOOD_TAIL]),
    "sequence 2**64 - 1": ("SEQUENCE_GAP", lambda t: [t.header(sequence=(1 << 64) - 1), *GOOD_TAIL]),
    "no dtype": ("UNSUPPORTED_DTYPE", lambda t: [t.header(dtype=0), *GOOD_TAIL]),
    "unknown dtype": ("UNSUPPORTED_DTYPE", lambda t: [t.header(dtype=64), *GOOD_TAIL]),
    "declares nothing": ("SIZE_MISMATCH", lambda t: [t.header(size_bytes=0), *GOOD_TAIL]),
    "declares too little": ("SIZE_MISMATCH", lambda t: [t.header(size_bytes=12), *GOOD_TAIL]),
    "declares too much": ("SIZE_MISMATCH", lambda t: [t.header(size_bytes=20), *GOOD_TAIL]),
    "declares 2**63 bytes": ("SIZE_MISMATCH", lambda t: [t.header(size_bytes=1 << 63), *GOOD_TAIL]),
    "declares another dtype's size": ("SIZE_MISMATCH", lambda t: [t.header(dtype=2), *GOOD_TAIL]),
    "sends too little": ("SIZE_MISMATCH", lambda t: [t.header(), chunk(0, GOOD[:8]), trailer(crc32c(GOOD[:8]))]),
    "sends nothing": ("SIZE_MISMATCH", lambda t: [t.header(), trailer(0)]),
    "sends too much": ("CHUNK_OUT_OF_RANGE", lambda t: [t.header(), chunk(0, GOOD + GOOD)]),
    "a chunk too many": ("CHUNK_OUT_OF_RANGE", lambda t: [t.header(), chunk(0, GOOD), chunk(16, GOOD[:4])]),
    "offset beyond the end": ("CHUNK_OUT_OF_RANGE", lambda t: [t.header(), chunk(16, GOOD)]),
    "offset of 2**62": ("CHUNK_OUT_OF_RANGE", lambda t: [t.header(), chunk(1 << 62, GOOD)]),
    "offset of 2**64 - 4": ("CHUNK_OUT_OF_RANGE", lambda t: [t.header(), chunk((1 << 64) - 4, GOOD)]),
    "overlap": ("CHUNK_OVERLAP", lambda t: [t.header(), chunk(0, GOOD[:8]), chunk(4, GOOD[4:])]),
    "same chunk twice": ("CHUNK_OVERLAP", lambda t: [t.header(), chunk(0, GOOD[:8]), chunk(0, GOOD[:8])]),
    "all chunks twice": ("CHUNK_OVERLAP", lambda t: [t.header(), chunk(0, GOOD), chunk(0, GOOD)]),
    "chunk missing": ("CHUNK_GAP", lambda t: [t.header(), chunk(8, GOOD[8:])]),
    "chunk missing in the middle": ("CHUNK_GAP", lambda t: [t.header(), chunk(0, GOOD[:4]), chunk(8, GOOD[8:])]),
    "chunks exchanged": ("CHUNK_GAP", lambda t: [t.header(), chunk(8, GOOD[8:]), chunk(0, GOOD[:8])]),
    "offset inside an element": ("CHUNK_MISALIGNED", lambda t: [t.header(), chunk(2, GOOD[2:])]),
    "half an element": ("CHUNK_MISALIGNED", lambda t: [t.header(), chunk(0, GOOD[:6])]),
    "empty chunk": ("CHUNK_MISALIGNED", lambda t: [t.header(), chunk(0, b"")]),
    "empty chunk behind the last": ("CHUNK_MISALIGNED", lambda t: [t.header(), chunk(0, GOOD), chunk(16, b"")]),
    "wrong checksum": ("CHECKSUM_MISMATCH", lambda t: [t.header(), *GOOD_TAIL[:-1], trailer(crc32c(GOOD) ^ 1)]),
    "no checksum": ("CHECKSUM_MISMATCH", lambda t: [t.header(), *GOOD_TAIL[:-1], trailer(0)]),
    "a bit of the gradient is another": (
        "CHECKSUM_MISMATCH",
        lambda t: [t.header(), chunk(0, bytes([GOOD[0] ^ 1]) + GOOD[1:]), GOOD_TAIL[-1]],
    ),
}
"""What an error answers: its reason, and the stream. The whole state of a run is looked at by
`test_bad_contributions.py`; here the server is a process of its own, and what it tells on the wire is."""


@pytest.mark.parametrize("case", ERRORS)
def test_error_names_its_reason_and_changes_nothing(target: Target, case: str) -> None:
    reason, requests = ERRORS[case]
    before = target.state()
    with pytest.raises(grpc.RpcError) as caught:
        target.wire.push(requests(target))
    info = error_info(caught.value)
    assert info.reason == reason
    assert caught.value.code().name == CATALOGUE[reason].status
    assert set(info.metadata) == set(CATALOGUE[reason].metadata)
    assert len(caught.value.details()) > 20, "a message says what is wrong and what to do"
    assert target.state() == before


# An exchange may end before it begins, and what begins it is a push or a pull.
@pytest.mark.parametrize("case", [case for case in ERRORS if case not in ("nothing", "no header")])
def test_error_ends_an_exchange_the_same_way(target: Target, case: str) -> None:
    reason, requests = ERRORS[case]
    before = target.state()
    with pytest.raises(grpc.RpcError) as caught:
        list(target.wire.call("OptimizerService", "Exchange", [as_exchange(m) for m in requests(target)]))
    assert reason_of(caught.value) == reason
    assert target.state() == before


def as_exchange(message: Any) -> Any:
    if isinstance(message, bytes):
        return message
    kind = message.WhichOneof("payload")
    return pb.ExchangeRequest(**({"push" if kind == "header" else kind: getattr(message, kind)} if kind else {}))


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("position", [0, 3])
def test_non_finite_gradient_is_rejected_and_uses_its_sequence(target: Target, bad: float, position: int) -> None:
    before = target.state()
    gradient = GRADIENT.copy()
    gradient[position] = bad
    requests = push_stream(target.lease, target.run.manifest.digest, gradient, sequence=2, base_step=1)
    result = target.wire.push(requests)
    assert (result.outcome, result.reason) == (pb.PUSH_OUTCOME_REJECTED, "NON_FINITE_GRADIENT")
    assert f"element {position}" in result.message
    expected = list(before)
    expected[3], expected[4], expected[6] = {"NON_FINITE_GRADIENT": 1}, 2, 1
    assert target.state() == tuple(expected)


def test_infinities_that_cancel_are_still_found(target: Target) -> None:
    gradient = floats(INF, -INF, 1, 1)
    result = target.wire.push(push_stream(target.lease, target.run.manifest.digest, gradient, sequence=2, base_step=1))
    assert result.reason == "NON_FINITE_GRADIENT"


def test_stale_gradient_is_rejected_with_the_step_to_pull(target: Target) -> None:
    result = target.wire.push(target.good(base_step=0))
    assert (result.outcome, result.reason, result.step) == (pb.PUSH_OUTCOME_REJECTED, "STALE_GRADIENT", 1)
    assert result.staleness == 1


@pytest.mark.parametrize("values", [(3e38, 3e38, 0, 0), (2e19, 0, 0, 0)])
def test_gradient_whose_squares_overflow_is_rejected(target: Target, values: tuple[float, ...]) -> None:
    before = target.state()
    requests = push_stream(target.lease, target.run.manifest.digest, floats(*values), sequence=2, base_step=1)
    result = target.wire.push(requests)
    assert (result.outcome, result.reason) == (pb.PUSH_OUTCOME_REJECTED, "GRADIENT_TOO_LARGE")
    assert target.state()[-1] == before[-1]


def _create(wire: WireClient, run_id: str, **changes: Any) -> None:
    weights = changes.pop("values", WEIGHTS)
    wire.create(run_id, weights, **changes)


def _optimizer(**fields: Any) -> optimizer_pb2.Optimizer:
    out = sgd()
    for name, value in fields.items():
        setattr(out, name, value)
    return out


BAD_CREATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "name with a slash": ("INVALID_NAME", {"run_id": "a/b"}),
    "empty name": ("INVALID_NAME", {"run_id": ""}),
    "no tensors": ("MANIFEST_INVALID", {"manifest": tensor_pb2.Manifest()}),
    "two of a name": ("MANIFEST_INVALID", {"manifest": tensor_pb2.Manifest(tensors=[*manifest((4,)).tensors] * 2)}),
    "wrong digest": (
        "MANIFEST_INVALID",
        {"manifest": tensor_pb2.Manifest(tensors=manifest((4,)).tensors, digest=b"x")},
    ),
    "wrong offset": ("MANIFEST_INVALID", {"manifest": tensor_pb2.Manifest(tensors=manifest((1,), (4,)).tensors[1:])}),
    "tensor without dtype": (
        "UNSUPPORTED_DTYPE",
        {"manifest": tensor_pb2.Manifest(tensors=[tensor_pb2.TensorSpec(name="t", shape=[4])])},
    ),
    "too large": ("RUN_TOO_LARGE", {"manifest": manifest((1 << 40,))}),
    "no optimizer": ("INVALID_CONFIGURATION", {"optimizer": optimizer_pb2.Optimizer()}),
    "no rate": ("INVALID_CONFIGURATION", {"optimizer": optimizer_pb2.Optimizer(sgd=optimizer_pb2.Sgd())}),
    "negative decay": ("INVALID_CONFIGURATION", {"optimizer": _optimizer(weight_decay=-1)}),
    "negative rate": ("INVALID_CONFIGURATION", {"optimizer": sgd(lr=-1)}),
    "alpha above 1": ("INVALID_CONFIGURATION", {"optimizer": sgd(sync_period=5, alpha=1.5)}),
    "period 0": ("INVALID_CONFIGURATION", {"optimizer": sgd(sync_period=0, alpha=0.5)}),
    "no policy": ("INVALID_CONFIGURATION", {"aggregation": run_pb2.Aggregation()}),
    "quorum 0": ("INVALID_CONFIGURATION", {"aggregation": run_pb2.Aggregation(synchronous=run_pb2.Synchronous())}),
    "declares too little": ("SIZE_MISMATCH", {"size_bytes": 12}),
    "NaN weight": ("NON_FINITE_WEIGHTS", {"values": floats(1, NAN, 1, 1)}),
}


@pytest.mark.parametrize("case", BAD_CREATIONS)
def test_bad_creation_names_its_reason_and_creates_nothing(wire: WireClient, run_id: str, case: str) -> None:
    reason, changes = BAD_CREATIONS[case]
    with pytest.raises(grpc.RpcError) as caught:
        _create(wire, **({"run_id": run_id} | changes))
    info = error_info(caught.value)
    assert info.reason == reason
    assert set(info.metadata) == set(CATALOGUE[reason].metadata)
    names = [
        run.name for run in wire.call("RunService", "ListRuns", run_service_pb2.ListRunsRequest(page_size=1000)).runs
    ]
    assert f"runs/{run_id}" not in names


def test_second_run_of_a_name_is_refused_and_the_first_stays(wire: WireClient, run_id: str) -> None:
    run = wire.create(run_id, WEIGHTS)
    with pytest.raises(grpc.RpcError) as caught:
        wire.create(run_id, 2 * WEIGHTS)
    assert reason_of(caught.value) == "RUN_ALREADY_EXISTS"
    assert wire.pull(run.name)[1].tolist() == WEIGHTS.tolist()


def test_repeated_creation_is_answered_with_the_first(wire: WireClient, run_id: str) -> None:
    first = wire.create(run_id, WEIGHTS, request_id="one")
    again = wire.create(run_id, WEIGHTS, request_id="one")
    assert again.create_time == first.create_time


def test_slow_weights_of_a_run_without_lookahead_are_an_error(wire: WireClient, run_id: str) -> None:
    run = wire.create(run_id, WEIGHTS)
    with pytest.raises(grpc.RpcError) as caught:
        wire.pull(run.name, weights=tensor_pb2.WEIGHTS_SLOW)
    assert reason_of(caught.value) == "NO_SLOW_WEIGHTS"


def test_message_over_four_mebibytes_is_refused(target: Target) -> None:
    before = target.state()
    with pytest.raises(grpc.RpcError) as caught:
        target.wire.push([target.header(), chunk(0, bytes(5 << 20))])
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert target.state() == before


def test_every_reason_has_a_number_of_its_own_in_the_proto() -> None:
    from kedge.v1 import error_reason_pb2

    names = {name.removeprefix("ERROR_REASON_") for name in error_reason_pb2.ErrorReason.keys()}  # noqa: SIM118  an enum wrapper, no dict
    assert names == set(CATALOGUE) | {"UNSPECIFIED"}


@pytest.mark.parametrize("path", ["/kedge.v1.RunService/Guess", "/kedge.v2.RunService/GetRun", "/"])
def test_what_is_no_method_is_refused_by_its_name(server: ServerProcess, path: str) -> None:
    with grpc.insecure_channel(server.address) as channel, pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary(path)(b"", timeout=20)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert error_info(caught.value).reason == "UNSUPPORTED"
    assert error_info(caught.value).metadata["method"] == path
