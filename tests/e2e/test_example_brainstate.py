"""examples/brainstate_digits.py, run as a user runs it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from server_process import ServerProcess

EXAMPLE = Path(__file__).parents[2] / "examples" / "brainstate_digits.py"


@pytest.fixture(scope="module")
def lines(server: ServerProcess) -> list[str]:
    """What it prints in seven epochs."""
    command = [sys.executable, "-W", "error", EXAMPLE, "--epochs", "7"]
    environment = os.environ | {"KEDGE_ADDRESS": server.address}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_it_ends_with_slow_weights_that_read_digits(lines: list[str]) -> None:
    accuracy = re.fullmatch(r"slow weights: accuracy (\d\.\d{3})", lines[-1])
    assert accuracy, lines[-1]
    assert float(accuracy[1]) > 0.85


def test_the_scheduler_that_ticks_each_epoch_halves_the_rate_after_five(lines: list[str]) -> None:
    rates = [line.split("rate ")[1] for line in lines[:-1]]
    assert rates == ["0.002"] * 5 + ["0.001"] * 2


def test_every_minibatch_is_a_step(lines: list[str]) -> None:
    steps = [int(re.search(r"step (\d+)", line)[1]) for line in lines[:-1]]
    assert steps == [44 * epoch for epoch in range(1, 8)]  # 1437 images in minibatches of 32


def test_it_fits_on_a_page() -> None:
    assert len(EXAMPLE.read_text(encoding="utf-8").splitlines()) <= 100
