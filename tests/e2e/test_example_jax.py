"""examples/flax_digits.py and examples/equinox_digits.py, run as a user runs them."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from server_process import ServerProcess

import kedge

EXAMPLES = Path(__file__).parents[2] / "examples"


Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(server: ServerProcess) -> Iterator[Start]:
    """Starts examples against the server, and ends what a failed test leaves of them."""
    started: list[subprocess.Popen[str]] = []

    def begin(example: str, *arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-W", "error", EXAMPLES / example, *arguments],
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


def last_line(process: subprocess.Popen[str]) -> str:
    output, errors = process.communicate(timeout=100)
    assert process.returncode == 0, errors
    return output.splitlines()[-1]


@pytest.mark.slow
def test_two_workers_train_a_flax_network_whose_slow_weights_read_digits(server: ServerProcess, start: Start) -> None:
    workers = [start("flax_digits.py", "--steps", "200", "--quorum", "2") for _ in range(2)]
    for worker in workers:
        accuracy = re.fullmatch(r"slow weights: accuracy (\d\.\d{3})", last_line(worker))
        assert accuracy
        assert float(accuracy[1]) > 0.9
    with kedge.connect(server.address) as client:
        status = client.get_run("flax-digits").status()
    assert (status.step, status.applied_count, status.lookahead_sync_count) == (200, 400, 40)


@pytest.mark.slow
def test_equinox_network_in_a_loop_for_optax_reads_digits(start: Start) -> None:
    accuracy = re.fullmatch(r"accuracy (\d\.\d{3})", last_line(start("equinox_digits.py", "--steps", "300")))
    assert accuracy
    assert float(accuracy[1]) > 0.9


@pytest.mark.parametrize("example", ["flax_digits.py", "equinox_digits.py"])
def test_it_fits_on_a_page(example: str) -> None:
    assert len((EXAMPLES / example).read_text(encoding="utf-8").splitlines()) <= 100
