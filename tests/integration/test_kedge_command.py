"""`kedge` as a person meets it: what it prints, what it writes, how it refuses."""

import json
import math
import os
import pty
import signal
import socket
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from kedge_command import EXECUTABLE, Command, assert_refused, environment, next_line, rows, run_kedge
from server_process import ServerProcess

import kedge
from kedge import optim
from kedge.client import Client

PARAMS = {
    "w": np.array([3.0, 3.0], np.float32),
    "half": np.array([[1.5], [-2.0], [0.0]], ml_dtypes.bfloat16),
}
# Two steps of 0.5 * 2 take w from 3 to 1; the first lookahead sync would be at step 3, so slow is still 3.
LOOKAHEAD = optim.Lookahead(optim.SGD(lr=0.5), sync_period=3)
GRADIENT = {"w": np.array([2.0, 2.0], np.float32), "half": np.zeros((3, 1), np.float32)}


@pytest.fixture
def digits(client: Client, run_id: str) -> kedge.Run:
    """A run with Lookahead after two steps, the last with loss 0.25."""
    alone = kedge.Synchronous(quorum=1)
    run = client.create_run(run_id, params=PARAMS, optimizer=LOOKAHEAD, aggregation=alone)
    with run.join() as worker:
        worker.pull()
        worker.step(GRADIENT, loss=0.5)
        worker.step(GRADIENT, loss=0.25)
    return run


def safetensors(path: Path) -> tuple[dict[str, str], dict[str, tuple[str, list[int], bytes]]]:
    """The metadata of a file and its tensors, read by the format's description."""
    raw = path.read_bytes()
    begin = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:begin])
    metadata = header.pop("__metadata__")
    tensors = {}
    for name, entry in header.items():
        first, end = entry["data_offsets"]
        tensors[name] = (entry["dtype"], entry["shape"], raw[begin + first : begin + end])
    return metadata, tensors


# ----------------------------------------------------------------------------------------------------------- kedge runs


def test_list_has_a_line_for_each_run(command: Command, digits: kedge.Run) -> None:
    with digits.join("alice"):
        done = command("runs", "list")
    assert (done.returncode, done.stderr) == (0, "")
    headings = ["name", "step", "durable", "workers", "parameters", "optimizer", "aggregation", "durability", "loss"]
    assert done.stdout.splitlines()[0].split() == headings
    expected = [digits.id, "2", "-", "1", "5", "Lookahead(SGD)", "Synchronous(quorum=1)", "memory", "0.25"]
    assert rows(done.stdout)[digits.id] == expected


def test_list_as_json(command: Command, digits: kedge.Run) -> None:
    (mine,) = [run for run in json.loads(command("runs", "list", "--json").stdout) if run["name"] == digits.name]
    assert mine["parameter_count"] == 5
    assert mine["optimizer"]["type"] == "Lookahead"
    assert mine["optimizer"]["base_optimizer"]["type"] == "SGD"
    assert mine["optimizer"]["base_optimizer"]["lr"] == 0.5
    assert mine["aggregation"] == {
        "type": "Synchronous",
        "quorum": 1,
        "timeout_seconds": None,
        "combine": "mean",
        "trim_count": 1,
        "deterministic": True,
    }
    assert mine["admission"]["max_norm"] is None
    assert mine["admission"]["quarantine_seconds"] == 600.0
    assert mine["durability"] == "memory"
    assert mine["checkpoints"] == {
        "type": "Checkpoints",
        "every_steps": None,
        "every_seconds": None,
        "keep_latest": 2,
        "keep_every_steps": None,
        "max_age_seconds": None,
        "keep_best": 0,
        "metric": "loss",
        "is_greater_better": False,
    }
    assert mine["status"]["durable_step"] == 0
    assert mine["status"]["storage_problem"] == ""
    assert mine["status"]["step"] == 2
    assert mine["status"]["loss"] == 0.25
    assert mine["status"]["workers"] == []


