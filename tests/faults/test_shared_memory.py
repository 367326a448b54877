"""Memory that a worker and a server on one host share: who dies leaves nothing, and who misuses it changes nothing."""

import fcntl
import gc
import mmap
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
from durable_server import DurableServer
from routed_network import RoutedNetwork
from server_process import ServerProcess
from wire_client import WireClient, push_header, reason_of

import kedge
from kedge import optim
from kedge.v1 import optimizer_service_pb2 as pb
from kedge.v1 import tensor_pb2

SIZE = 400_000  # more than what the server copies on its loop
ALONE = kedge.Synchronous(quorum=1)


def grads(value: float, size: int = SIZE) -> dict[str, np.ndarray]:
    return {"w": np.full(size, value, np.float32)}


def mapped_count(pid: int) -> int:
    return Path(f"/proc/{pid}/maps").read_text().count("memfd:kedge")


def named_files() -> set[Path]:
    return {path for folder in ("/dev/shm", "/tmp") for path in Path(folder).glob("*kedge*")}


# What a user sees


@pytest.mark.parametrize("size", [1000, SIZE])
def test_weights_that_were_returned_never_change(new_run, size: int) -> None:
    run = new_run(ALONE, size=size)
    with run.join(transport="shared_memory") as worker:
        kept = [worker.pull()["w"]]
        kept += [worker.step(grads(1.0, size))["w"] for _ in range(5)]
        rows = [worker.step(grads(1.0, size))["w"][step : step + 2] for step in range(20)]
        kept[2][:] = 100.0  # they are the caller's to write to, too
        last = worker.step(grads(1.0, size))["w"]
    assert [set(weights.tolist()) for weights in kept] == [{0.0}, {-1.0}, {100.0}, {-3.0}, {-4.0}, {-5.0}]
    assert [row.tolist() for row in rows] == [[-6.0 - step] * 2 for step in range(20)]
    assert set(last.tolist()) == {-26.0}


@pytest.mark.parametrize("size", [1000, SIZE])
def test_slot_that_is_overwritten_after_the_answer_changes_nothing(new_run, size: int) -> None:
    run = new_run(kedge.Synchronous(quorum=2), size=size)
    with run.join(transport="shared_memory") as a, run.join(transport="grpc") as b:
        a.pull()
        b.pull()
        assert a.push(grads(1.0, size)).outcome == "deferred"
        a._session._exchange._memory.put([np.full(size, np.nan, np.float32)])
        assert b.push(grads(3.0, size)).outcome == "applied"
    assert set(run.pull()["w"].tolist()) == {-2.0}


def test_server_without_shared_memory_is_used_over_grpc() -> None:
    with (
        ServerProcess(environment={"KEDGE_SERVER__SHARED_MEMORY": "false"}) as server,
        kedge.connect(server.address) as client,
    ):
        run = client.create_run("r", params=grads(0.0), optimizer=optim.SGD(lr=1.0), aggregation=ALONE)
        with run.join() as worker:
            worker.pull()
            assert set(worker.step(grads(1.0))["w"].tolist()) == {-1.0}
        with run.join(transport="shared_memory") as worker, pytest.raises(kedge.KedgeError) as error:
            worker.pull()
        assert error.value.reason == "SHARED_MEMORY_UNAVAILABLE"
        assert "server.shared_memory" in error.value.metadata["cause"]
        assert mapped_count(server.process.pid) == 0


_ELSEWHERE = """
import os, sys
import numpy as np
import kedge
address, run_name, user = sys.argv[1:]
with kedge.connect(address) as client:
    run = client.get_run(run_name)
    with run.join() as worker:
        worker.pull()  # and loads what another user may not be allowed to read
    if user: os.setuid(int(user))
    with run.join() as worker:
        worker.pull()
        print(worker.step({"w": np.ones(16, np.float32)})["w"][0])
    with run.join(transport="shared_memory") as worker:
        try:
            worker.pull()
        except kedge.KedgeError as error:
            print(error.reason)
"""


