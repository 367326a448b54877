"""`kedge.connect` with TLS and tokens: who gets in does, and who does not learns why, at once."""

import logging
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from certificates import EXPIRED, NOT_YET_VALID, Authority, Issued
from secure_wire import secure_server
from server_process import ServerProcess
from tokens_file import TokensFile

import kedge
from kedge import optim

LONG_SECONDS = 50.0
"""So long a `connect` would wait for a server that does not come: a test that waits so long fails by its time limit."""

pytestmark = pytest.mark.timeout(45)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tls")


@pytest.fixture(scope="module")
def ca(folder: Path) -> Authority:
    return Authority(folder)


@pytest.fixture(scope="module")
def other(folder: Path) -> Authority:
    return Authority(folder, "other")


@pytest.fixture(scope="module")
def tokens(folder: Path) -> TokensFile:
    return TokensFile(folder / "tokens")


@pytest.fixture(scope="module")
def token(tokens: TokensFile) -> str:
    made = tokens.add("alice", "admin")
    tokens.write()
    return made


@pytest.fixture(scope="module")
def tls(ca: Authority, tokens: TokensFile, token: str) -> Iterator[ServerProcess]:
    """A server with a certificate, which asks for tokens."""
    with secure_server(ca.issue("server"), tokens_file=tokens.path) as server:
        yield server


@pytest.fixture(scope="module")
def mtls(ca: Authority) -> Iterator[ServerProcess]:
    """One that asks for certificates."""
    with secure_server(ca.issue("mutual"), ca.ca_file) as server:
        yield server


@contextmanager
def bare_server(pair: Issued) -> Iterator[str]:
    """gRPC's own server with any certificate, which this project's server would not start with."""
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(pair.key, pair.cert)]))
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(0)


