"""`kedge-server health`, as a container's health check calls it."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from certificates import Authority
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from secure_wire import secure_server
from server_process import EXECUTABLE, ServerProcess

from kedge_server.security.roles import Role
from kedge_server.security.tokens import new_token


def health_of(address: str | None, *arguments: str, **environment: object) -> tuple[int, str]:
    """The exit code, and the reason."""
    where = [] if address is None else ["--address", address]
    done = subprocess.run(
        [EXECUTABLE, "health", *where, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=os.environ | {key: str(value) for key, value in environment.items()},
    )
    assert (done.stdout == "serving\n") is (done.returncode == 0)
    assert done.stderr.count("\n") == (done.returncode != 0)
    return done.returncode, done.stderr


@pytest.fixture
def ca(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
def stub() -> Iterator[tuple[grpc.Server, str]]:
    """A server without services."""
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield server, f"127.0.0.1:{port}"
    server.stop(0).wait()


def test_serving_server_is_healthy_also_by_where_it_listens(server: ServerProcess) -> None:
    assert health_of(server.address) == (0, "")
    assert health_of(None, KEDGE_SERVER__LISTEN=server.address) == (0, "")
    everywhere = f"0.0.0.0:{server.address.rpartition(':')[2]}"
    assert health_of(None, KEDGE_SERVER__LISTEN=everywhere) == (0, "")
    assert health_of(server.address, http_proxy="http://127.0.0.1:1") == (0, "")


@pytest.mark.parametrize("is_mutual", [False, True])
def test_by_tls_it_needs_no_more_than_the_servers_configuration(ca: Authority, is_mutual: bool) -> None:
    pair = ca.issue("server", hosts=["*.example.org", "10.0.0.1"])
    tokens = ca.folder / "tokens"
    tokens.write_text(new_token("root", Role.ADMIN)[1].line)
    config = ca.folder / "kedge.toml"
    client_cas = f'client_ca_file = "{ca.ca_file}"' if is_mutual else ""
    config.write_text(f'[tls]\ncert_file = "{pair.cert_file}"\nkey_file = "{pair.key_file}"\n{client_cas}\n')
    with secure_server(pair, ca.ca_file if is_mutual else None, tokens_file=tokens) as server:
        assert health_of(server.address, "--config", str(config)) == (0, "")
        code, reason = health_of(server.address)  # in the clear
        assert (code, "no server answers" in reason) == (1, True)
        other = ca.issue("other", hosts=["*.example.org"])
        code, reason = health_of(
            server.address, KEDGE_TLS__CERT_FILE=other.cert_file, KEDGE_TLS__KEY_FILE=other.key_file
        )
        assert (code, "no server answers" in reason) == (1, True)


def test_certificate_that_may_be_no_clients_is_named_where_clients_show_theirs(ca: Authority) -> None:
    pair = ca.issue("server", may_be_clients=False)
    with secure_server(pair, ca.ca_file) as server:
        code, reason = health_of(
            server.address,
            KEDGE_TLS__CERT_FILE=pair.cert_file,
            KEDGE_TLS__KEY_FILE=pair.key_file,
            KEDGE_TLS__CLIENT_CA_FILE=ca.ca_file,
        )
    assert (code, "clientAuth" in reason) == (1, True)


def test_server_that_is_going_away_is_not_healthy(stub: tuple[grpc.Server, str]) -> None:
    server, address = stub
    servicer = health.HealthServicer()
    servicer.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    code, reason = health_of(address)
    assert (code, "NOT_SERVING" in reason) == (1, True)


def test_what_is_no_server_of_this_kind_is_not_healthy(stub: tuple[grpc.Server, str]) -> None:
    code, reason = health_of(stub[1])
    assert (code, "no kedge-server" in reason) == (1, True)


def test_nobody_and_somebody_silent_are_not_healthy() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        code, reason = health_of(address, "--timeout-seconds", "0.3")
        assert (code, "within 0.3 s" in reason) == (1, True)
    code, reason = health_of(address)
    assert (code, "no server answers" in reason) == (1, True)


@pytest.mark.parametrize(
    ("environment", "text"),
    [
        ({"KEDGE_SERVER__LISTEN": "127.0.0.1:0"}, "--address"),
        ({"KEDGE_SERVER__LISTN": "x"}, "server.listn"),
        ({"KEDGE_TLS__CERT_FILE": "/nowhere/a.pem", "KEDGE_TLS__KEY_FILE": "/nowhere/b.pem"}, "tls.cert_file"),
        ({"KEDGE_TLS__CERT_FILE": __file__, "KEDGE_TLS__KEY_FILE": __file__}, "no certificates in PEM"),
    ],
)
def test_configuration_that_is_none_is_not_healthy(environment: dict[str, str], text: str) -> None:
    code, reason = health_of(None, **environment)
    assert (code, text in reason) == (1, True)


def test_it_does_not_load_what_only_a_server_needs() -> None:
    code = "import sys, kedge_server.cli, kedge_server.tools.health; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert not {"jax", "numpy", "optax", "orbax", "kedge_server.app"} & set(done.stdout.split())
