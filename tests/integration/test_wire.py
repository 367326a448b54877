"""The protocol as a client in another language meets it: only the .proto files, no SDK."""

import numpy as np
import pytest
from wire_client import (
    WireClient,
    asynchronous,
    crc32c,
    floats,
    push_header,
    push_stream,
    read_weights,
    sgd,
    stream,
)

from kedge.v1 import optimizer_service_pb2 as pb


def test_crc32c_of_the_support_code_has_the_published_check_value() -> None:
    assert crc32c(b"123456789") == 0xE3069283  # RFC 3720's and the CRC catalogue's check value


def test_a_run_is_created_pushed_to_and_pulled_from(wire: WireClient, run_id: str) -> None:
    run = wire.create(run_id, floats(3, 1, -2), shapes=[(2,), (1,)])
    assert run.name == f"runs/{run_id}"
    assert run.parameter_count == 3
    lease = wire.join(run.name)
    result = wire.push(push_stream(lease, run.manifest.digest, floats(1, 0.5, -1)))
    assert (result.outcome, result.reason, result.step) == (pb.PUSH_OUTCOME_APPLIED, "QUORUM_REACHED", 1)
    header, weights = wire.pull(run.name)
    assert header.step == 1
    assert weights.tolist() == [2, 0.5, -1]


def test_the_digest_is_the_documented_function_of_the_manifest(wire: WireClient, run_id: str) -> None:
    import hashlib

    run = wire.create(run_id, np.zeros(7, np.float32), shapes=[(2, 3), ()])
    text = "t0\tfloat32\t2,3\t0\nt1\tfloat32\t\t6\n"
    assert run.manifest.digest == hashlib.sha256(text.encode()).digest()


def test_many_chunks_in_both_directions(wire: WireClient, run_id: str) -> None:
    weights = np.arange(700_000, dtype=np.float32)
    run = wire.create(run_id, weights)
    lease = wire.join(run.name)
    wire.push(push_stream(lease, run.manifest.digest, np.ones_like(weights)))
    _, pulled = wire.pull(run.name)
    np.testing.assert_array_equal(pulled, weights - 1)


def test_exchange_answers_pushes_and_pulls_in_order(wire: WireClient, run_id: str) -> None:
    run = wire.create(run_id, floats(3), optimizer=sgd(sync_period=2, alpha=0.5))
    lease = wire.join(run.name)
    pull = pb.PullSpec()
    requests = [pb.ExchangeRequest(pull=pb.ExchangePull(worker=lease.worker, pull=pull))]
    for step in range(2):
        data = floats(1).tobytes()
        header = push_header(lease, run.manifest.digest, size_bytes=4, sequence=step + 1, base_step=step, pull=pull)
        requests += stream(pb.ExchangeRequest, pb.ExchangeRequest(push=header), data)
    responses = list(wire.call("OptimizerService", "Exchange", requests))
    kinds = [response.WhichOneof("payload") for response in responses]
    assert kinds == ["header", "chunk", "trailer"] + ["result", "header", "chunk", "trailer"] * 2
    assert [response.result.step for response in responses if response.HasField("result")] == [1, 2]
    # 3 -> 2 -> 1, then halfway back to the slow weights, 3.
    assert read_weights(responses[:3])[1].tolist() == [3]
    assert read_weights(responses[4:7])[1].tolist() == [2]
    assert read_weights(responses[8:])[1].tolist() == [2]


def test_fast_and_slow_weights_come_in_one_range(wire: WireClient, run_id: str) -> None:
    run = wire.create(run_id, floats(3), optimizer=sgd(sync_period=2, alpha=0.5), aggregation=asynchronous())
    lease = wire.join(run.name)
    wire.push(push_stream(lease, run.manifest.digest, floats(1)))
    header, both = wire.pull(run.name, weights=3)
    assert (header.step, both.tolist()) == (1, [2, 3])


@pytest.mark.parametrize(("dtype", "numpy_dtype"), [(3, "<f2")])
def test_float16_on_the_wire(wire: WireClient, run_id: str, dtype: int, numpy_dtype: str) -> None:
    run = wire.create(run_id, floats(3, 1))
    lease = wire.join(run.name)
    data = np.array([0.5, -0.25], numpy_dtype).tobytes()
    kind = pb.PushGradientsRequest
    header = push_header(lease, run.manifest.digest, size_bytes=len(data), dtype=dtype)
    wire.push(stream(kind, kind(header=header), data))
    assert wire.pull(run.name)[1].tolist() == [2.5, 1.25]
