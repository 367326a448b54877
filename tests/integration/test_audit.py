"""What the log tells of callers, and what nothing ever tells: their secrets."""

import asyncio
import json
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import psutil
import pytest
import structlog
from server_process import EXECUTABLE, ServerProcess
from tokens_file import TokensFile, sha256
from wire_client import WireClient, asynchronous, floats, reason_of

from kedge.v1 import checkpoint_service_pb2 as checkpoints
from kedge.v1 import optimizer_service_pb2 as optimizers
from kedge.v1 import run_service_pb2 as runs
from kedge_server.security import audit

PACKAGE = "kedge.v1."


class Stage(NamedTuple):
    """A server that logs all that it can, in JSON."""

    server: ServerProcess
    file: TokensFile
    boss: WireClient
    worker: WireClient
    reader: WireClient
    stranger: WireClient

    def lines(self, event: str) -> list[dict[str, Any]]:
        found = [line for line in map(json.loads, self.server.log) if line["event"] == event]
        return [{k: v for k, v in line.items() if k not in ("event", "timestamp", "level")} for line in found]


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    file = TokensFile(tmp_path / "tokens")
    tokens = [file.add("boss", "admin"), file.add("w", "worker", "mine-*"), file.add("r", "reader")]
    file.write()
    environment = file.environment | {"KEDGE_LOG__LEVEL": "debug", "KEDGE_LOG__FORMAT": "json"}
    with ServerProcess("--data-dir", str(tmp_path / "data"), environment=environment) as server:
        clients = [WireClient(server.address, token=token) for token in (*tokens, None)]
        yield Stage(server, file, *clients)
        for client in clients:
            client.close()


def refused(call: Callable[..., Any], *arguments: Any) -> str:
    with pytest.raises(grpc.RpcError) as caught:
        call(*arguments)
    return reason_of(caught.value)


def test_administrative_acts_are_told_with_who_and_what_came_of_them(
    stage: Stage, eventually: Callable[..., None]
) -> None:
    boss = stage.boss
    boss.create("mine-1", floats(1.0, 2.0), aggregation=asynchronous())
    lease = stage.worker.join("runs/mine-1", "w")
    boss.call("RunService", "UpdateRun", runs.UpdateRunRequest(name="runs/mine-1", aggregation=asynchronous()))
    boss.call("RunService", "EvictWorker", runs.EvictWorkerRequest(worker=lease.worker))
    taken = boss.call(
        "CheckpointService", "CreateCheckpoint", checkpoints.CreateCheckpointRequest(run="runs/mine-1")
    ).checkpoint.name
    boss.call("CheckpointService", "RestoreCheckpoint", checkpoints.RestoreCheckpointRequest(name=taken))
    boss.call("CheckpointService", "ForkCheckpoint", checkpoints.ForkCheckpointRequest(name=taken, run_id="mine-2"))
    boss.run("runs/mine-2")
    boss.call("RunService", "DeleteRun", runs.DeleteRunRequest(name="runs/mine-2"))
    absent = runs.DeleteRunRequest(name="runs/mine-2")
    assert refused(boss.call, "RunService", "DeleteRun", absent) == "RUN_NOT_FOUND"
    expected = [
        ("RunService.CreateRun", "runs/mine-1", "OK"),
        ("RunService.UpdateRun", "runs/mine-1", "OK"),
        ("RunService.EvictWorker", "runs/mine-1", "OK"),
        ("CheckpointService.RestoreCheckpoint", "runs/mine-1", "OK"),
        ("CheckpointService.ForkCheckpoint", "runs/mine-1,runs/mine-2", "OK"),
        ("RunService.DeleteRun", "runs/mine-2", "OK"),
        ("RunService.DeleteRun", "runs/mine-2", "RUN_NOT_FOUND"),
    ]
    eventually(lambda: len(stage.lines("administrative call")) == len(expected))
    told = [{"caller": "boss", "method": PACKAGE + m, "run": r, "outcome": o} for m, r, o in expected]
    assert stage.lines("administrative call") == told


def test_who_asks_for_what_is_not_theirs_is_told_of(stage: Stage, eventually: Callable[..., None]) -> None:
    stage.boss.create("mine-1", floats(1.0, 2.0), aggregation=asynchronous())
    lease = stage.boss.join("runs/mine-1", "w")
    delete = runs.DeleteRunRequest(name="runs/mine-1")
    beat = runs.HeartbeatRequest(worker=lease.worker, epoch=lease.epoch)
    assert refused(stage.reader.call, "RunService", "DeleteRun", delete) == "PERMISSION_DENIED"
    assert refused(stage.worker.run, "runs/yours") == "PERMISSION_DENIED"
    assert refused(stage.worker.call, "RunService", "Heartbeat", beat) == "WRONG_IDENTITY"
    told = [
        ("r", "reader", "DeleteRun", "", "PERMISSION_DENIED"),
        ("w", "worker", "GetRun", "runs/yours", "PERMISSION_DENIED"),
        ("w", "worker", "Heartbeat", lease.worker, "WRONG_IDENTITY"),
    ]
    eventually(lambda: len(stage.lines("call refused")) == len(told))
    assert stage.lines("call refused") == [
        {"caller": caller, "role": role, "method": f"{PACKAGE}RunService.{method}", "about": about, "reason": reason}
        for caller, role, method, about, reason in told
    ]
    assert len(stage.lines("administrative call")) == 1  # of the one who may