def test_loss_that_is_no_number_is_null_in_json(command: Command, digits: kedge.Run) -> None:
    with digits.join() as worker:
        worker.pull()
        worker.step(GRADIENT, loss=float("nan"))
    done = command("runs", "show", digits.id, "--json")
    shown = json.loads(done.stdout, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert shown["status"]["loss"] is None


def test_columns_of_the_environment_are_the_width(command: Command, digits: kedge.Run) -> None:
    narrow, wide = (command("runs", "list", variables={"COLUMNS": width}).stdout for width in ("60", "500"))
    assert max(map(len, narrow.splitlines())) <= 60
    # How narrow a name's own column gets depends on what other runs there are.
    assert any(digits.id in line and len(line) > 60 for line in wide.splitlines())


def test_piped_output_is_plain_whatever_the_environment_says(command: Command, digits: kedge.Run) -> None:
    colourful = {"FORCE_COLOR": "1", "GITHUB_ACTIONS": "true", "TERM": "xterm"}
    for arguments in (["runs", "list"], ["runs", "show", digits.id], ["top", "--once"], ["pull", "--help"], ["pull"]):
        done = command(*arguments, variables=colourful)
        assert "\x1b" not in done.stdout + done.stderr


def test_show_tells_all_of_a_run(command: Command, client: Client, run_id: str) -> None:
    optimizer = optim.SGD(lr=0.125)
    run = client.create_run(run_id, params=PARAMS, optimizer=optimizer, aggregation=kedge.Synchronous(quorum=3))
    with run.join("alice") as alice, run.join("bob"):
        alice.pull()
        alice.push({**GRADIENT, "w": np.array([np.nan, 0.0], np.float32)}, wait_seconds=0)
        alice.push(GRADIENT, loss=0.5, wait_seconds=0)
        done = command("runs", "show", run.name)
    lines = [line.split(maxsplit=1) for line in done.stdout.splitlines() if line]
    shown = {line[0]: line[1] for line in lines}
    assert shown["name"] == f"runs/{run_id}"
    assert shown["optimizer"].startswith("SGD(lr=0.125, ")
    assert shown["aggregation"] == "Synchronous(quorum=3)"
    assert "admission" not in shown
    assert shown["durability"] == "memory"
    assert shown["durable"] == "step     -"
    assert "checkpoints" not in shown
    assert "storage" not in shown
    assert shown["tensors"] == "2 of 14 bytes"  # 2 * 4 + 3 * 2
    assert shown["learning"] == "rate    0.125"
    assert shown["round"] == "1 of 3 contributions"
    assert shown["rejected"] == "1 NON_FINITE_GRADIENT"
    assert shown["waiting"] == "for      1 more worker to join: the quorum is 3, 2 live"
    assert shown["worker"].split() == ["lease", "sequence", "applied", "rejected", "staleness", "loss"]
    assert rows(done.stdout)["alice"][3:] == ["2", "0", "1", "0", "0.5"]
    assert rows(done.stdout)["bob"][3:] == ["0", "0", "0", "0", "-"]


def test_show_as_json_has_the_tensors(command: Command, digits: kedge.Run) -> None:
    with digits.join("alice"):
        shown = json.loads(command("runs", "show", digits.id, "--json").stdout)
    assert shown["tensor_count"] == 2
    assert shown["size_bytes"] == 14
    assert shown["tensors"] == [
        {"name": "w", "shape": [2], "dtype": "float32"},
        {"name": "half", "shape": [3, 1], "dtype": "bfloat16"},
    ]
    (alice,) = shown["status"]["workers"]
    assert alice["name"] == f"{digits.name}/workers/alice"
    assert alice["lease_remaining_seconds"] > 0


def test_delete_asks_first(command: Command, client: Client, digits: kedge.Run) -> None:
    for answer in ("n\n", "\n", ""):
        refused = command("runs", "delete", digits.id, input=answer)
        assert refused.returncode == 1
        assert f"Delete {digits.name} with 5 parameters, at step 2?" in refused.stderr
    assert client.get_run(digits.id).name == digits.name
    assert command("runs", "delete", digits.id, input="y\n").returncode == 0
    assert digits.name not in [info.name for info in client.list_runs()]


def test_delete_with_yes_does_not_ask(command: Command, client: Client, digits: kedge.Run) -> None:
    done = command("runs", "delete", digits.name, "--yes")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"deleted {digits.name}\n", "")
    assert digits.name not in [info.name for info in client.list_runs()]


# ----------------------------------------------------------------------------------------------------------- kedge pull


@pytest.mark.parametrize(("weights", "value"), [("fast", 1.0), ("slow", 3.0)])
def test_pull_writes_the_weights(
    command: Command, digits: kedge.Run, tmp_path: Path, weights: str, value: float
) -> None:
    path = tmp_path / "model.safetensors"
    done = command("pull", digits.id, "--weights", weights, "-o", path)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"step 2: 2 tensors, 14 bytes in {path}\n", "")
    metadata, tensors = safetensors(path)
    assert metadata == {"run": digits.name, "step": "2", "weights": weights}
    assert tensors == {
        "w": ("F32", [2], np.array([value, value], np.float32).tobytes()),
        "half": ("BF16", [3, 1], bytes.fromhex("c03f 00c0 0000")),  # 1.5, -2 and 0: the upper half of a float32
    }
    assert list(tmp_path.iterdir()) == [path]


def test_pull_replaces_what_a_link_points_to(command: Command, digits: kedge.Run, tmp_path: Path) -> None:
    path, link = tmp_path / "old.safetensors", tmp_path / "link"
    path.write_bytes(b"old")
    link.symlink_to(path.name)
    assert command("pull", digits.id, "-o", link).returncode == 0
    assert link.is_symlink()
    assert safetensors(path)[0]["step"] == "2"


