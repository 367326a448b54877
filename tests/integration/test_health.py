"""The standard health service: who watches it costs little, and does not keep the server from ending."""

from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from server_process import ServerProcess
from wire_client import WireClient, floats, reason_of

from kedge.v1 import run_service_pb2

SERVING = health_pb2.HealthCheckResponse.SERVING
LIMIT = 3


@pytest.fixture
def narrow() -> Iterator[ServerProcess]:
    environment = {"KEDGE_LIMITS__STREAMS": str(LIMIT), "KEDGE_SERVER__GRACE_SECONDS": "60"}
    with ServerProcess(environment=environment) as server:
        yield server


@pytest.fixture
def stub(narrow: ServerProcess) -> Iterator[Any]:
    with grpc.insecure_channel(narrow.address) as channel:
        yield health_pb2_grpc.HealthStub(channel)


def watch(stub: Any, service: str = "") -> Any:
    return stub.Watch(health_pb2.HealthCheckRequest(service=service), timeout=60)


@pytest.mark.parametrize("service", ["", "kedge.v1.RunService", "kedge.v1.OptimizerService"])
def test_each_service_serves_and_others_are_unknown(stub: Any, service: str) -> None:
    assert stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=20).status == SERVING
    assert next(watch(stub, service)).status == SERVING
    with pytest.raises(grpc.RpcError) as caught:
        stub.Check(health_pb2.HealthCheckRequest(service="other"), timeout=20)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert next(watch(stub, "other")).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


def test_watches_are_counted_and_take_no_stream_from_those_who_train(
    narrow: ServerProcess, stub: Any, eventually: Callable[[Callable[[], object]], None]
) -> None:
    watches = [watch(stub) for _ in range(LIMIT)]
    assert [next(each).status for each in watches] == [SERVING] * LIMIT
    with pytest.raises(grpc.RpcError) as caught:
        next(watch(stub))
    assert reason_of(caught.value) == "TOO_MANY_STREAMS"
    wire = WireClient(narrow.address)
    wire.call("RunService", "ListRuns", run_service_pb2.ListRunsRequest())
    wire.pull(wire.create("r", floats(1)).name)
    wire.close()
    watches.pop().cancel()

    def has_room() -> bool:
        try:
            return bool(next(watch(stub)).status == SERVING)
        except grpc.RpcError:
            return False

    eventually(has_room)


def test_watchers_learn_that_the_server_ends_and_do_not_keep_it(narrow: ServerProcess, stub: Any) -> None:
    watches = [watch(stub) for _ in range(LIMIT)]
    for each in watches:
        next(each)
    narrow.terminate()
    for each in watches:
        assert next(each).status == health_pb2.HealthCheckResponse.NOT_SERVING
        with pytest.raises(grpc.RpcError) as caught:
            next(each)
        assert reason_of(caught.value) == "SERVER_DRAINING"
    assert narrow.wait() == 0
    assert narrow.log == []