def elsewhere(address: str, user: str = "", command: tuple[str, ...] = ()) -> list[str]:
    """What a worker says that is not where, or not who, the server is."""
    with kedge.connect(address) as client:
        client.create_run(
            f"r{user}", params={"w": np.zeros(16, np.float32)}, optimizer=optim.SGD(lr=1.0), aggregation=ALONE
        )
    line = [*command, sys.executable, "-c", _ELSEWHERE, address, f"r{user}", user]
    done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.root
def test_another_users_worker_goes_over_grpc(server: ServerProcess) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root to become another user")
    assert elsewhere(server.address, user="65534") == ["-1.0", "SHARED_MEMORY_UNAVAILABLE"]


@pytest.mark.root
def test_worker_in_another_network_goes_over_grpc() -> None:
    if obstacle := RoutedNetwork.obstacle():
        pytest.skip(obstacle)
    with (
        RoutedNetwork() as network,
        ServerProcess("--listen", f"{network.address}:0", "--insecure") as server,
    ):
        assert elsewhere(server.address, command=network.command) == ["-1.0", "SHARED_MEMORY_UNAVAILABLE"]


# Whoever dies

_CROWD = """
import sys, time
import kedge
address, run_name, count = sys.argv[1:]
client = kedge.connect(address)
workers = [client.get_run(run_name).join(f"w{at}", transport="shared_memory") for at in range(int(count))]
weights = [worker.pull() for worker in workers]
print("all in", flush=True)
time.sleep(600)
"""


