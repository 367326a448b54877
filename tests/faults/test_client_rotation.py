"""The SDK trains on while tokens and certificates are replaced, and while its server ends connections for their age."""

import itertools
import ssl
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from certificates import Authority, Issued
from secure_wire import secure_server
from server_process import ServerProcess
from tokens_file import TokensFile

import kedge
from kedge import optim
from kedge.wire.errors import AccessError

ROTATION_COUNT = 20
AGE_SECONDS = 1.0
GRADIENT = {"w": np.ones(1000, np.float32)}


class Load:
    """One worker that steps until it is told to stop."""

    def __init__(self, run: kedge.Run, name: str, in_background: Callable[..., Future[int]]) -> None:
        self._has_ended = threading.Event()
        self.count = 0
        self._future = in_background(self._train, run, name)

    def _train(self, run: kedge.Run, name: str) -> int:
        with run.join(name, transport="grpc") as worker:
            worker.pull()
            while not self._has_ended.is_set():
                worker.step(GRADIENT)
                assert worker.last_result is not None
                assert worker.last_result.outcome == "applied"
                self.count += 1
        return self.count

    def has_gone_on(self, from_count: int) -> bool:
        """Whether it has made two more steps, the second of which began after the call with `from_count`."""
        if self._future.done():
            self._future.result()
        return self.count >= from_count + 2

    def end(self) -> int:
        self._has_ended.set()
        return self._future.result(timeout=60)


def shown_by(server: ServerProcess) -> bytes:
    """The certificate that it shows in a handshake, PEM."""
    host, _, port = server.address.rpartition(":")
    return ssl.get_server_certificate((host, int(port)), timeout=20).encode()


def create(client: kedge.Client) -> kedge.Run:
    return client.create_run(
        "rotated",
        params={"w": np.zeros(1000, np.float32)},
        optimizer=optim.SGD(lr=1.0),
        aggregation=kedge.Asynchronous(),
    )


class Site:
    """A server's files and a client's, and how each is replaced: what is new is known before what is old goes."""

    def __init__(self, folder: Path, eventually: Callable[[Callable[[], object]], None]) -> None:
        self._folder, self._eventually, self._numbers = folder, eventually, itertools.count()
        self._server_ca, self._client_ca = self._authority(), self._authority()
        self.pair, self.own = self._server_ca.issue("server"), self._client_ca.issue("own", hosts=())
        self.clients, self._trusted = folder / "clients.pem", folder / "trusted.pem"
        self.clients.write_bytes(self._client_ca.ca)
        self._trusted.write_bytes(self._server_ca.ca)
        self.tokens, self._token_file = TokensFile(folder / "tokens"), folder / "token"
        self._token = self.tokens.add("alice", "admin")
        self.tokens.write()
        self._token_file.write_text(self._token)

    @property
    def sources(self) -> dict[str, Path]:
        """What the client is given."""
        return {"token_file": self._token_file, "ca_file": self._trusted, **files(self.own)}

    def replace_token(self, server: ServerProcess, go_on: Callable[[], None]) -> None:
        former, self._token = self._token, self.tokens.add("alice", "admin")
        self.tokens.write()
        self._eventually(lambda: self._is_accepted(server, self.own))
        self._token_file.write_text(f"{self._token}\n")
        go_on()
        self.tokens.remove(former)
        self.tokens.write()

    def replace_client_ca(self, server: ServerProcess, go_on: Callable[[], None]) -> None:
        former, self._client_ca = self._client_ca, self._authority()
        self.clients.write_bytes(former.ca + self._client_ca.ca)
        fresh = self._client_ca.issue("fresh", hosts=())
        self._eventually(lambda: self._is_accepted(server, fresh))
        self.own.replace(fresh)
        go_on()
        self.clients.write_bytes(self._client_ca.ca)

    def replace_server_ca(self, server: ServerProcess, go_on: Callable[[], None]) -> None:
        former, self._server_ca = self._server_ca, self._authority()
        self._trusted.write_bytes(former.ca + self._server_ca.ca)
        go_on()
        fresh = self._server_ca.issue("server")
        self.pair.replace(fresh)
        self._eventually(lambda: shown_by(server) == fresh.cert)
        self._trusted.write_bytes(self._server_ca.ca)

    def _authority(self) -> Authority:
        folder = self._folder / f"ca{next(self._numbers)}"
        folder.mkdir()
        return Authority(folder)

    def _is_accepted(self, server: ServerProcess, own: Issued) -> bool:
        try:
            with kedge.connect(server.address, token=self._token, ca_file=self._trusted, **files(own)) as client:
                return bool(client.list_runs())
        except AccessError:
            return False


def files(issued: Issued) -> dict[str, Path]:
    return {"cert_file": issued.cert_file, "key_file": issued.key_file}


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_nothing_fails_while_tokens_and_certificates_of_both_sides_are_replaced(
    tmp_path: Path,
    in_background: Callable[..., Any],
    eventually: Callable[[Callable[[], object]], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    site, pause = Site(tmp_path, eventually), threading.Event()
    ages = {"max_connection_age_seconds": AGE_SECONDS, "max_connection_age_grace_seconds": AGE_SECONDS}
    with (
        secure_server(site.pair, site.clients, tokens_file=site.tokens.path, **ages) as server,
        kedge.connect(server.address, **site.sources) as client,
    ):
        run = create(client)
        loads = [Load(run, f"w{number}", in_background) for number in range(2)]

        def all_go_on() -> None:
            counts = [load.count for load in loads]
            eventually(lambda: all(map(Load.has_gone_on, loads, counts)))

        changes = itertools.cycle([site.replace_token, site.replace_client_ca, site.replace_server_ca])
        for change in itertools.islice(changes, ROTATION_COUNT):
            change(server, all_go_on)
            pause.wait(AGE_SECONDS)  # connections are asked to end: what follows is done with what holds by now
            all_go_on()
        taken = sum(load.end() for load in loads)
        status = run.status()
        assert (status.step, status.applied_count) == (taken, taken)
        assert run.pull("fast")["w"][0] == -float(taken)
        assert not any("error" in line or "defect" in line for line in server.log)
    assert "TLS_FAILED" not in caplog.text


@pytest.mark.timeout(60)
def test_withdrawn_token_is_an_error_at_once_and_another_one_in_its_file_is_none(tmp_path: Path) -> None:
    tokens, token_file = TokensFile(tmp_path / "tokens"), tmp_path / "token"
    token, spare = tokens.add("alice", "admin"), tokens.add("alice", "admin")
    tokens.write()
    token_file.write_text(token)
    with (
        ServerProcess(environment=tokens.environment) as server,
        kedge.connect(server.address, token_file=token_file) as client,
    ):
        run = create(client)
        with run.join("w", transport="grpc") as worker:
            worker.pull()
            worker.step(GRADIENT)
            token_file.write_text(spare)
            tokens.remove(token)
            tokens.write()
            while worker.step_number < 200:
                worker.step(GRADIENT)
            tokens.remove(spare)
            tokens.write()

            with pytest.raises(kedge.KedgeError) as caught:  # noqa: PT012  it takes some steps
                for _ in itertools.count():
                    worker.step(GRADIENT)
            assert caught.value.reason == "UNAUTHENTICATED"
            assert spare not in str(caught.value)