def test_rejected_credentials_are_told_of_with_where_they_came_from(
    stage: Stage, eventually: Callable[..., None]
) -> None:
    assert refused(stage.stranger.run, "runs/secret-run") == "UNAUTHENTICATED"
    eventually(lambda: stage.lines("credentials rejected"))
    (line,) = stage.lines("credentials rejected")
    assert line.pop("peer").startswith("ipv4:127.0.0.1:")
    assert line == {"method": f"{PACKAGE}RunService.GetRun", "cause": "no token"}


def test_withdrawn_credentials_are_told_of_once_for_all_their_calls(
    stage: Stage, eventually: Callable[..., None]
) -> None:
    stage.boss.create("mine-1", floats(1.0, 2.0), aggregation=asynchronous())
    watch = runs.WatchRunRequest(name="runs/mine-1")
    watches = [stage.reader.call("RunService", "WatchRun", watch) for _ in range(5)]
    for each in watches:
        next(each)
    stage.file.remove(stage.reader.token)
    stage.file.write()
    assert [refused(list, each) for each in watches] == ["UNAUTHENTICATED"] * 5
    eventually(lambda: stage.lines("calls ended, their credentials were withdrawn"))
    assert stage.lines("calls ended, their credentials were withdrawn") == [{"caller": "r", "count": 5}]


def test_server_that_asks_nobody_tells_of_administrative_acts_too(eventually: Callable[..., None]) -> None:
    with ServerProcess(environment={"KEDGE_LOG__LEVEL": "info"}) as server:
        wire = WireClient(server.address)
        wire.create("r", floats(1.0, 2.0))
        wire.run("runs/r")
        eventually(lambda: sum("administrative call" in line for line in server.log) == 1)
        wire.close()


def test_secrets_are_nowhere(stage: Stage, eventually: Callable[..., None]) -> None:
    """In no line of a log that tells all, no error, no title of the process, and no `config show`."""
    said: list[str] = []

    def note(call: Callable[..., Any], *arguments: Any) -> None:
        try:
            said.append(repr(list(answer) if isinstance(answer := call(*arguments), grpc.Call) else answer))
        except grpc.RpcError as error:
            said.append(f"{error!r} {error.details()} {error.trailing_metadata()} {error.debug_error_string()}")

    nearly = [stage.boss.token[:-1], stage.boss.token + "x", stage.boss.token.upper()]
    wrong = [WireClient(stage.server.address, token=token) for token in nearly]
    stage.boss.create("mine-1", floats(1.0, 2.0), aggregation=asynchronous())
    for wire in (stage.boss, stage.worker, stage.reader, stage.stranger, *wrong):
        note(wire.run, "runs/mine-1")
        note(wire.join, "runs/yours", "w")
        note(wire.call, "RunService", "ListRuns", runs.ListRunsRequest())
        note(wire.call, "RunService", "DeleteRun", b"\xff\xff")
        note(wire.call, "OptimizerService", "Exchange", [optimizers.ExchangeRequest(memory={"ticket": b"x"})])
    stray = "kedge_stray"  # a token where its line belongs, by mistake
    stage.file.write_text(f"{stray}\nboss:admin:{stray}\n")
    eventually(lambda: stage.lines("the tokens could not be read, those of before hold on"))
    stage.file.write()
    eventually(lambda: stage.lines("tokens read"))
    process = psutil.Process(stage.server.process.pid)
    said += [*process.cmdline(), process.name(), *process.environ().values()]
    environment = process.environ()
    shown = subprocess.run(
        [EXECUTABLE, "config", "show"], capture_output=True, text=True, timeout=60, check=True, env=environment
    )
    assert str(stage.file.path) in shown.stdout
    said.append(shown.stdout + shown.stderr)
    stage.server.stop()
    tokens = [wire.token for wire in (stage.boss, stage.worker, stage.reader, *wrong)]
    secrets = [*tokens, *map(sha256, tokens), stray]
    log = "".join(stage.server.log)
    assert not [text for text in (log, *said) for secret in secrets if secret in text]
    assert len(said) > 40
    for wire in wrong:
        wire.close()


@pytest.fixture
def lines() -> Iterator[list[dict[str, Any]]]:
    with structlog.testing.capture_logs() as captured:
        yield captured


async def test_of_many_lines_some_are_written_and_the_others_counted(
    lines: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(audit.time, "monotonic", lambda: now)
    tap, other = audit.Tap("knock"), audit.Tap("ring")
    for number in range(audit.WINDOW_LINES + 7):
        tap.warn(number=number)
    other.warn()
    assert [line["event"] for line in lines] == ["knock"] * audit.WINDOW_LINES + ["ring"]
    assert [line["number"] for line in lines[:-1]] == list(range(audit.WINDOW_LINES))
    lines.clear()
    now += audit.WINDOW_SECONDS
    tap.warn(number=99)
    assert [(line["event"], line.get("count"), line.get("number")) for line in lines] == [
        ("knock: lines were left out", 7, None),
        ("knock", None, 99),
    ]


async def test_lines_that_were_left_out_are_counted_aloud_though_no_other_comes(
    lines: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit, "WINDOW_SECONDS", 0.05)
    tap = audit.Tap("knock")
    for _ in range(audit.WINDOW_LINES + 3):
        tap.warn()
    give_up_at = time.monotonic() + 30
    while len(lines) == audit.WINDOW_LINES:
        assert time.monotonic() < give_up_at
        await asyncio.sleep(0.01)
    assert lines[-1]["event"] == "knock: lines were left out"
    assert sum(line.get("count", 1) for line in lines) == audit.WINDOW_LINES + 3
