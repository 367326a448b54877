"""Tokens that come and go while everything is under way."""

import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c
import grpc
import numpy as np
import pytest
from google.protobuf.duration_pb2 import Duration
from server_process import ServerProcess
from tokens_file import TokensFile
from wire_client import (
    WireClient,
    asynchronous,
    floats,
    manifest,
    push_header,
    push_stream,
    reason_of,
    sgd,
    stream,
    synchronous,
)

from kedge.v1 import optimizer_service_pb2 as pb
from kedge.v1 import run_service_pb2 as runs
from kedge.v1 import tensor_pb2

RUN = "runs/mine-1"
GRADIENT = floats(1.0, 2.0)
LONG = Duration(seconds=600)
BITES_SECONDS = 2.0
"""From the change of the file until what is withdrawn has ended, as is promised."""


class Stage(NamedTuple):
    """A server with a run, and the clients of three tokens, one of which stays as it is."""

    server: ServerProcess
    file: TokensFile
    boss: WireClient
    worker: WireClient
    staying: WireClient

    def client(self, token: str) -> WireClient:
        return WireClient(self.server.address, token=token)

    def log_of(self, event: str) -> list[dict[str, Any]]:
        return [line for line in map(json.loads, self.server.log) if line["event"] == event]


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    file = TokensFile(tmp_path / "tokens")
    tokens = [file.add("boss", "admin"), file.add("w", "worker", "mine-*"), file.add("staying", "worker", "mine-*")]
    file.write()
    environment = file.environment | {"KEDGE_LOG__LEVEL": "info", "KEDGE_LOG__FORMAT": "json"}
    with ServerProcess(environment=environment) as server:
        clients = [WireClient(server.address, token=token) for token in tokens]
        clients[0].create("mine-1", floats(0.0, 0.0), aggregation=asynchronous())
        yield Stage(server, file, *clients)
        for client in clients:
            client.close()


class Calls:
    """One of each kind that may last, under way.

    Attributes:
        ends: what each ends with, and when.
    """

    def __init__(self, wire: WireClient, in_background: Callable[..., Future[Any]]) -> None:
        lease = wire.join(RUN, lease=LONG)
        self._is_over = threading.Event()
        late = pb.PullSpec(min_step=1 << 40, wait=Duration(seconds=60))
        watch = wire.call("RunService", "WatchRun", runs.WatchRunRequest(name=RUN), timeout=60)
        next(watch)
        exchange = wire.call("OptimizerService", "Exchange", self._requests(lease), timeout=60)
        next(exchange)
        pull = wire.call("OptimizerService", "PullWeights", pb.PullWeightsRequest(run=RUN, pull=late), timeout=60)
        upload = in_background(wire.push, self._upload(wire, lease))
        self._streams = {"watch": watch, "exchange": exchange, "pull": pull}
        self.ends = {
            name: in_background(_end_of, lambda stream=stream: list(stream)) for name, stream in self._streams.items()
        }
        self.ends["upload"] = in_background(_end_of, upload.result)

    def _requests(self, lease: Any) -> Iterator[Any]:
        yield pb.ExchangeRequest(pull=pb.ExchangePull(worker=lease.worker))
        self._is_over.wait(60)

    def _upload(self, wire: WireClient, lease: Any) -> Iterator[Any]:
        digest = wire.run(RUN, full=True).manifest.digest
        yield pb.PushGradientsRequest(header=push_header(lease, digest, size_bytes=8))
        self._is_over.wait(60)

    @property
    def are_under_way(self) -> bool:
        return not any(end.done() for end in self.ends.values())

    def end(self) -> None:
        self._is_over.set()
        for each in self._streams.values():
            each.cancel()


def _end_of(call: Callable[[], Any]) -> tuple[str, float]:
    try:
        call()
    except grpc.RpcError as error:
        if error.code() is grpc.StatusCode.CANCELLED:
            return "CANCELLED", time.monotonic()
        return reason_of(error), time.monotonic()
    return "", time.monotonic()


def outcome(call: Callable[[], Any]) -> str:
    return _end_of(call)[0]


def withdraw(stage: Stage) -> str:
    stage.file.remove(stage.worker.token)
    return "UNAUTHENTICATED"


def make_a_reader(stage: Stage) -> str:
    stage.file.add("w", "reader", "mine-*", token=stage.worker.token)
    return "PERMISSION_DENIED"


