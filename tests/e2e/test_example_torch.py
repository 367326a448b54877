"""examples/torch_digits.py, run as a user runs it."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from server_process import ServerProcess

import kedge

EXAMPLE = Path(__file__).parents[2] / "examples" / "torch_digits.py"

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


@pytest.mark.slow
@pytest.mark.skipif(find_spec("torch") is None, reason="PyTorch is not installed")
def test_two_workers_train_a_network_whose_slow_weights_read_digits(server: ServerProcess, start: Start) -> None:
    workers = [start("--steps", "300", "--quorum", "2") for _ in range(2)]
    for worker in workers:
        output, errors = worker.communicate(timeout=100)
        assert worker.returncode == 0, errors
        *progress, last = output.splitlines()
        found = [re.fullmatch(r"step (\d+): loss [\d.]+, rate ([\d.]+)", line) for line in progress]
        rates = [(int(line[1]), line[2]) for line in found]
        assert rates == [(100, "0.003"), (200, "0.003"), (300, "0.0009")]  # the schedule lowers it at step 250
        accuracy = re.fullmatch(r"slow weights: accuracy (\d\.\d{3})", last)
        assert accuracy, last
        assert float(accuracy[1]) > 0.9
    with kedge.connect(server.address) as client:
        status = client.get_run("torch-digits").status()
    assert (status.step, status.applied_count, status.workers) == (300, 600, ())


def test_it_fits_on_a_page() -> None:
    assert len(EXAMPLE.read_text(encoding="utf-8").splitlines()) <= 100
