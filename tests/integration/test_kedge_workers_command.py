"""`kedge workers` and `kedge watch`: who works for a run, and what happens to it."""

import json
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime

import numpy as np
import pytest
from kedge_command import EXECUTABLE, Command, assert_refused, environment, rows
from server_process import ServerProcess
from tcp_proxy import TcpProxy

import kedge
from kedge import optim
from kedge.client import Client
from kedge.errors import KedgeError

GRADIENT = {"w": np.array([2.0], np.float32)}


@pytest.fixture
def line(client: Client, run_id: str) -> kedge.Run:
    """A run of one weight, 3, at rate 0.5, without a step; every third step is a lookahead sync."""
    return client.create_run(
        run_id,
        params={"w": np.array([3.0], np.float32)},
        optimizer=optim.Lookahead(optim.SGD(lr=0.5), sync_period=3),
        aggregation=kedge.Asynchronous(),
    )


def train(run: kedge.Run, step_count: int) -> None:
    with run.join("alice") as worker:
        worker.pull()
        for _ in range(step_count):
            worker.step(GRADIENT, loss=0.25)


# -------------------------------------------------------------------------------------------------------- kedge workers


def test_list_has_a_line_for_each_worker(command: Command, line: kedge.Run) -> None:
    assert command("workers", "list", line.id).stdout == "no workers\n"
    with line.join("alice") as alice, line.join("bob"):
        alice.pull()
        alice.step(GRADIENT, loss=0.25)
        done = command("workers", "list", line.name)
        (fields, other) = json.loads(command("workers", "list", line.id, "--json").stdout)
    assert (done.returncode, done.stderr) == (0, "")
    headings = ["worker", "lease", "sequence", "applied", "rejected", "staleness", "loss"]
    assert done.stdout.splitlines()[0].split() == headings
    assert rows(done.stdout)["alice"][3:] == ["1", "1", "0", "0", "0.25"]
    assert rows(done.stdout)["bob"][3:] == ["0", "0", "0", "0", "-"]
    assert (fields["name"], fields["epoch"], fields["last_loss"]) == (alice.name, alice.epoch, 0.25)
    assert other["last_loss"] is None


def test_list_has_clocks_where_staleness_is_bounded(command: Command, line: kedge.Run) -> None:
    line.set_aggregation(kedge.BoundedStaleness(bound=4))
    with line.join("alice") as alice, line.join("bob"):
        alice.pull()
        alice.step(GRADIENT)
        alice.step(GRADIENT)
        done = command("workers", "list", line.id)
        shown = command("runs", "show", line.id).stdout
    headings = ["worker", "lease", "sequence", "clock", "applied", "rejected", "staleness", "loss"]
    assert done.stdout.splitlines()[0].split() == headings
    assert [rows(done.stdout)[name][4] for name in ("alice", "bob")] == ["2", "0"]
    assert "BoundedStaleness(bound=4)" in shown
    assert shown.count("clock") == 1


def test_evict_ends_a_lease_and_says_so(command: Command, line: kedge.Run) -> None:
    with line.join("alice") as alice:
        alice.pull()
        done = command("workers", "evict", line.id, "alice", "--cause", "its disk is failing", "--block", 60)
        said = f"evicted alice from {line.name}, and blocked its name for 60 s\n"
        assert (done.returncode, done.stdout, done.stderr) == (0, said, "")
        with pytest.raises(KedgeError, match="its disk is failing") as error:
            alice.step(GRADIENT)
        assert error.value.reason == "WORKER_EVICTED"
    with pytest.raises(KedgeError) as error:
        line.join("alice")
    assert error.value.reason == "WORKER_EVICTED"
    assert line.status().workers == ()


def test_evicted_name_is_free_unless_it_is_blocked(command: Command, line: kedge.Run) -> None:
    with line.join("alice"):
        done = command("workers", "evict", line.id, f"{line.name}/workers/alice")
        assert done.stdout == f"evicted {line.name}/workers/alice from {line.name}\n"
        with line.join("alice") as again:
            assert [worker.epoch for worker in line.status().workers] == [again.epoch]


def test_evict_that_makes_no_sense_is_one_line(command: Command, line: kedge.Run) -> None:
    assert_refused(command("workers", "evict", line.id, "nobody"), "WORKER_NOT_FOUND")
    assert_refused(command("workers", "evict", line.id, "no body"), "INVALID_NAME")
    with line.join("alice"):
        for arguments in (["alice", "--block", 0], ["alice", "--cause", "x" * 257], ["runs/other/workers/alice"]):
            done = command("workers", "evict", line.id, *arguments)
            assert (done.returncode, done.stdout) == (1, "")
            assert re.fullmatch(r"error: (block_seconds|cause|worker) .*\n", done.stderr)
        assert len(line.status().workers) == 1


