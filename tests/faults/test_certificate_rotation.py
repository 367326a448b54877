"""Certificates and CAs are replaced while workers push: no push fails, and what is withdrawn is out in time."""

import itertools
import random
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import grpc
import pytest
from certificates import Authority, Issued
from google.protobuf.duration_pb2 import Duration
from secure_wire import SecureWireClient, secure_server
from server_process import ServerProcess
from wire_client import asynchronous, floats, push_stream

from kedge.v1 import optimizer_service_pb2 as pb
from kedge.v1 import run_service_pb2

WORKER_COUNT = 3
AGE_SECONDS = 1.0
GRACE_SECONDS = 1.0


@pytest.fixture
def ca(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def another(folder: Path, name: str) -> Authority:
    (folder / name).mkdir()
    return Authority(folder / name, name)


def shown_by(server: ServerProcess) -> bytes:
    """The certificate that it shows in a handshake, PEM."""
    host, _, port = server.address.rpartition(":")
    return ssl.get_server_certificate((host, int(port)), timeout=20).encode()


class Load:
    """Workers that push one contribution after the other, each on its connection, and watch for errors.

    A push whose connection ends under it is sent again with its sequence, as docs/protocol.md asks of every client.
    """

    def __init__(self, in_background: Callable[..., Future[int]], clients: list[SecureWireClient], run: Any) -> None:
        self._run = run
        self.repeated: list[str] = []
        self._has_ended = threading.Event()
        self._counts = [0] * len(clients)
        self._futures = [in_background(self._push, index, client) for index, client in enumerate(clients)]

    def _push(self, index: int, client: SecureWireClient) -> int:
        lease = client.join(self._run.name, f"w{index}", lease=Duration(seconds=600))
        for sequence in itertools.count(1):
            if self._has_ended.is_set():
                break
            stream = push_stream(lease, self._run.manifest.digest, floats(1, 0), sequence=sequence)
            assert self._sent(client, stream).outcome == pb.PUSH_OUTCOME_APPLIED
            self._counts[index] = sequence
        return self._counts[index]

    def _sent(self, client: SecureWireClient, stream: list[Any]) -> Any:
        for is_last in (False, False, True):
            try:
                return client.push(stream)
            except grpc.RpcError as error:
                if is_last or error.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise
                self.repeated.append(error.details())
        raise AssertionError

    @property
    def counts(self) -> list[int]:
        """Pushes so far; raises what has gone wrong."""
        for future in self._futures:
            if future.done():
                future.result()
        return list(self._counts)

    def end(self) -> int:
        """All pushes that were answered."""
        self._has_ended.set()
        return sum(future.result(timeout=30) for future in self._futures)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("rotation_count", [5, pytest.param(50, marks=pytest.mark.soak)])
def test_no_push_fails_while_certificates_and_cas_are_replaced(
    ca: Authority,
    tmp_path: Path,
    in_background: Callable[..., Any],
    eventually: Callable[[Callable[[], object]], None],
    record_property: Callable[[str, object], None],
    rotation_count: int,
) -> None:
    pair, bundle, choice = ca.issue("server"), tmp_path / "clients.pem", random.Random(7)
    bundle.write_bytes(ca.ca)
    ages = {"max_connection_age_seconds": 0.5, "max_connection_age_grace_seconds": 30.0}
    worker = ca.issue("worker", hosts=(), uris=["kedge://alice/admin"])
    with secure_server(pair, bundle, **ages) as server:
        clients = [SecureWireClient(server.address, ca, worker) for _ in range(WORKER_COUNT)]
        run = clients[0].create("rotated", floats(0, 0), aggregation=asynchronous())
        load = Load(in_background, clients, run)
        for index in range(rotation_count):
            fresh, other = ca.issue(f"fresh{index}"), another(tmp_path, f"other{index}")
            changes: list[Callable[[], object]] = [
                lambda fresh=fresh: pair.key_file.write_bytes(fresh.key),
                lambda fresh=fresh: pair.cert_file.write_bytes(fresh.cert),
                lambda other=other: bundle.write_bytes(other.ca + ca.ca),
            ]
            for change in choice.sample(changes, len(changes)):
                change()
                before = load.counts
                eventually(lambda before=before: all(b > a for a, b in zip(before, load.counts, strict=True)))
            eventually(lambda fresh=fresh: shown_by(server) == fresh.cert)
        pushed = load.end()
        assert clients[0].run(run.name).state.step == pushed
        assert clients[0].pull(run.name)[1][0] == -pushed
        for client in clients:
            client.close()
        assert [line for line in server.log if "cannot be used" not in line] == []
    assert len(load.repeated) < pushed / 100
    text = f"{pushed} pushes of {WORKER_COUNT} workers, none failed, {len(load.repeated)} were sent again"
    record_property("measured", f"{rotation_count} rotations, {text}")


def listing(client: SecureWireClient) -> bool:
    """Whether it is answered."""
    try:
        client.call("RunService", "ListRuns", run_service_pb2.ListRunsRequest(), timeout=5)
    except grpc.RpcError:
        return False
    return True


def silence() -> Iterator[Any]:
    threading.Event().wait(60)
    yield from ()


def test_withdrawn_client_ca_is_cut_within_age_and_grace_and_others_are_not(
    ca: Authority, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    bad_ca, bundle = another(tmp_path, "bad"), tmp_path / "clients.pem"
    bundle.write_bytes(ca.ca + bad_ca.ca)
    ages = {"max_connection_age_seconds": AGE_SECONDS, "max_connection_age_grace_seconds": GRACE_SECONDS}

    def client_of(issuer: Authority, server: ServerProcess) -> SecureWireClient:
        pair: Issued = issuer.issue("client", hosts=(), uris=["kedge://alice/admin"])
        return SecureWireClient(server.address, ca, pair)

    with secure_server(ca.issue("server"), bundle, **ages) as server:
        good, bad = client_of(ca, server), client_of(bad_ca, server)
        assert listing(good)
        assert listing(bad)
        bundle.write_bytes(ca.ca)
        begun_at = time.monotonic()
        stream = bad.call("OptimizerService", "Exchange", silence(), timeout=60)
        with pytest.raises(grpc.RpcError) as caught:
            next(stream)  # in the middle of a call
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        while listing(bad):
            assert time.monotonic() - begun_at < 30
        seconds = time.monotonic() - begun_at
        # Besides, the file is looked at once a second, and gRPC takes up to a tenth more than the age.
        assert seconds < 2 * (AGE_SECONDS + GRACE_SECONDS) + 3
        assert not any(listing(bad) for _ in range(3))
        assert any(listing(good) for _ in range(3))  # one may fall to the end of its connection
        for client in (good, bad):
            client.close()
        late = client_of(bad_ca, server)
        assert not listing(late)
        late.close()
    record_property("measured", f"a withdrawn CA was out after {seconds:.1f} s")
