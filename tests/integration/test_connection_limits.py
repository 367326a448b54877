"""Connections are counted, and no message grows as it is read."""

import socket
from collections.abc import Callable, Iterator

import grpc
import psutil
import pytest
from certificates import Authority
from secure_wire import SecureWireClient, secure_server
from server_process import ServerProcess
from wire_client import WireClient

from kedge.v1 import run_service_pb2

MIB = 1 << 20
LIST = run_service_pb2.ListRunsRequest()
LIMIT = 3


@pytest.fixture(params=["plaintext", "TLS"])
def narrow(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[ServerProcess, Callable[[], WireClient]]]:
    """A server with room for three connections, and its clients."""
    monkeypatch.setenv("KEDGE_LIMITS__CONNECTIONS", str(LIMIT))
    if request.param == "plaintext":
        with ServerProcess() as server:
            yield server, lambda: WireClient(server.address)
        return
    ca = Authority(tmp_path_factory.mktemp("ca"))
    with secure_server(ca.issue("server")) as server:
        yield server, lambda: SecureWireClient(server.address, ca)


def answers(client: WireClient) -> bool:
    try:
        client.call("RunService", "ListRuns", LIST, timeout=5)
    except grpc.RpcError:
        return False
    return True


def test_connections_over_the_limit_are_closed_and_those_within_go_on(
    narrow: tuple[ServerProcess, Callable[[], WireClient]], eventually: Callable[[Callable[[], object]], None]
) -> None:
    server, new_client = narrow
    first, late = new_client(), new_client()
    assert answers(first)
    host, _, port = server.address.rpartition(":")
    silent = [socket.create_connection((host, int(port)), timeout=20) for _ in range(LIMIT - 1)]
    over = socket.create_connection((host, int(port)), timeout=20)
    assert over.recv(1) == b""
    assert not answers(late)
    assert answers(first)
    for connection in (*silent, over):
        connection.close()
    eventually(lambda: answers(late))
    first.close()
    late.close()


@pytest.mark.parametrize("algorithm", [grpc.Compression.Gzip, grpc.Compression.Deflate])
def test_compressed_message_is_refused_before_it_is_inflated(
    server: ServerProcess, algorithm: grpc.Compression
) -> None:
    process = psutil.Process(server.process.pid)
    before = process.memory_info().rss
    with grpc.insecure_channel(server.address, options=[("grpc.max_send_message_length", -1)]) as channel:
        for path in ("/kedge.v1.RunService/ListRuns", "/grpc.health.v1.Health/Check"):
            with pytest.raises(grpc.RpcError) as caught:
                channel.unary_unary(path)(bytes(64 * MIB), compression=algorithm, timeout=60)
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
            assert "disabled" in caught.value.details()
    assert process.memory_info().rss - before < 32 * MIB
