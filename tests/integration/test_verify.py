"""`kedge verify` as a person meets it, against real servers: right ones, wrong ones, and those that go away."""

import os
import pty
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import server_process
import wrong_server
from server_process import ServerProcess

import kedge

EXECUTABLE = Path(sys.executable).with_name("kedge")


def environment(**variables: str) -> dict[str, str]:
    inherited = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "FORCE_COLOR")}
    return inherited | variables


def verify(address: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [EXECUTABLE, "verify", "--address", address, *arguments],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        env=environment(),
    )


def runs_left(address: str) -> list[str]:
    with kedge.connect(address) as client:
        return [info.name for info in client.list_runs() if info.name.startswith("runs/verify-")]


def verdicts(output: str) -> dict[str, str]:
    """The last word of each line between heading and summary, by its first 47 characters: the column of the checks."""
    return {line[:47].strip(): line.split()[-1] for line in output.splitlines()[1:-1]}


# ------------------------------------------------------------------------------------------------------ what it says


@pytest.mark.slow
def test_server_of_this_version_passes_every_check(server: ServerProcess) -> None:
    done = verify(server.address)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    heading, *lines, summary = done.stdout.splitlines()
    assert heading.split() == ["check", "expected", "got", "tolerance", "verdict"]
    assert {line[heading.index("verdict") :] for line in lines} == {"pass"}
    assert summary.startswith(f"{len(lines)} checks passed in ")
    assert runs_left(server.address) == []


@pytest.fixture
def wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., ServerProcess]]:
    """Starts a server that is wrong in one field of one optimizer."""
    started: list[ServerProcess] = []

    def start(kind: str, field: str, value: float) -> ServerProcess:
        launcher = tmp_path / "kedge-server"
        command = f'exec "{sys.executable}" "{wrong_server.__file__}" {kind} {field} {value} "$@"'
        launcher.write_text(f"#!/bin/sh\n{command}\n")
        launcher.chmod(0o755)
        monkeypatch.setattr(server_process, "EXECUTABLE", launcher)
        started.append(ServerProcess())
        return started[-1]

    yield start
    for process in started:
        process.stop()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "field", "value", "unharmed"),
    [
        # Beside the largest gradient 1e-3 is nothing.
        ("AdaBelief", "eps", 1e-3, ("AdaBelief, first step / lr, g = -30000",)),
        ("Lookahead", "alpha", 0.55, ("Lookahead before a sync", "Lookahead after a sync")),
    ],
    ids=["eps", "alpha"],
)
def test_wrong_server_fails_every_check_that_it_reaches(
    wrong: Callable[..., ServerProcess], kind: str, field: str, value: float, unharmed: tuple[str, ...]
) -> None:
    server = wrong(kind, field, value)
    done = verify(server.address)
    told = verdicts(done.stdout)
    expected = {check for check in told if check.startswith(kind) and not check.startswith(unharmed)}
    assert len(expected) >= 5
    assert (done.returncode, done.stderr) == (1, "")
    assert {check for check, verdict in told.items() if verdict == "FAIL"} == expected
    assert {told[check] for check in told.keys() - expected} == {"pass"}
    assert done.stdout.splitlines()[-1].startswith(f"{len(expected)} of {len(told)} checks failed in ")
    assert runs_left(server.address) == []


@pytest.mark.soak
def test_longer_trajectories_pass_too(server: ServerProcess) -> None:
    done = verify(server.address, "--full")
    told = verdicts(done.stdout)
    assert (done.returncode, set(told.values())) == (0, {"pass"}), done.stdout
    assert {"AdaBelief, constant gradient, step 5000 / lr", "AdaBelief on Beale, step 20000"} <= set(told)


# ---------------------------------------------------------------------------------------------------- how it is ended


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_it_and_no_run_is_left(server: ServerProcess, number: signal.Signals) -> None:
    with subprocess.Popen(
        [EXECUTABLE, "verify", "--address", server.address],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    ) as process:
        for line in process.stdout:
            if line.startswith("AdaBelief, constant gradient, step 10 "):
                break
        assert runs_left(server.address) != []
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "Traceback" not in errors
    assert runs_left(server.address) == []


def test_server_that_goes_away_is_not_verified() -> None:
    with (
        ServerProcess() as server,
        subprocess.Popen(
            [EXECUTABLE, "verify", "--address", server.address, "--timeout-seconds", "0.5"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
        ) as process,
    ):
        assert process.stdout.readline().startswith("check")
        server.process.kill()
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "checks" not in output
    assert errors.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in errors


def test_no_server_is_one_line_and_2() -> None:
    with socket.socket() as held:  # bound and not listening: whoever connects is refused
        held.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{held.getsockname()[1]}"
        done = verify(address, "--timeout-seconds", "0.3")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.endswith(" [SERVER_UNAVAILABLE]\n")
    assert done.stderr.count("\n") == 1
    assert address in done.stderr


def test_address_that_is_none_is_one_line_and_2() -> None:
    done = verify("nonsense")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: address is 'nonsense': write HOST:PORT, as in localhost:50051\n"


def test_wrong_usage_exits_2(server: ServerProcess) -> None:
    done = verify(server.address, "--fast")
    assert (done.returncode, done.stdout) == (2, "")
    assert "--fast" in done.stderr


# -------------------------------------------------------------------------------------------------------- how it looks


def test_on_a_terminal_verdicts_are_coloured_and_the_cursor_comes_back(server: ServerProcess) -> None:
    own, terminal = pty.openpty()
    command = [EXECUTABLE, "verify", "--address", server.address]
    shown = b""
    with subprocess.Popen(command, stdout=terminal, stderr=terminal, env=environment(TERM="xterm")) as process:
        os.close(terminal)
        while b"\x1b[32mpass\x1b[0m" not in shown:
            shown += os.read(own, 4096)
        process.send_signal(signal.SIGINT)
        while b"\x1b[?25h" not in shown:  # the cursor is back
            shown += os.read(own, 4096)
        assert process.wait(timeout=30) == 130
    os.close(own)


def test_it_loads_no_framework_and_kedge_does_not_load_it() -> None:
    code = (
        "import sys, kedge, kedge.client; light = 'kedge.verify' not in sys.modules; import kedge.cli.verify; "
        "print(light, {'jax', 'jaxlib', 'optax', 'kedge_server', 'torch'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "True set()\n"
