"""examples/flax_digits.py and examples/equinox_digits.py, run as a user runs them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from server_process import ServerProcess

import kedge

EXAMPLES = Path(__file__).parents[2] / "examples"


def start(example: str, server: ServerProcess, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "error", EXAMPLES / example, *arguments],
        env=os.environ | {"KEDGE_ADDRESS": server.address},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def last_line(process: subprocess.Popen[str]) -> str:
    output, errors = process.communicate(timeout=100)
    assert process.returncode == 0, errors
    return output.splitlines()[-1]


def test_two_workers_train_a_flax_network_whose_slow_weights_read_digits(server: ServerProcess) -> None:
    workers = [start("flax_digits.py", server, "--steps", "200", "--quorum", "2") for _ in range(2)]
    for worker in workers:
        accuracy = re.fullmatch(r"slow weights: accuracy (\d\.\d{3})", last_line(worker))
        assert accuracy
        assert float(accuracy[1]) > 0.9
    with kedge.connect(server.address) as client:
        status = client.get_run("flax-digits").status()
    assert (status.step, status.applied_count, status.lookahead_sync_count) == (200, 400, 40)


def test_equinox_network_in_a_loop_for_optax_reads_digits(server: ServerProcess) -> None:
    accuracy = re.fullmatch(r"accuracy (\d\.\d{3})", last_line(start("equinox_digits.py", server, "--steps", "300")))
    assert accuracy
    assert float(accuracy[1]) > 0.9


@pytest.mark.parametrize("example", ["flax_digits.py", "equinox_digits.py"])
def test_it_fits_on_a_page(example: str) -> None:
    assert len((EXAMPLES / example).read_text(encoding="utf-8").splitlines()) <= 100