def test_pulled_file_has_the_permissions_of_a_new_one(command: Command, digits: kedge.Run, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    assert command("pull", digits.id, "-o", path, umask=0o027).returncode == 0
    assert path.stat().st_mode & 0o777 == 0o640


def test_slow_weights_of_a_run_without_lookahead_leave_the_old_file(
    command: Command, client: Client, run_id: str, tmp_path: Path
) -> None:
    client.create_run(run_id, params=PARAMS, optimizer=optim.SGD(), aggregation=kedge.Asynchronous())
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"old")
    assert_refused(command("pull", run_id, "--weights", "slow", "-o", path), "NO_SLOW_WEIGHTS")
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == b"old"


def test_file_that_cannot_be_finished_leaves_the_old_one(
    command: Command, client: Client, run_id: str, tmp_path: Path
) -> None:
    large = np.zeros(100_000, np.float32)
    client.create_run(run_id, params=large, optimizer=optim.SGD(), aggregation=kedge.Asynchronous())
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"old")
    # The shell sets the limit, since a fork of this process may come after JAX has started its threads.
    done = command("pull", run_id, "-o", path, prefix=["sh", "-c", 'ulimit -f 16; exec "$@"', "sh"])
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: cannot write {path}: ")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == b"old"


def test_version_is_told(command: Command) -> None:
    assert command("--version").stdout.startswith("kedge ")