@contextmanager
def answering(answer: Callable[[socket.socket], object]) -> Iterator[str]:
    """Something else that listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection, suppress(OSError):
                    answer(connection)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(10)


def failure(address: str, **arguments: Any) -> kedge.KedgeError:
    with pytest.raises(kedge.KedgeError) as caught:
        kedge.connect(address, timeout_seconds=LONG_SECONDS, **arguments)
    return caught.value


def cause_of(address: str, **arguments: Any) -> str:
    error = failure(address, **arguments)
    assert (error.reason, error.metadata["address"]) == ("TLS_FAILED", address)
    assert address in error.message
    return error.metadata["cause"]


def pair(issued: Issued) -> dict[str, Path]:
    return {"cert_file": issued.cert_file, "key_file": issued.key_file}


def test_a_token_over_tls_trains(tls: ServerProcess, ca: Authority, token: str, run_id: str) -> None:
    with kedge.connect(tls.address, token=token, ca_file=ca.ca_file) as client:
        run = client.create_run(
            run_id, params={"w": np.zeros(3, np.float32)}, optimizer=optim.SGD(lr=1.0), aggregation=kedge.Synchronous(1)
        )
        with run.join() as worker, run.watch() as watch:
            worker.pull()
            weights = worker.step({"w": np.array([1.0, 2.0, 3.0], np.float32)})
            np.testing.assert_array_equal(weights["w"], [-1.0, -2.0, -3.0])
            assert next(iter(watch)).kind
        assert run.pull("fast")["w"].shape == (3,)
        client.delete_run(run_id)


def test_a_certificate_says_who_calls(mtls: ServerProcess, ca: Authority) -> None:
    own = ca.issue("reader", hosts=(), uris=["kedge://eve/reader"])
    with kedge.connect(mtls.address, ca_file=ca.ca_file, **pair(own)) as client:
        assert client.list_runs() == []
        with pytest.raises(kedge.KedgeError) as caught:
            client.create_run(
                "r",
                params={"w": np.zeros(1, np.float32)},
                optimizer=optim.SGD(lr=1.0),
                aggregation=kedge.Synchronous(1),
            )
        assert caught.value.reason == "PERMISSION_DENIED"


def test_everything_may_come_from_the_environment(
    tls: ServerProcess, ca: Authority, token: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "token").write_text(f"{token}\n")
    monkeypatch.setenv("KEDGE_ADDRESS", tls.address)
    monkeypatch.setenv("KEDGE_TOKEN_FILE", str(tmp_path / "token"))
    monkeypatch.setenv("KEDGE_CA_FILE", str(ca.ca_file))
    monkeypatch.setenv("KEDGE_SERVER_NAME", "localhost")
    with kedge.connect() as client:
        assert isinstance(client.list_runs(), list)


@pytest.mark.parametrize("given", [None, "kedge_wrong"])
def test_no_token_or_a_wrong_one(tls: ServerProcess, ca: Authority, given: str | None) -> None:
    assert failure(tls.address, ca_file=ca.ca_file, token=given).reason == "UNAUTHENTICATED"


@pytest.mark.parametrize(
    ("days", "cause"), [(EXPIRED, "CERTIFICATE_EXPIRED"), (NOT_YET_VALID, "CERTIFICATE_NOT_YET_VALID")]
)
def test_a_server_out_of_its_time(ca: Authority, days: tuple[float, float], cause: str) -> None:
    with bare_server(ca.issue("untimely", days=days)) as address:
        assert cause_of(address, ca_file=ca.ca_file) == cause


@pytest.mark.parametrize("trusted", ["other", "system"])
def test_a_server_of_another_ca(tls: ServerProcess, other: Authority, token: str, trusted: str) -> None:
    ca_file = other.ca_file if trusted == "other" else "system"
    assert cause_of(tls.address, ca_file=ca_file, token=token) == "UNKNOWN_CA"


def test_a_server_of_another_name_and_what_its_names_are(tls: ServerProcess, ca: Authority, token: str) -> None:
    error = failure(tls.address, ca_file=ca.ca_file, token=token, server_name="elsewhere.example")
    assert (error.reason, error.metadata["cause"]) == ("TLS_FAILED", "WRONG_NAME")
    assert "'localhost', '127.0.0.1'" in error.message
    assert "elsewhere.example" in error.message
    with kedge.connect(tls.address, ca_file=ca.ca_file, token=token, server_name="localhost"):
        pass


def test_a_server_that_speaks_plaintext(server: ServerProcess, ca: Authority) -> None:
    assert cause_of(server.address, ca_file=ca.ca_file) == "SERVER_IS_PLAINTEXT"


@pytest.mark.parametrize("given", [None, "kedge_some"])
def test_a_server_that_wants_tls(tls: ServerProcess, given: str | None) -> None:
    assert cause_of(tls.address, token=given) == "SERVER_WANTS_TLS"


@pytest.mark.parametrize("which", ["none", "expired", "not yet valid", "of another CA"])
def test_a_client_certificate_that_is_refused(mtls: ServerProcess, ca: Authority, other: Authority, which: str) -> None:
    uris = ["kedge://alice/admin"]
    match which:
        case "none":
            own: dict[str, Path] = {}
        case "expired":
            own = pair(ca.issue("late", hosts=(), uris=uris, days=EXPIRED))
        case "not yet valid":
            own = pair(ca.issue("early", hosts=(), uris=uris, days=NOT_YET_VALID))
        case _:
            own = pair(other.issue("foreign", hosts=(), uris=uris))
    assert cause_of(mtls.address, ca_file=ca.ca_file, **own) == "CLIENT_CERTIFICATE_REFUSED"


def test_a_server_of_an_old_tls(ca: Authority) -> None:
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    old.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
    issued = ca.issue("old")
    old.load_cert_chain(issued.cert_file, issued.key_file)
    with answering(lambda connection: old.wrap_socket(connection, server_side=True).close()) as address:
        assert cause_of(address, ca_file=ca.ca_file) == "TLS_VERSION"


@pytest.mark.parametrize("ca_name", ["ca", None])
def test_what_is_no_server_of_ours_is_only_unavailable(ca: Authority, ca_name: str | None) -> None:
    secrets = {} if ca_name is None else {"ca_file": ca.ca_file}
    with socket.create_server(("127.0.0.1", 0)) as closed:
        address = f"127.0.0.1:{closed.getsockname()[1]}"
    for give_up_seconds in (0.1, 1.5):
        with pytest.raises(kedge.KedgeError) as caught:
            kedge.connect(address, timeout_seconds=give_up_seconds, **secrets)
        assert caught.value.reason == "SERVER_UNAVAILABLE"


def test_a_certificate_that_expires_in_training_is_what_is_reported_in_the_end(
    ca: Authority, other: Authority, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As when the server comes back with another certificate."""
    served, trusted = ca.issue("served"), folder / "trusted.pem"
    trusted.write_bytes(ca.ca)
    with secure_server(served) as first, kedge.connect(first.address, ca_file=trusted, retry_seconds=2.0) as client:
        assert client.list_runs() == []
        port = first.address.rpartition(":")[2]
        first.stop()
        foreign = other.issue("served-by-another")
        environment = {"KEDGE_TLS__CERT_FILE": str(foreign.cert_file), "KEDGE_TLS__KEY_FILE": str(foreign.key_file)}
        with ServerProcess("--listen", f"127.0.0.1:{port}", environment=environment):
            with caplog.at_level(logging.WARNING, logger="kedge"), pytest.raises(kedge.KedgeError) as caught:
                client.list_runs()
            assert (caught.value.reason, caught.value.metadata["cause"]) == ("TLS_FAILED", "UNKNOWN_CA")
            assert "trying again for 2 s" in caplog.text
            trusted.write_bytes(other.ca)
            with kedge.connect(first.address, ca_file=trusted) as again:
                assert again.list_runs() == []
            assert client.list_runs() == [], "the same client goes on with the file's new content"


