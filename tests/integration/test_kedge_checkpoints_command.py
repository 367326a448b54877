"""`kedge checkpoints`, and what the other commands say of runs that are kept on disk."""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from bridge import behind_grpc
from kedge_command import Command, assert_refused, rows, run_kedge
from keeping_server import NAME, Keeping

import kedge
from kedge import optim
from kedge.client import Client
from kedge.transport import in_process

PROBLEM = "No space left on device: free some"


@pytest.fixture
def keeping() -> Iterator[Any]:
    """A server that answers as one with a data directory, with a run `r`."""
    with kedge.testing.FakeServer() as fake, fake.connect() as client:
        checkpoints = kedge.Checkpoints(every_steps=100)
        client.create_run(
            "r",
            params={"w": np.zeros(3, np.float32)},
            optimizer=optim.SGD(),
            aggregation=kedge.Synchronous(quorum=2),
            checkpoints=checkpoints,
        )
        yield Keeping(in_process.transport_to(fake.address), storage_problem=PROBLEM)


@pytest.fixture
def ask(keeping: Any) -> Iterator[Command]:
    """The command, asking that server."""
    with behind_grpc(keeping) as address:
        yield lambda *arguments: run_kedge(*arguments, address=address)


def test_list_has_a_line_for_each_checkpoint(ask: Command) -> None:
    done = ask("checkpoints", "list", "r")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[0].split() == ["checkpoint", "step", "bytes", "created", "metrics"]
    newest, older = rows(done.stdout)["5-9"], rows(done.stdout)["0-1"]
    assert newest == ["5-9", "5", "1,099,511,627,776", "2026-01-02", "03:04:05+00:00", "accuracy=1,", "loss=0.25"]
    assert older == ["0-1", "0", "12", "2026-01-01", "00:00:00+00:00", "-"]


def test_list_as_json(ask: Command) -> None:
    newest, older = json.loads(ask("checkpoints", "list", "runs/r", "--json").stdout)
    assert newest == {
        "name": NAME,
        "step": 5,
        "create_time": "2026-01-02T03:04:05+00:00",
        "size_bytes": 1 << 40,
        "metrics": {"loss": 0.25, "accuracy": 1.0},
    }
    assert older["metrics"] == {}


def test_checkpoint_is_taken_with_metrics(ask: Command, keeping: Any) -> None:
    done = ask("checkpoints", "create", "r", "--metric", "accuracy=0.5", "--metric", "a=b=-1e3")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"step 5: 1,099,511,627,776 bytes in {NAME}\n"
    assert keeping.calls == [("runs/r", {"accuracy": 0.5, "a=b": -1000.0})]


def test_metric_that_is_not_finite_is_one_line(ask: Command, keeping: Any) -> None:
    done = ask("checkpoints", "create", "r", "--metric", "loss=nan")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: metrics['loss'] is nan: it must be finite\n"
    assert keeping.calls == []


@pytest.mark.parametrize("checkpoint", ["5-9", NAME])
def test_run_goes_on_from_a_checkpoint(ask: Command, keeping: Any, checkpoint: str) -> None:
    done = ask("checkpoints", "restore", "r", checkpoint)
    assert (done.returncode, done.stdout, done.stderr) == (0, "runs/r goes on from step 5\n", "")
    assert [call[0] for call in keeping.calls] == [NAME]


def test_run_is_created_from_a_checkpoint(ask: Command, keeping: Any) -> None:
    done = ask("checkpoints", "fork", "r", "5-9", "new")
    assert (done.returncode, done.stdout, done.stderr) == (0, "created runs/new from a checkpoint of runs/r\n", "")
    assert [call[:2] for call in keeping.calls] == [(NAME, "new")]


def test_checkpoint_of_another_run_is_one_line(ask: Command, keeping: Any) -> None:
    done = ask("checkpoints", "restore", "r", "runs/other/checkpoints/5-9")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: checkpoint is 'runs/other/checkpoints/5-9': it is none of runs/r")
    assert done.stderr.count("\n") == 1
    assert keeping.calls == []


def test_list_of_runs_tells_how_they_are_kept(ask: Command) -> None:
    for arguments in (["runs", "list"], ["top", "--once"]):
        shown = ask(*arguments).stdout
        assert rows(shown)["r"] == ["r", "0", "5", "0", "3", "SGD", "Synchronous(quorum=2)", "journal", "-"]
        assert f"r: {PROBLEM}" in shown.splitlines()


def test_show_tells_how_a_run_is_kept(ask: Command) -> None:
    lines = [line.split(maxsplit=2) for line in ask("runs", "show", "r").stdout.splitlines()]
    assert ["durability", "journal"] in lines
    assert ["checkpoints", "Checkpoints(every_steps=100)"] in lines
    assert ["durable", "step", "5"] in lines
    assert ["storage", "problem", PROBLEM] in lines
    shown = json.loads(ask("runs", "show", "r", "--json").stdout)
    assert shown["durability"] == "journal"
    assert shown["checkpoints"]["every_steps"] == 100
    assert shown["status"]["durable_step"] == 5
    assert shown["status"]["storage_problem"] == PROBLEM


def test_run_in_memory_has_no_checkpoints(command: Command, client: Client, run_id: str) -> None:
    client.create_run(run_id, params=np.zeros(1, np.float32), optimizer=optim.SGD(), aggregation=kedge.Asynchronous())
    assert command("checkpoints", "list", run_id).stdout == "no checkpoints\n"
    assert command("checkpoints", "list", run_id, "--json").stdout == "[]\n"
    for arguments in (["create", run_id], ["restore", run_id, "0-1"], ["fork", run_id, "0-1", f"{run_id}-fork"]):
        assert_refused(command("checkpoints", *arguments), "DURABILITY_UNAVAILABLE")