@pytest.mark.parametrize("output", [".", "nowhere/model.safetensors", "/dev/null"])
def test_what_cannot_be_written_is_refused(command: Command, digits: kedge.Run, tmp_path: Path, output: str) -> None:
    done = command("pull", digits.id, "-o", output, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: cannot write {output}: ")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------------------ kedge top


def test_top_once_has_runs_and_workers(command: Command, digits: kedge.Run, server: ServerProcess) -> None:
    with digits.join("alice"):
        done = command("top", digits.id, "--once")
    header, runs, workers = done.stdout.split("\n\n")
    assert done.returncode == 0
    assert header.startswith(f"{server.address} at ")
    assert header.endswith("  runs: 1, workers: 1")
    assert list(rows(runs)) == ["name", digits.id]
    assert rows(workers)[digits.id][1] == "alice"


@pytest.mark.slow
def test_top_waits_for_a_lost_server_and_ends_with_0_at_ctrl_c() -> None:
    first = ServerProcess()
    with subprocess.Popen(
        [EXECUTABLE, "top"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(first.address),
    ) as top:
        next_line(top, "runs: 0, workers: 0")
        first.stop()
        assert "[SERVER_UNAVAILABLE]" in next_line(top, "waiting for it")
        with ServerProcess("--listen", first.address), kedge.connect(first.address) as client:
            client.create_run("new", params=PARAMS, optimizer=LOOKAHEAD, aggregation=kedge.Synchronous(quorum=1))
            next_line(top, "runs: 1, workers: 0")
            next_line(top, "steps/s")
            top.send_signal(signal.SIGINT)
            _, errors = top.communicate(timeout=30)
    assert (top.returncode, errors) == (0, "")


def test_top_gives_the_terminal_back_at_ctrl_c(server: ServerProcess) -> None:
    own, terminal = pty.openpty()
    variables = environment(server.address, TERM="xterm", COLUMNS="200", LINES="50")
    with subprocess.Popen([EXECUTABLE, "top"], stdout=terminal, stderr=terminal, env=variables) as top:
        os.close(terminal)
        shown = b""
        while b"workers: " not in shown:
            shown += os.read(own, 4096)
        top.send_signal(signal.SIGINT)
        while b"\x1b[?1049l" not in shown:  # back from the alternate screen
            shown += os.read(own, 4096)
        assert top.wait(timeout=30) == 0
    os.close(own)


def test_top_of_a_run_that_is_deleted_ends(server: ServerProcess, client: Client, digits: kedge.Run) -> None:
    with subprocess.Popen(
        [EXECUTABLE, "top", digits.id],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(server.address),
    ) as top:
        next_line(top, "runs: 1")
        client.delete_run(digits.id)
        _, errors = top.communicate(timeout=30)
    assert top.returncode == 1
    assert errors.endswith(" [RUN_NOT_FOUND]\n")


# ------------------------------------------------------------------------------------------------------- how it refuses

ON_A_RUN = [
    ["runs", "show", "r0"],
    ["runs", "delete", "r0"],
    ["pull", "r0", "-o", "x"],
    ["top", "r0", "--once"],
    ["watch", "r0"],
    ["workers", "list", "r0"],
    ["workers", "evict", "r0", "w"],
    ["checkpoints", "list", "r0"],
    ["checkpoints", "create", "r0"],
    ["checkpoints", "restore", "r0", "0-1"],
    ["checkpoints", "fork", "r0", "0-1", "r1"],
]


@pytest.mark.parametrize("arguments", ON_A_RUN, ids=" ".join)
def test_unknown_run_is_one_line(command: Command, tmp_path: Path, arguments: list[str]) -> None:
    assert_refused(command(*arguments, cwd=tmp_path), "RUN_NOT_FOUND")


@pytest.mark.parametrize("arguments", [["runs", "list"], ["top", "--once"], *ON_A_RUN], ids=" ".join)
def test_no_server_is_one_line(arguments: list[str], tmp_path: Path) -> None:
    with socket.socket() as held:  # bound and not listening: whoever connects is refused
        held.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{held.getsockname()[1]}"
        refused = run_kedge(*arguments, "--timeout-seconds", 0.3, address=address, cwd=tmp_path)
    assert_refused(refused, "SERVER_UNAVAILABLE")
    assert address in refused.stderr


def test_address_given_wins_over_the_environment(server: ServerProcess) -> None:
    done = run_kedge("runs", "list", "--address", server.address, address="localhost:1")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "arguments",
    [
        ["run"],
        ["runs", "show"],
        ["pull", "r0"],
        ["pull", "r0", "-o", "x", "--weights", "medium"],
        ["runs", "list", "--timeout-seconds", "soon"],
        ["top", "--twice"],
        ["watch"],
        ["watch", "r0", "--from-step", "-1"],
        ["workers", "evict", "r0"],
        ["workers", "evict", "r0", "w", "--block", "soon"],
        ["checkpoints", "restore", "r0"],
        ["checkpoints", "fork", "r0", "0-1"],
        ["checkpoints", "create", "r0", "--metric", "accuracy"],
        ["checkpoints", "create", "r0", "--metric", "accuracy=high"],
        ["checkpoints", "create", "r0", "--metric", "=1"],
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_2(command: Command, arguments: list[str]) -> None:
    done = command(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("package", ["typer", "rich", "safetensors"])
def test_without_its_extra_it_says_what_to_install(package: str) -> None:
    code = f"import sys; sys.modules[{package!r}] = None; from kedge.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == 'error: the kedge command needs its extra: pip install "kedge[cli]"\n'


def test_importing_kedge_does_not_load_the_extra() -> None:
    code = (
        "import sys, kedge, kedge.client, kedge.worker, kedge.cli; "
        "print({'click', 'rich', 'safetensors', 'typer'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "set()\n"


def test_show_tells_groups_and_changes(command: Command, client: Client, run_id: str) -> None:
    rate = optim.ChainedScheduler([optim.StepLR(0.5), optim.ExponentialLR(0.5)])
    groups = [optim.Group("w", name="first", lr=rate), optim.Group("half", frozen=True)]
    alone = kedge.Synchronous(quorum=1)
    optimizer = optim.Optax("adan", grad_clip_norm=2.0, b1=0.9)
    run = client.create_run(run_id, params=PARAMS, optimizer=optimizer, aggregation=alone, groups=groups)
    run.set_hyperparameters(group="first", lr=0.25, grad_clip_norm=math.inf)

    shown = command("runs", "show", run_id).stdout
    assert f"group            {groups[1]!r}" in shown
    assert "lr=0.25, grad_clip_norm=inf of group 'first' from step 1" in shown
    fields = json.loads(command("runs", "show", run_id, "--json").stdout)
    assert fields["optimizer"]["arguments"] == [["b1", 0.9]]
    assert [s["type"] for s in fields["groups"][0]["lr"]["schedulers"]] == ["StepLR", "ExponentialLR"]
    assert fields["changes"] == [{"step": 1, "group": "first", "lr": 0.25, "grad_clip_norm": "off"}]
    assert "Optax('adan')" in command("runs", "list").stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ("runs", "list"),
        ("runs", "show", "r"),
        ("runs", "delete", "r", "--yes"),
        ("top",),
        ("pull", "r", "-o", "w.npz"),
        ("verify",),
        ("watch", "r"),
        ("workers", "list", "r"),
        ("workers", "evict", "r", "w"),
        ("checkpoints", "list", "r"),
        ("checkpoints", "create", "r"),
        ("checkpoints", "restore", "r", "0-1"),
        ("checkpoints", "fork", "r", "0-1", "s"),
    ],
    ids=" ".join,
)
def test_every_command_says_what_is_no_address(arguments: tuple[str, ...]) -> None:
    done = run_kedge(*arguments, "--address", "nonsense", address="")

    assert done.returncode in (1, 2)
    assert "nonsense" in done.stderr
    assert "Traceback" not in done.stderr