def move_to_other_runs(stage: Stage) -> str:
    stage.file.add("w", "worker", "other", token=stage.worker.token)
    return "PERMISSION_DENIED"


def give_to_another(stage: Stage) -> str:
    stage.file.add("v", "worker", "mine-*", token=stage.worker.token)
    return "WRONG_IDENTITY"


@pytest.mark.parametrize("change", [withdraw, make_a_reader, move_to_other_runs, give_to_another])
def test_token_that_is_changed_bites_in_calls_under_way_and_in_the_next_ones(
    stage: Stage,
    in_background: Callable[..., Future[Any]],
    eventually: Callable[..., None],
    record_property: Callable[[str, object], None],
    change: Callable[[Stage], str],
) -> None:
    lease = stage.worker.join(RUN, "mine", lease=LONG)
    theirs, others = Calls(stage.worker, in_background), Calls(stage.staying, in_background)
    then = change(stage)
    changed_at = time.monotonic()
    stage.file.write()
    ends = {name: end.result(30) for name, end in theirs.ends.items()}
    assert {name: reason for name, (reason, _) in ends.items()} == dict.fromkeys(theirs.ends, "UNAUTHENTICATED")
    took_seconds = max(at for _, at in ends.values()) - changed_at
    assert took_seconds < BITES_SECONDS
    record_property("measured", f"{change.__name__} bit after {took_seconds:.2f} s")
    beat = runs.HeartbeatRequest(worker=lease.worker, epoch=lease.epoch)
    assert outcome(lambda: stage.worker.call("RunService", "Heartbeat", beat)) == then
    assert others.are_under_way
    for calls in (theirs, others):
        calls.end()
    eventually(lambda: stage.log_of("calls ended, their credentials were withdrawn"))
    (line,) = stage.log_of("calls ended, their credentials were withdrawn")
    assert (line["caller"], line["count"]) == ("w", 4)


def test_weights_that_are_on_their_way_to_a_slow_reader_are_cut(stage: Stage, eventually: Callable[..., None]) -> None:
    weights = np.zeros(8 << 20, np.float32)  # 32 MiB: far more than what gRPC takes for a reader
    header = runs.CreateRunHeader(
        run_id="mine-big",
        manifest=manifest(weights.shape),
        optimizer=sgd(),
        aggregation=asynchronous(),
        dtype=tensor_pb2.DTYPE_FLOAT32,
        size_bytes=weights.nbytes,
    )
    kind, data = runs.CreateRunRequest, weights.tobytes()
    stage.boss.call(
        "RunService", "CreateRun", stream(kind, kind(header=header), data, checksum=google_crc32c.value(data))
    )
    pull = stage.worker.call("OptimizerService", "PullWeights", pb.PullWeightsRequest(run="runs/mine-big"), timeout=60)
    received = [next(pull)]
    stage.file.remove(stage.worker.token)
    stage.file.write()
    eventually(lambda: stage.log_of("calls ended, their credentials were withdrawn"))
    with pytest.raises(grpc.RpcError) as caught:
        received.extend(pull)
    assert reason_of(caught.value) == "UNAUTHENTICATED"
    assert sum(len(response.chunk.data) for response in received) < weights.nbytes / 2


def test_file_that_is_spoilt_ends_nothing_and_is_said_once(
    stage: Stage, in_background: Callable[..., Future[Any]], eventually: Callable[..., None]
) -> None:
    event = "the tokens could not be read, those of before hold on"
    calls = Calls(stage.worker, in_background)
    stage.file.write_text("# a line before it\ngeheim\n")
    eventually(lambda: len(stage.log_of(event)) == 1)
    stage.file.path.unlink()
    eventually(lambda: len(stage.log_of(event)) == 2)
    assert calls.are_under_way
    assert is_known(stage.worker)
    new = stage.file.add("w", "worker")
    stage.file.write()
    renewed = stage.client(new)
    eventually(lambda: is_known(renewed))
    renewed.close()
    assert calls.are_under_way
    causes = [line["cause"] for line in stage.log_of(event)]
    assert [cause.split(":")[0] for cause in causes] == ["line 2", "it cannot be read"]
    assert not any("geheim" in line for line in stage.server.log)
    calls.end()


