"""Who gets in over TLS, who does not, and as whom."""

import datetime
import os
import socket
import ssl
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import grpc
import numpy as np
import pytest
from certificates import EXPIRED, LOOPBACK, NOT_YET_VALID, Authority, Issued
from grpc.experimental import session_cache
from secure_wire import SecureWireClient, secure_server
from server_process import EXECUTABLE, ServerProcess
from wire_client import WireClient, floats, push_stream, reason_of

from kedge.v1 import run_service_pb2
from kedge_server.security.roles import Role
from kedge_server.security.tokens import new_token

LIST = run_service_pb2.ListRunsRequest()


class Site(NamedTuple):
    """CAs, certificates and tokens; a server that wants certificates, and one that wants tokens."""

    ca: Authority
    other_ca: Authority
    mutual: ServerProcess
    with_tokens: ServerProcess
    token: str
    """An admin's, for both."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    ca, other_ca = Authority(tmp_path_factory.mktemp("ca")), Authority(tmp_path_factory.mktemp("other"))
    pair = ca.issue("server")
    token, line = new_token("root", Role.ADMIN)
    tokens = ca.folder / "tokens"
    tokens.write_text(f"{line.line}\n")
    with (
        secure_server(pair, ca.ca_file, tokens_file=tokens) as mutual,
        secure_server(pair, tokens_file=tokens) as with_tokens,
    ):
        yield Site(ca, other_ca, mutual, with_tokens, token)
        log = "".join(mutual.log + with_tokens.log)
    assert token not in log
    assert "PRIVATE" not in log


def listed(client: WireClient) -> int:
    """The runs that it sees."""
    return len(client.call("RunService", "ListRuns", LIST, timeout=20).runs)


def client_context(trusted: Authority, pair: Issued | None = None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(trusted.ca_file)
    context.set_alpn_protocols(["h2"])
    if pair is not None:
        context.load_cert_chain(pair.cert_file, pair.key_file)
    return context


def is_welcome(server: ServerProcess, context: ssl.SSLContext) -> bool:
    """Whether a server goes on after the handshake. A certificate that it does not take makes it hang up."""
    host, _, port = server.address.rpartition(":")
    with (
        socket.create_connection((host, int(port)), timeout=20) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as secure,
    ):
        return len(secure.recv(9)) == 9


@pytest.mark.parametrize("uris", [("kedge://alice/admin",), ("https://example.org/a", "kedge://alice/admin")])
def test_with_a_certificate_of_the_right_ca_a_run_is_made_trained_and_read(
    site: Site, run_id: str, uris: tuple[str, ...]
) -> None:
    client = SecureWireClient(site.mutual.address, site.ca, site.ca.issue("alice", hosts=(), uris=uris))
    run = client.create(run_id, floats(1, 2))
    lease = client.join(run.name)
    result = client.push(push_stream(lease, run.manifest.digest, floats(0.5, 0.5)))
    assert result.step == 1
    assert np.array_equal(client.pull(run.name)[1], floats(0.5, 1.5))
    client.close()


REFUSED: dict[str, Callable[[Site], Issued | None]] = {
    "no certificate": lambda _: None,
    "expired": lambda site: site.ca.issue("client", uris=["kedge://a/admin"], days=EXPIRED),
    "not yet valid": lambda site: site.ca.issue("client", uris=["kedge://a/admin"], days=NOT_YET_VALID),
    "of another CA": lambda site: site.other_ca.issue("client", uris=["kedge://a/admin"]),
    "not for clients": lambda site: site.ca.issue("client", uris=["kedge://a/admin"], may_be_clients=False),
}


@pytest.mark.parametrize("case", REFUSED)
def test_clients_without_a_certificate_that_holds_are_not_let_in(site: Site, case: str) -> None:
    pair = REFUSED[case](site)
    client = SecureWireClient(site.mutual.address, site.ca, pair, token=site.token)
    with pytest.raises(grpc.RpcError) as caught:
        listed(client)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    client.close()
    assert not is_welcome(site.mutual, client_context(site.ca, pair))
    assert is_welcome(site.mutual, client_context(site.ca, site.ca.issue("fit")))


def test_plaintext_is_not_answered(site: Site) -> None:
    for server in (site.mutual, site.with_tokens):
        client = WireClient(server.address)
        with pytest.raises(grpc.RpcError) as caught:
            listed(client)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        client.close()


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
@pytest.mark.parametrize(
    ("version", "is_taken"),
    [
        (ssl.TLSVersion.TLSv1, False),
        (ssl.TLSVersion.TLSv1_1, False),
        (ssl.TLSVersion.TLSv1_2, True),
        (ssl.TLSVersion.TLSv1_3, True),
    ],
)
def test_tls_is_1_2_or_later(site: Site, version: ssl.TLSVersion, is_taken: bool) -> None:
    context = client_context(site.ca, site.ca.issue("client"))
    context.set_ciphers("ALL:@SECLEVEL=0")  # else this side would not speak the old ones
    context.minimum_version = context.maximum_version = version
    if is_taken:
        assert is_welcome(site.mutual, context)
        return
    with pytest.raises(ssl.SSLError, match=r"ALERT_PROTOCOL_VERSION|EOF"):
        is_welcome(site.mutual, context)


def test_client_that_trusts_another_ca_does_not_go_on(site: Site) -> None:
    client = SecureWireClient(site.with_tokens.address, site.other_ca, token=site.token)
    with pytest.raises(grpc.RpcError) as caught:
        listed(client)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    client.close()


def test_client_that_looks_for_another_name_does_not_go_on(site: Site) -> None:
    for name, is_its_own in [(LOOPBACK[0], True), ("kedge.example.org", False)]:
        client = SecureWireClient(site.with_tokens.address, site.ca, token=site.token, server_name=name)
        if is_its_own:
            listed(client)
        else:
            with pytest.raises(grpc.RpcError) as caught:
                listed(client)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        client.close()


def test_certificate_that_expires_while_the_server_runs_keeps_clients_out_and_is_said(
    site: Site, eventually: Callable[[Callable[[], object]], None]
) -> None:
    pair = site.ca.issue("short")
    with secure_server(pair, tokens_file=site.ca.folder / "tokens") as server:
        host, _, port = server.address.rpartition(":")
        ends_at = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=5)
        pair.replace(site.ca.issue("brief", days=(-1, 5 / 86_400)))
        eventually(lambda: ssl.get_server_certificate((host, int(port)), timeout=20) == pair.cert.decode())
        eventually(lambda: datetime.datetime.now(datetime.UTC) > ends_at + datetime.timedelta(seconds=1))
        late = SecureWireClient(server.address, site.ca, token=site.token)
        with pytest.raises(grpc.RpcError) as caught:
            listed(late)
        assert "expired" in caught.value.details()
        late.close()
        eventually(lambda: any("expired" in line for line in server.log))
        assert sum("expired" in line for line in server.log) == 1


def test_certificate_that_has_expired_is_worth_nothing_in_a_connection_or_a_session(
    site: Site, eventually: Callable[[Callable[[], object]], None]
) -> None:
    own = site.ca.issue("brief", hosts=(), uris=["kedge://mallory/admin"], days=(-1, 3 / 86400))
    credentials = grpc.ssl_channel_credentials(site.ca.ca, own.key, own.cert)
    sessions = session_cache.ssl_session_cache_lru(4)
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.ssl_session_cache", sessions)]

    def client_with_session() -> WireClient:
        client = WireClient(site.mutual.address)
        client.channel.close()
        client.channel = grpc.secure_channel(site.mutual.address, credentials, options=options)
        return client

    def is_let_in(client: WireClient) -> bool:
        try:
            return listed(client) >= 0
        except grpc.RpcError:
            return False

    connected = client_with_session()
    assert is_let_in(connected)
    eventually(lambda: not is_let_in(connected))
    with pytest.raises(grpc.RpcError) as caught:
        listed(connected)
    assert reason_of(caught.value) == "UNAUTHENTICATED"
    assert "has expired" in caught.value.details()
    late = client_with_session()
    assert not is_let_in(late)
    for client in (connected, late):
        client.close()


def test_certificate_says_who_calls_and_a_token_beside_it_counts_for_nothing(site: Site, run_id: str) -> None:
    reader = site.ca.issue("reader", hosts=(), uris=["kedge://bob/reader"])
    client = SecureWireClient(site.mutual.address, site.ca, reader, token=site.token)
    listed(client)
    with pytest.raises(grpc.RpcError) as caught:
        client.create(run_id, floats(1))
    assert reason_of(caught.value) == "PERMISSION_DENIED"
    client.close()


def test_certificate_without_an_identity_is_a_way_in_for_a_token(site: Site) -> None:
    plain = site.ca.issue("plain", hosts=(), uris=["https://example.org"])
    with_token = SecureWireClient(site.mutual.address, site.ca, plain, token=site.token)
    listed(with_token)
    with_token.close()
    without = SecureWireClient(site.mutual.address, site.ca, plain)
    with pytest.raises(grpc.RpcError) as caught:
        listed(without)
    assert reason_of(caught.value) == "UNAUTHENTICATED"
    without.close()


@pytest.mark.parametrize("uri", ["kedge://alice", "kedge://alice/root", "kedge://alice/admin/", "kedge:///admin"])
def test_identity_that_is_not_understood_is_nobodys(site: Site, uri: str) -> None:
    odd = site.ca.issue("odd", hosts=(), uris=[uri])
    client = SecureWireClient(site.mutual.address, site.ca, odd, token=site.token)
    with pytest.raises(grpc.RpcError) as caught:
        listed(client)
    assert reason_of(caught.value) == "UNAUTHENTICATED"
    client.close()


def test_server_that_wants_no_certificates_believes_none(site: Site) -> None:
    alice = site.ca.issue("alice", hosts=(), uris=["kedge://alice/admin"])
    client = SecureWireClient(site.with_tokens.address, site.ca, alice)
    with pytest.raises(grpc.RpcError) as caught:
        listed(client)
    assert reason_of(caught.value) == "UNAUTHENTICATED"
    client.close()


def test_runs_of_a_certificate_are_all_that_it_touches(site: Site, run_id: str) -> None:
    admin = SecureWireClient(site.mutual.address, site.ca, site.ca.issue("a", uris=["kedge://alice/admin"]))
    admin.create(run_id, floats(1))
    admin.create(f"x-{run_id}", floats(1))
    some = site.ca.issue("b", hosts=(), uris=[f"kedge://bob/worker/no,x-{run_id[:4]}*"])
    bob = SecureWireClient(site.mutual.address, site.ca, some)
    bob.join(f"runs/x-{run_id}")
    with pytest.raises(grpc.RpcError) as caught:
        bob.join(f"runs/{run_id}")
    assert reason_of(caught.value) == "PERMISSION_DENIED"
    admin.close()
    bob.close()


def test_development_certificates_serve_and_are_renewed_as_the_server_runs(
    tmp_path: Path, eventually: Callable[[Callable[[], object]], None]
) -> None:
    folder = tmp_path / "certs"

    def make() -> str:
        done = subprocess.run(
            [EXECUTABLE, "certs", "dev", folder], capture_output=True, text=True, timeout=60, check=True
        )
        return done.stdout

    said = make()
    config = tmp_path / "kedge.toml"
    config.write_text(said[said.index("[tls]") : said.index("Its clients")])
    ca = SimpleNamespace(ca=(folder / "ca.pem").read_bytes())
    worker = Issued(folder / "worker.pem", folder / "worker-key.pem")
    with ServerProcess("--config", str(config)) as server:
        host, _, port = server.address.rpartition(":")
        client = SecureWireClient(server.address, ca, worker)
        listed(client)
        make()
        renewed = (folder / "server.pem").read_text()
        eventually(lambda: ssl.get_server_certificate((host, int(port)), timeout=20) == renewed)
        listed(client)
        client.close()
        again = SecureWireClient(server.address, ca, worker)
        listed(again)
        again.close()


def test_files_that_cannot_be_used_keep_the_server_from_starting(site: Site) -> None:
    expired = site.ca.issue("expired", days=EXPIRED)
    environment = os.environ | {
        "KEDGE_TLS__CERT_FILE": str(expired.cert_file),
        "KEDGE_TLS__KEY_FILE": str(expired.key_file),
    }
    command = [EXECUTABLE, "serve", "--listen", "127.0.0.1:0"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: tls.cert_file = ")
    assert "expired" in done.stderr
    assert done.stdout == ""


def test_broken_handshakes_write_nothing_and_leave_nothing(
    site: Site, eventually: Callable[[Callable[[], object]], None]
) -> None:
    descriptors = Path(f"/proc/{site.mutual.process.pid}/fd")
    before, line_count = len(list(descriptors.iterdir())), len(site.mutual.log)
    host, _, port = site.mutual.address.rpartition(":")
    certificateless = client_context(site.ca)
    for _ in range(5):
        assert not is_welcome(site.mutual, certificateless)
    for payload in (b"", b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", os.urandom(4096)):
        for _ in range(25):
            with socket.create_connection((host, int(port)), timeout=20) as connection:
                connection.sendall(payload)
    eventually(lambda: len(list(descriptors.iterdir())) <= before + 2)
    assert len(site.mutual.log) == line_count
    client = SecureWireClient(site.mutual.address, site.ca, site.ca.issue("c", uris=["kedge://alice/admin"]))
    listed(client)
    client.close()