def test_show_has_the_admission_where_it_is_not_the_default(command: Command, line: kedge.Run) -> None:
    line.set_admission(kedge.Admission(max_norm=10.0, quarantine_after=3))
    line.set_aggregation(kedge.Buffered(size=3, combine="median"))
    shown = command("runs", "show", line.id).stdout
    assert re.search(r"^admission +Admission\(max_norm=10\.0, quarantine_after=3\)$", shown, re.MULTILINE)
    assert re.search(r"^aggregation +Buffered\(size=3, combine='median'\)$", shown, re.MULTILINE)
    fields = json.loads(command("runs", "show", line.id, "--json").stdout)
    assert fields["admission"] == {
        "type": "Admission",
        "max_norm": 10.0,
        "outlier_factor": None,
        "quarantine_after": 3,
        "quarantine_seconds": 600.0,
    }


# ---------------------------------------------------------------------------------------------------------- kedge watch


@contextmanager
def watching(address: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """The command while it watches; ended with Ctrl-C where the block does not end it."""
    with subprocess.Popen(
        [EXECUTABLE, "watch", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(address),
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)


def lines(process: subprocess.Popen[str], count: int) -> list[str]:
    """So many lines, without the time that each begins with."""
    read = [process.stdout.readline().rstrip("\n") for _ in range(count)]
    assert all(re.match(r"\d\d:\d\d:\d\d  step \d", line) for line in read), (read, process.stderr.read())
    return [line[10:] for line in read]


def test_watch_prints_a_line_for_each_event_and_ends_quietly_at_ctrl_c(server: ServerProcess, line: kedge.Run) -> None:
    train(line, 3)
    line.set_aggregation(kedge.Synchronous(quorum=2))
    with watching(server.address, line.id, "--from-step", "0") as process:
        assert lines(process, 7) == [
            "step 0  alice joined",
            "step 1  made of 1 contribution, loss 0.25 [EACH_CONTRIBUTION]",
            "step 2  made of 1 contribution, loss 0.25 [EACH_CONTRIBUTION]",
            "step 3  made of 1 contribution, loss 0.25 [EACH_CONTRIBUTION]",
            "step 3  lookahead sync",
            "step 3  alice left",
            "step 3  aggregation is now Synchronous(quorum=2)",
        ]
        with line.join("bob") as bob:
            assert lines(process, 2)[0] == "step 3  bob joined"  # and that it waits for another
            bob.pull()
            bob.push({"w": np.array([np.nan], np.float32)})
            (rejected,) = lines(process, 1)
            assert re.fullmatch(r"step 3  bob: a gradient was rejected: .* \[NON_FINITE_GRADIENT\]", rejected)
            line.evict("bob", "why not")
            assert lines(process, 1) == ["step 3  bob evicted: why not [WORKER_EVICTED]"]
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=30) == ("", "")
    assert process.returncode == 0


def test_watch_as_json_is_an_object_on_each_line(server: ServerProcess, line: kedge.Run) -> None:
    train(line, 1)
    with watching(server.address, line.id, "--from-step", "0", "--json") as process:
        joined, step = (json.loads(process.stdout.readline()) for _ in range(2))
    assert (joined["number"], joined["kind"], joined["worker"]) == (1, "joined", f"{line.name}/workers/alice")
    assert joined["epoch"] > 0
    assert (step["number"], step["kind"], step["step"], step["loss"]) == (2, "step", 1, 0.25)
    assert (step["contribution_count"], step["aggregation"], step["skipped_counts"]) == (1, None, {})
    assert datetime.fromisoformat(step["time"]) >= datetime.fromisoformat(joined["time"])


def test_watch_ends_with_the_run(server: ServerProcess, client: Client, line: kedge.Run) -> None:
    train(line, 1)
    with watching(server.address, line.id, "--from-step", "0") as process:
        lines(process, 1)
        client.delete_run(line.id)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 1
    assert re.fullmatch(r"error: .* \[RUN_NOT_FOUND\]\n", errors)


def test_watch_into_a_pipe_that_is_closed_ends(server: ServerProcess, line: kedge.Run) -> None:
    train(line, 1)
    with watching(server.address, line.id, "--from-step", "0") as process:
        lines(process, 1)
        process.stdout.close()
        line.set_aggregation(kedge.Synchronous(quorum=2))
        process.wait(timeout=30)
        errors = process.stderr.read()
    assert "Traceback" not in errors


def test_watch_rides_through_connections_that_break(server: ServerProcess, line: kedge.Run) -> None:
    """Each break is while nothing happens; what happens before it is healed is told after."""
    proxy = TcpProxy(server.address)
    with proxy, kedge.connect(proxy.address) as client, client.get_run(line.id).watch() as events:
        seen = []
        with line.join("alice") as worker:
            seen.append(next(events))
            worker.pull()
            for fault in ("cut", "refused", "answers lost"):
                proxy.strike(fault)
                worker.step(GRADIENT)
                proxy.heal()
                seen.append(next(events))
    assert [event.kind for event in seen] == ["joined", "step", "step", "step"]
    assert [event.step for event in seen] == [0, 1, 2, 3]
    assert [event.number for event in seen] == [1, 2, 3, 4]
