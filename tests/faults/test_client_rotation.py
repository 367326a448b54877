"""The SDK trains on while tokens and certificates are replaced, and while its server ends connections for their age."""

import itertools
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from certificates import Authority
from secure_wire import secure_server
from server_process import ServerProcess
from tokens_file import TokensFile

import kedge
from kedge import optim
from kedge.wire.errors import AccessError

ROTATION_COUNT = 20
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


def create(client: kedge.Client) -> kedge.Run:
    return client.create_run(
        "rotated",
        params={"w": np.zeros(1000, np.float32)},
        optimizer=optim.SGD(lr=1.0),
        aggregation=kedge.Asynchronous(),
    )


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_nothing_fails_while_tokens_and_certificates_of_both_sides_are_replaced(
    tmp_path: Path,
    in_background: Callable[..., Any],
    eventually: Callable[[Callable[[], object]], None],
) -> None:
    ca = Authority(tmp_path)
    pair, own = ca.issue("server"), ca.issue("worker", hosts=())
    trusted, clients = tmp_path / "trusted.pem", tmp_path / "clients.pem"
    trusted.write_bytes(ca.ca)
    clients.write_bytes(ca.ca)
    tokens, token_file = TokensFile(tmp_path / "tokens"), tmp_path / "token"
    token = tokens.add("alice", "admin")
    tokens.write()
    token_file.write_text(token)
    secrets = {"token_file": token_file, "ca_file": trusted, "cert_file": own.cert_file, "key_file": own.key_file}
    ages = {"max_connection_age_seconds": 1.0, "max_connection_age_grace_seconds": 1.0}
    with (
        secure_server(pair, clients, tokens_file=tokens.path, **ages) as server,
        kedge.connect(server.address, **secrets) as client,
    ):
        run = create(client)
        loads = [Load(run, f"w{number}", in_background) for number in range(2)]

        def all_go_on() -> None:
            counts = [load.count for load in loads]
            eventually(lambda: all(map(Load.has_gone_on, loads, counts)))

        all_go_on()
        for number in range(ROTATION_COUNT):
            match number % 4:
                case 0:  # a token, which is valid for a while beside the one of before
                    fresh = tokens.add("alice", "admin")
                    tokens.write()
                    eventually(lambda fresh=fresh: is_accepted(server.address, trusted, own, fresh))
                    token_file.write_text(f"{fresh}\n")
                    all_go_on()
                    tokens.remove(token)
                    tokens.write()
                    token = fresh
                case 1:
                    own.replace(ca.issue(f"own{number}", hosts=()))
                case 2:
                    pair.replace(ca.issue(f"server{number}"))
                case 3:
                    other = tmp_path / f"other{number}"
                    other.mkdir()
                    trusted.write_bytes(ca.ca + Authority(other).ca)
            all_go_on()
        taken = sum(load.end() for load in loads)
        status = run.status()
        assert (status.step, status.applied_count) == (taken, taken)
        assert run.pull("fast")["w"][0] == -float(taken)
        asked_in_vain = "method=kedge.v1.RunService.ListRuns"  # by `is_accepted`
        assert [line for line in server.log if asked_in_vain not in line] == []


def is_accepted(address: str, trusted: Path, own: Any, token: str) -> bool:
    try:
        with kedge.connect(
            address, token=token, ca_file=trusted, cert_file=own.cert_file, key_file=own.key_file
        ) as client:
            return bool(client.list_runs())
    except AccessError:
        return False


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