def test_workers_that_are_killed_leave_nothing(server: ServerProcess, new_run, run_id: str, eventually) -> None:
    new_run(kedge.Asynchronous())
    files, process = named_files(), psutil.Process(server.process.pid)
    mapped, descriptors = mapped_count(process.pid), process.num_fds()
    arguments = [sys.executable, "-c", _CROWD, server.address, run_id, "50"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as crowd:
        try:
            assert crowd.stdout.readline() == "all in\n"
            assert mapped_count(process.pid) == mapped + 50
        finally:
            crowd.kill()
    eventually(lambda: mapped_count(process.pid) == mapped)
    eventually(lambda: process.num_fds() <= descriptors)
    assert named_files() == files


def test_workers_share_memory_again_after_their_server_was_killed(tmp_path: Path) -> None:
    gc.collect()
    files, mapped = named_files(), mapped_count(os.getpid())
    with DurableServer(tmp_path / "data").start() as server, kedge.connect(server.address) as client:
        run = client.create_run("r", params=grads(0.0), optimizer=optim.SGD(lr=1.0), aggregation=ALONE)
        with run.join(transport="shared_memory") as worker:
            worker.pull()
            kept = worker.step(grads(1.0))["w"]
            server.kill()
            assert named_files() == files
            server.start()
            assert set(worker.step(grads(1.0))["w"].tolist()) == {-2.0}
            assert mapped_count(server.process.process.pid) == 1
            assert set(kept.tolist()) == {-1.0}
            assert mapped_count(os.getpid()) == mapped + 2  # what is kept, and what is used now


# A peer that speaks the protocol by hand


class Hand:
    """An Exchange with memory, message by message."""

    def __init__(self, wire: WireClient, run: str) -> None:
        self._wire = wire
        self._run = run
        self._lease = wire.join(run, "a")
        self._digest = wire.run(run, full=True).manifest.digest
        self.pages: mmap.mmap | None = None

    def lend(self, size: int = 3 * mmap.PAGESIZE) -> bytes:
        """Hands memory over; the ticket."""
        request = pb.OfferMemoryRequest(worker=self._lease.worker, epoch=self._lease.epoch)
        offer = self._wire.call("OptimizerService", "OfferMemory", request)
        assert len(offer.ticket) == 16
        descriptor = os.memfd_create("hand", os.MFD_ALLOW_SEALING)
        os.ftruncate(descriptor, size)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as peer:
            peer.connect(f"\0{offer.socket}")
            socket.send_fds(peer, [offer.ticket], [descriptor])
            assert peer.recv(1) == b"\x01"
        self.pages = mmap.mmap(descriptor, size)
        os.close(descriptor)
        return offer.ticket

    def push(self, offset: int = 0, size: int = 64, **fields: Any) -> pb.ExchangeRequest:
        """A push of 16 elements in memory."""
        header = push_header(self._lease, self._digest, **({"size_bytes": 64} | fields))
        header.in_memory.offset, header.in_memory.size_bytes = offset, size
        return pb.ExchangeRequest(push=header)

    def pull(self, **spec: Any) -> pb.ExchangeRequest:
        return pb.ExchangeRequest(pull=pb.ExchangePull(worker=self._lease.worker, pull=pb.PullSpec(**spec)))

    def exchange(self, ticket: bytes | None, *requests: pb.ExchangeRequest) -> list[pb.ExchangeResponse]:
        first = [] if ticket is None else [pb.ExchangeRequest(memory=pb.ExchangeMemory(ticket=ticket))]
        return list(self._wire.call("OptimizerService", "Exchange", [*first, *requests]))

    def refusal(self, ticket: bytes | None, *requests: pb.ExchangeRequest) -> str:
        with pytest.raises(grpc.RpcError) as error:
            self.exchange(ticket, *requests)
        return reason_of(error.value)


@pytest.fixture
def hand(wire: WireClient, run_id: str) -> Hand:
    wire.create(run_id, np.zeros(16, np.float32))
    return Hand(wire, f"runs/{run_id}")


def into(offset: int, size: int = 64) -> tensor_pb2.MemoryRange:
    return tensor_pb2.MemoryRange(offset=offset, size_bytes=size)


def test_push_and_pull_by_hand_are_one_message_each_way(hand: Hand) -> None:
    ticket = hand.lend()
    hand.pages[:64] = np.arange(16, dtype=np.float32).tobytes()
    (answer,) = hand.exchange(ticket, hand.push(pull=pb.PullSpec(into=into(4096))))
    assert answer.result.outcome == pb.PUSH_OUTCOME_APPLIED
    assert answer.result.weights.in_memory
    assert answer.result.weights.step == answer.result.step == 1
    assert answer.result.weights.size_bytes == 64
    assert np.frombuffer(hand.pages, np.float32, 16, 4096).tolist() == [-float(i) for i in range(16)]
    assert hand.pages[:64] == np.arange(16, dtype=np.float32).tobytes()


def test_pulls_by_hand_come_where_they_fit_and_else_as_chunks(hand: Hand) -> None:
    kinds = [message.WhichOneof("payload") for message in hand.exchange(hand.lend(), hand.pull(into=into(64, 128)))]
    assert kinds == ["header"]
    for spec in ({"into": into(64, 60)}, {"into": into(64), "dtype": tensor_pb2.DTYPE_BFLOAT16}, {}):
        answers = hand.exchange(hand.lend(), hand.pull(**spec))
        assert [message.WhichOneof("payload") for message in answers] == ["header", "chunk", "trailer"]
        assert not answers[0].header.in_memory
        assert bytes(hand.pages) == bytes(len(hand.pages))
    (header, trailer) = hand.exchange(hand.lend(), hand.pull(into=into(64), if_newer_than=0))
    assert header.header.is_unchanged
    assert not header.header.in_memory
    assert trailer.trailer.crc32c == 0
    (unchanged,) = hand.exchange(hand.lend(), hand.push(base_step=0, pull=pb.PullSpec(into=into(64), if_newer_than=1)))
    assert unchanged.result.weights.is_unchanged


MISUSES: dict[str, tuple[Callable[[Hand], pb.ExchangeRequest], str]] = {
    "beyond the end": (lambda hand: hand.push(offset=3 * mmap.PAGESIZE), "CHUNK_OUT_OF_RANGE"),
    "far beyond the end": (lambda hand: hand.push(offset=1 << 60), "CHUNK_OUT_OF_RANGE"),
    "misaligned": (lambda hand: hand.push(offset=4), "CHUNK_MISALIGNED"),
    "another size": (lambda hand: hand.push(size=128), "SIZE_MISMATCH"),
    "another size declared": (lambda hand: hand.push(size_bytes=128), "SIZE_MISMATCH"),
    "both of another size": (lambda hand: hand.push(size=32, size_bytes=32), "SIZE_MISMATCH"),
    "another dtype": (lambda hand: hand.push(dtype=tensor_pb2.DTYPE_BFLOAT16, size_bytes=32), "UNSUPPORTED_DTYPE"),
    "weights beyond the end": (
        lambda hand: hand.push(pull=pb.PullSpec(into=into(3 * mmap.PAGESIZE))),
        "CHUNK_OUT_OF_RANGE",
    ),
    "weights misaligned": (lambda hand: hand.push(pull=pb.PullSpec(into=into(32))), "CHUNK_MISALIGNED"),
    "weights at nothing": (lambda hand: hand.pull(into=into(0, 0)), "CHUNK_MISALIGNED"),
    "a second ticket": (
        lambda hand: pb.ExchangeRequest(memory=pb.ExchangeMemory(ticket=bytes(16))),
        "UNEXPECTED_MESSAGE",
    ),
}


@pytest.mark.parametrize("kind", MISUSES)
def test_misuse_of_memory_records_nothing(hand: Hand, kind: str) -> None:
    make, reason = MISUSES[kind]
    assert hand.refusal(hand.lend(), make(hand)) == reason
    (answer,) = hand.exchange(hand.lend(), hand.push())
    assert (answer.result.outcome, answer.result.step) == (pb.PUSH_OUTCOME_APPLIED, 1)


def test_ranges_mean_nothing_on_a_stream_without_memory(hand: Hand) -> None:
    assert hand.refusal(None, hand.push()) == "UNEXPECTED_MESSAGE"
    assert hand.refusal(None, hand.pull(into=into(0))) == "UNEXPECTED_MESSAGE"
    request = pb.PushGradientsRequest(header=hand.push().push)
    with pytest.raises(grpc.RpcError) as error:
        hand._wire.push([request])
    assert reason_of(error.value) == "UNEXPECTED_MESSAGE"


def test_ticket_is_good_for_one_stream(hand: Hand) -> None:
    ticket = hand.lend()
    assert hand.refusal(bytes(16), hand.push()) == "SHARED_MEMORY_UNAVAILABLE"
    assert hand.exchange(ticket, hand.push())[0].result.outcome == pb.PUSH_OUTCOME_APPLIED
    assert hand.refusal(ticket, hand.push()) == "SHARED_MEMORY_UNAVAILABLE"


def test_values_that_no_run_takes_are_rejected_as_over_grpc(hand: Hand) -> None:
    ticket = hand.lend()
    hand.pages[20:24] = np.array([np.nan], np.float32).tobytes()
    (answer, repeated) = hand.exchange(ticket, hand.push(), hand.push())
    assert answer.result.outcome == pb.PUSH_OUTCOME_REJECTED
    assert answer.result.reason == "NON_FINITE_GRADIENT"
    assert "element 5" in answer.result.message
    assert repeated.result == answer.result


@pytest.mark.parametrize(
    ("worker", "reason"), [("runs/there-is-none/workers/a", "RUN_NOT_FOUND"), ("a", "INVALID_NAME")]
)
def test_memory_is_offered_for_runs_that_there_are(wire: WireClient, worker: str, reason: str) -> None:
    with pytest.raises(grpc.RpcError) as error:
        wire.call("OptimizerService", "OfferMemory", pb.OfferMemoryRequest(worker=worker, epoch=1))
    assert reason_of(error.value) == reason
