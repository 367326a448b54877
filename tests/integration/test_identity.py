"""A worker is who joined as it: nobody else may use its lease, whatever becomes of the server meanwhile."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self

import grpc
import numpy as np
import pytest
from certificates import Authority
from durable_server import DurableServer
from google.protobuf.duration_pb2 import Duration
from secure_wire import SecureWireClient, secure_server
from server_process import ServerProcess
from tokens_file import TokensFile
from wire_client import WireClient, asynchronous, error_info, floats, push_header, push_stream, reason_of

from kedge.v1 import checkpoint_service_pb2 as checkpoints
from kedge.v1 import optimizer_service_pb2 as pb
from kedge.v1 import run_service_pb2

RUN = "runs/r"
WORKER = f"{RUN}/workers/w"
WEIGHTS, GRADIENT = floats(0.0, 0.0), floats(1.0, 2.0)
LONG = Duration(seconds=600)


class Stage(NamedTuple):
    """A server, and clients of three identities: two workers, and an admin."""

    server: ServerProcess | DurableServer
    file: TokensFile
    alpha: WireClient
    beta: WireClient
    boss: WireClient

    @classmethod
    def set(cls, server: ServerProcess | DurableServer, file: TokensFile, tokens: dict[str, str]) -> Self:
        return cls(
            server, file, *(WireClient(server.address, token=tokens[name]) for name in ("alpha", "beta", "boss"))
        )

    def create(self, run_id: str = "r") -> bytes:
        """A run; its digest."""
        self.boss.create(run_id, WEIGHTS, aggregation=asynchronous())
        return self.boss.run(f"runs/{run_id}", full=True).manifest.digest

    def close(self) -> None:
        for client in (self.alpha, self.beta, self.boss):
            client.close()


def a_file(folder: Path) -> tuple[TokensFile, dict[str, str]]:
    file = TokensFile(folder / "tokens")
    tokens = {name: file.add(name, role) for name, role in (("alpha", "worker"), ("beta", "worker"), ("boss", "admin"))}
    file.write()
    return file, tokens


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    file, tokens = a_file(tmp_path_factory.mktemp("identity"))
    with ServerProcess(environment=file.environment) as server:
        stage = Stage.set(server, file, tokens)
        yield stage
        stage.close()


def push_alone(wire: WireClient, lease: Any, digest: bytes, sequence: int) -> Any:
    return wire.push(push_stream(lease, digest, GRADIENT, sequence=sequence))


def exchange(wire: WireClient, *requests: Any) -> list[Any]:
    return list(wire.call("OptimizerService", "Exchange", requests))


def push_in_exchange(wire: WireClient, lease: Any, digest: bytes, sequence: int) -> Any:
    header = push_header(lease, digest, size_bytes=8, sequence=sequence)
    rest = [m.SerializeToString() for m in push_stream(lease, digest, GRADIENT)[1:]]  # chunk and trailer are the same
    return exchange(wire, pb.ExchangeRequest(push=header), *rest)[0].result


def pull_in_exchange(wire: WireClient, lease: Any, *_: Any) -> Any:
    return exchange(wire, pb.ExchangeRequest(pull=pb.ExchangePull(worker=lease.worker)))


def heartbeat(wire: WireClient, lease: Any, *_: Any) -> Any:
    request = run_service_pb2.HeartbeatRequest(worker=lease.worker, epoch=lease.epoch)
    return wire.call("RunService", "Heartbeat", request)


def leave(wire: WireClient, lease: Any, *_: Any) -> Any:
    request = run_service_pb2.LeaveRunRequest(worker=lease.worker, epoch=lease.epoch)
    return wire.call("RunService", "LeaveRun", request)


def join(wire: WireClient, lease: Any, *_: Any) -> Any:
    run, _, worker_id = lease.worker.partition("/workers/")
    return wire.join(run, worker_id, lease=LONG)


def offer_memory(wire: WireClient, lease: Any, *_: Any) -> Any:
    request = pb.OfferMemoryRequest(worker=lease.worker, epoch=lease.epoch)
    return wire.call("OptimizerService", "OfferMemory", request)


WAYS: dict[str, Callable[..., Any]] = {
    way.__name__: way for way in (join, heartbeat, leave, push_alone, push_in_exchange, pull_in_exchange, offer_memory)
}


def assert_refused(way: str, wire: WireClient, lease: Any, digest: bytes, sequence: int = 1) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        WAYS[way](wire, lease, digest, sequence)
    assert reason_of(caught.value) == "WRONG_IDENTITY", way
    assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
    assert error_info(caught.value).metadata == {"worker": lease.worker}
    assert "alpha" not in caught.value.details()


def reason_when(way: str, wire: WireClient, lease: Any, digest: bytes, sequence: int = 1) -> str:
    with pytest.raises(grpc.RpcError) as caught:
        WAYS[way](wire, lease, digest, sequence)
    return reason_of(caught.value)


@pytest.mark.parametrize("other", ["beta", "boss"])
@pytest.mark.parametrize("way", WAYS)
def test_nobody_else_uses_a_lease_nor_changes_anything_by_trying(
    shared: Stage, run_id: str, way: str, other: str
) -> None:
    digest = shared.create(run_id)
    lease = shared.alpha.join(f"runs/{run_id}", "w", lease=LONG)
    assert_refused(way, getattr(shared, other), lease, digest)
    assert shared.boss.pull(f"runs/{run_id}")[0].step == 0
    assert push_alone(shared.alpha, lease, digest, 1).outcome == pb.PUSH_OUTCOME_APPLIED
    np.testing.assert_array_equal(shared.beta.pull(f"runs/{run_id}")[1], WEIGHTS - GRADIENT)


def test_nobody_else_does_so_after_the_server_was_killed_and_came_back(tmp_path: Path) -> None:
    """From its journal, and from a checkpoint."""
    file, tokens = a_file(tmp_path)
    with DurableServer(tmp_path / "data", environment=file.environment) as server:
        server.start()
        stage = Stage.set(server, file, tokens)
        digest = stage.create()
        lease = stage.alpha.join(RUN, "w", lease=LONG)
        gone = stage.alpha.join(RUN, "gone", lease=LONG)
        leave(stage.alpha, gone)
        for sequence, come_back in enumerate((restart, checkpoint_and_restart, restart), 1):
            come_back(stage)
            stage.close()
            stage = Stage.set(server, file, tokens)
            for way in WAYS:
                assert_refused(way, stage.beta, lease, digest, sequence)
            for way in ("heartbeat", "push_alone"):
                assert_refused(way, stage.beta, gone, digest)
                assert reason_when(way, stage.alpha, gone, digest) == "LEASE_EXPIRED"
            assert push_alone(stage.alpha, lease, digest, sequence).outcome == pb.PUSH_OUTCOME_APPLIED
            assert stage.boss.pull(RUN)[0].step == sequence
        stage.close()


def restart(stage: Stage) -> None:
    stage.server.restart()


def checkpoint_and_restart(stage: Stage) -> None:
    stage.boss.call("CheckpointService", "CreateCheckpoint", checkpoints.CreateCheckpointRequest(run=RUN))
    stage.server.restart()


def test_leases_of_when_nobody_was_asked_go_on_when_somebody_is_and_the_other_way_round(tmp_path: Path) -> None:
    file, tokens = a_file(tmp_path)
    environment = {"KEDGE_LOG__LEVEL": "warning"}
    with DurableServer(tmp_path / "data", environment=environment) as server:
        server.start()
        anyone = WireClient(server.address)
        anyone.create("r", WEIGHTS, aggregation=asynchronous())
        digest, lease = anyone.run(RUN, full=True).manifest.digest, anyone.join(RUN, "w", lease=LONG)
        server.kill()
        environment |= file.environment
        server.start()
        stage = Stage.set(server, file, tokens)
        assert push_alone(stage.alpha, lease, digest, 1).outcome == pb.PUSH_OUTCOME_APPLIED
        assert push_alone(stage.beta, lease, digest, 2).outcome == pb.PUSH_OUTCOME_APPLIED
        owned = join(stage.alpha, lease)
        assert_refused("push_alone", stage.beta, owned, digest, 1)
        server.kill()
        del environment["KEDGE_ACCESS__TOKENS_FILE"]
        server.start()
        assert push_alone(stage.beta, owned, digest, 1).outcome == pb.PUSH_OUTCOME_APPLIED
        stage.close()
        anyone.close()


def test_admin_may_send_anybodys_worker_away(shared: Stage, run_id: str) -> None:
    digest = shared.create(run_id)
    lease = shared.alpha.join(f"runs/{run_id}", "w", lease=LONG)
    evict = run_service_pb2.EvictWorkerRequest(worker=lease.worker, cause="it burns", block=Duration(seconds=60))
    with pytest.raises(grpc.RpcError) as caught:
        shared.beta.call("RunService", "EvictWorker", evict)
    assert reason_of(caught.value) == "PERMISSION_DENIED"
    shared.boss.call("RunService", "EvictWorker", evict)
    assert reason_when("push_alone", shared.alpha, lease, digest) == "WORKER_EVICTED"


def test_owner_may_take_its_own_place_in_another_process(shared: Stage, run_id: str) -> None:
    digest = shared.create(run_id)
    first = shared.alpha.join(f"runs/{run_id}", "w", lease=LONG)
    second = join(shared.alpha, first)
    assert second.epoch > first.epoch
    assert reason_when("push_alone", shared.alpha, first, digest) == "WORKER_SUPERSEDED"
    assert push_alone(shared.alpha, second, digest, 1).outcome == pb.PUSH_OUTCOME_APPLIED
    for lease in (first, second):
        assert_refused("push_alone", shared.beta, lease, digest, 2)


def test_name_whose_lease_has_ended_is_free_and_what_it_did_stays_its_owners(shared: Stage, run_id: str) -> None:
    digest = shared.create(run_id)
    first = shared.alpha.join(f"runs/{run_id}", "w", lease=LONG)
    assert push_alone(shared.alpha, first, digest, 1).outcome == pb.PUSH_OUTCOME_APPLIED
    leave(shared.alpha, first)
    assert_refused("push_alone", shared.beta, first, digest, 1)  # the recorded answer is not for it
    second = join(shared.beta, first)
    assert_refused("push_alone", shared.beta, first, digest, 1)
    assert push_alone(shared.alpha, first, digest, 1).step == 1  # the recorded answer
    assert reason_when("push_alone", shared.alpha, first, digest, 2) == "WORKER_SUPERSEDED"
    assert push_alone(shared.beta, second, digest, 1).outcome == pb.PUSH_OUTCOME_APPLIED


def test_identity_is_the_id_and_not_the_token(shared: Stage, run_id: str, eventually: Callable[..., None]) -> None:
    digest = shared.create(run_id)
    lease = shared.alpha.join(f"runs/{run_id}", "w", lease=LONG)
    rotated = WireClient(shared.server.address, token=shared.file.add("alpha", "worker"))
    shared.file.write()

    def is_known() -> bool:
        try:
            return bool(heartbeat(rotated, lease))
        except grpc.RpcError as error:
            return reason_of(error) != "UNAUTHENTICATED"

    eventually(is_known)
    assert push_alone(rotated, lease, digest, 1).outcome == pb.PUSH_OUTCOME_APPLIED
    assert push_alone(shared.alpha, lease, digest, 2).outcome == pb.PUSH_OUTCOME_APPLIED
    rotated.close()


def test_identity_of_a_certificate_is_that_of_a_token_with_its_id_and_goes_before_another_token(
    tmp_path: Path,
) -> None:
    authority = Authority(tmp_path)
    pair = authority.issue("server")
    plain = authority.issue("plain")
    certified = {name: authority.issue(name, uris=[f"kedge://{name}/worker"]) for name in ("alpha", "beta")}
    file, tokens = a_file(tmp_path)
    with secure_server(pair, authority.ca_file, tokens_file=file.path) as server:
        clients = [
            SecureWireClient(server.address, authority, plain, token=tokens["boss"]),
            SecureWireClient(server.address, authority, plain, token=tokens["alpha"]),
            SecureWireClient(server.address, authority, certified["alpha"]),
            SecureWireClient(server.address, authority, certified["beta"], token=tokens["alpha"]),
        ]
        boss, alpha, certified_alpha, beta = clients
        boss.create("r", WEIGHTS, aggregation=asynchronous())
        digest, lease = boss.run(RUN, full=True).manifest.digest, alpha.join(RUN, "w", lease=LONG)
        assert push_alone(certified_alpha, lease, digest, 1).outcome == pb.PUSH_OUTCOME_APPLIED
        assert_refused("push_alone", beta, lease, digest, 2)
        for client in clients:
            client.close()