def test_connections_that_end_for_their_age_are_no_matter(
    ca: Authority, eventually: Callable[[Callable[[], object]], None], caplog: pytest.LogCaptureFixture
) -> None:
    own, ages = ca.issue("aging", hosts=(), uris=["kedge://alice/admin"]), {"max_connection_age_seconds": 0.5}
    with (
        secure_server(ca.issue("aged"), ca.ca_file, max_connection_age_grace_seconds=0.1, **ages) as server,
        kedge.connect(server.address, ca_file=ca.ca_file, **pair(own)) as client,
        caplog.at_level(logging.DEBUG, logger="kedge"),
    ):
        params = {"w": np.zeros(1, np.float32)}
        run = client.create_run("r", params=params, optimizer=optim.SGD(lr=1.0), aggregation=kedge.Synchronous(1))
        with run.join(transport="grpc") as worker:
            worker.pull()

            def has_been_cut_often() -> bool:
                worker.step({"w": np.ones(1, np.float32)})
                return caplog.text.count("has ended the connection for its age") >= 3

            eventually(has_been_cut_often)
            assert run.status().applied_count == worker.step_number
    assert [record for record in caplog.records if "its age" in record.message and record.levelno > logging.DEBUG] == []


def test_no_secret_is_in_an_error_a_log_or_a_repr(
    tls: ServerProcess, ca: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    secret = "kedge_very-secret"
    (tmp_path / "token").write_text(secret)
    with caplog.at_level(logging.DEBUG):
        errors = [failure(tls.address, ca_file=ca.ca_file, token_file=tmp_path / "token")]
        errors.append(failure(tls.address, token=secret))
        for arguments in ({"token": secret + "\n"}, {"token": secret, "token_file": tmp_path / "token"}):
            with pytest.raises(ValueError, match="token") as caught:
                kedge.connect(tls.address, **arguments)  # type: ignore[arg-type]
            errors.append(caught.value)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"would go to 192\.0\.2\.1:5 unencrypted") as unencrypted:
            kedge.connect("192.0.2.1:5", token=secret)
    said = [caplog.text, *map(repr, errors), *map(str, errors), str(unencrypted.value)]
    assert not any(secret in text for text in said)
