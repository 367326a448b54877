"""examples/local_steps.py, run as a user runs it."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from server_process import ServerProcess

EXAMPLE = Path(__file__).parents[2] / "examples" / "local_steps.py"

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(server: ServerProcess) -> Iterator[Start]:
    """Starts the example against the server, and ends what a failed test leaves of it."""
    started: list[subprocess.Popen[str]] = []

    def begin(*arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-W", "error", EXAMPLE, *arguments],
            env=os.environ | {"KEDGE_ADDRESS": server.address},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def test_two_workers_read_digits_after_forty_messages(start: Start, run_id: str) -> None:
    for worker in [start("--run", run_id) for _ in range(2)]:
        output, errors = worker.communicate(timeout=100)
        assert worker.returncode == 0, errors
        *progress, last = output.splitlines()
        found = [re.fullmatch(r"local step (\d+), step (\d+): loss [\d.]+", line) for line in progress]
        assert [(int(line[1]), int(line[2])) for line in found] == [(n, n // 20) for n in range(80, 401, 80)]
        accuracy = re.fullmatch(r"accuracy (\d\.\d{3}) after 40 gradients", last)
        assert accuracy, last
        assert float(accuracy[1]) > 0.94


def test_one_worker_exchanges_the_rest_at_the_end(start: Start, run_id: str) -> None:
    output, errors = start("--run", run_id, "--steps", "50", "--quorum", "1").communicate(timeout=100)
    assert re.search(r"^accuracy \d\.\d{3} after 3 gradients$", output, re.MULTILINE), output + errors


def test_it_fits_on_a_page() -> None:
    assert len(EXAMPLE.read_text(encoding="utf-8").splitlines()) <= 100