def test_contribution_whose_token_is_withdrawn_while_it_waits_counts_once_when_it_is_sent_again(
    stage: Stage, in_background: Callable[..., Future[Any]], eventually: Callable[..., None]
) -> None:
    run = "runs/mine-2"
    stage.boss.create("mine-2", floats(0.0, 0.0), aggregation=synchronous(2))
    digest = stage.boss.run(run, full=True).manifest.digest
    leases = [wire.join(run, lease=LONG) for wire in (stage.worker, stage.staying)]
    waiting = push_stream(leases[0], digest, GRADIENT, wait=Duration(seconds=60))
    end = in_background(_end_of, lambda: stage.worker.push(waiting))
    eventually(lambda: stage.boss.run(run).state.round.contribution_count == 1)
    stage.file.remove(stage.worker.token)
    rotated = stage.client(stage.file.add("w", "worker", "mine-*"))
    stage.file.write()
    assert end.result(30)[0] == "UNAUTHENTICATED"
    again = push_stream(leases[0], digest, GRADIENT)
    assert rotated.push(again).outcome == pb.PUSH_OUTCOME_DEFERRED
    assert stage.staying.push(push_stream(leases[1], digest, GRADIENT)).outcome == pb.PUSH_OUTCOME_APPLIED
    assert rotated.push(again).outcome == pb.PUSH_OUTCOME_APPLIED
    header, weights = rotated.pull(run)
    assert header.step == 1
    assert weights.tolist() == [-1.0, -2.0]
    rotated.close()


class Trainer:
    """Pushes one contribution after the other, with whatever token is the present one."""

    def __init__(self, stage: Stage, name: str) -> None:
        self._stage = stage
        self.name = name
        self.token_in_use = ""
        self.applied_count = 0

    def train(self, token: Callable[[], str], is_over: threading.Event) -> int:
        """Any push that fails raises."""
        wire = self._use(token())
        lease = wire.join(RUN, self.name, lease=LONG)
        digest = wire.run(RUN, full=True).manifest.digest
        for sequence in itertools.count(1):
            if is_over.is_set():
                break
            if token() != wire.token:
                wire.close()
                wire = self._use(token())
            result = wire.push(push_stream(lease, digest, GRADIENT, sequence=sequence, base_step=0))
            assert result.outcome == pb.PUSH_OUTCOME_APPLIED
            self.applied_count += 1
        wire.close()
        return self.applied_count

    def _use(self, token: str) -> WireClient:
        wire = self._stage.client(token)
        self.token_in_use = token
        return wire


class Training:
    """Four that train, and go over to another token when they are told to."""

    def __init__(self, stage: Stage, in_background: Callable[..., Future[Any]]) -> None:
        self.token = stage.worker.token
        self._is_over = threading.Event()
        self._trainers = [Trainer(stage, f"t{number}") for number in range(4)]
        self._work = [in_background(each.train, lambda: self.token, self._is_over) for each in self._trainers]

    @property
    def counts(self) -> list[int]:
        """How many contributions of each were applied."""
        return [trainer.applied_count for trainer in self._trainers]

    def has_gone_over(self, before: list[int]) -> bool:
        """Whether each has trained with the present token, or one has failed."""
        now = zip(self._trainers, before, strict=True)
        have_trained = all(each.token_in_use == self.token and each.applied_count > count + 1 for each, count in now)
        return have_trained or any(each.done() for each in self._work)

    def end(self) -> int:
        """How many contributions were applied. Raises what a push has raised."""
        self._is_over.set()
        return sum(each.result(30) for each in self._work)


@pytest.mark.slow
def test_twenty_rotations_under_load_fail_no_push(
    stage: Stage,
    in_background: Callable[..., Future[Any]],
    eventually: Callable[..., None],
    record_property: Callable[[str, object], None],
) -> None:
    """Each time a new token is added and the last but one is taken out; whoever trains goes over to the new one."""
    training, valid = Training(stage, in_background), [stage.worker.token]
    for _ in range(20):
        gone, valid = valid[:-1], [valid[-1], stage.file.add("w", "worker", "mine-*")]
        for old in gone:
            stage.file.remove(old)
        stage.file.write()
        probe, former = stage.client(valid[-1]), [stage.client(old) for old in gone]
        eventually(lambda probe=probe: is_known(probe))
        assert not any(map(is_known, former))
        training.token, before = valid[-1], training.counts
        eventually(lambda before=before: training.has_gone_over(before))
        for client in (probe, *former):
            client.close()
    applied_count = training.end()
    assert stage.boss.pull(RUN)[0].step == applied_count
    record_property("measured", f"{applied_count} contributions applied across 20 rotations")


def is_known(wire: WireClient) -> bool:
    return outcome(lambda: wire.run(RUN)) == ""
