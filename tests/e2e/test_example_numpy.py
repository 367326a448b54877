"""The NumPy example, as a user runs it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from server_process import ServerProcess

EXAMPLE = Path(__file__).parents[2] / "examples" / "numpy_regression.py"


def run_example(*arguments: str, address: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-W", "error", EXAMPLE, *arguments],
        env=os.environ | {"KEDGE_ADDRESS": address},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_it_ends_near_the_least_squares_solution(server: ServerProcess, run_id: str) -> None:
    *progress, last = run_example("--run", run_id, "--steps", "600", address=server.address)
    losses = [re.fullmatch(r"step (\d+): loss ([\d.]+)", line) for line in progress]
    assert [int(found[1]) for found in losses] == list(range(60, 601, 60))
    # The noise has a standard deviation of 0.1, so half the mean square of the residuals is 0.005 at the solution.
    assert float(losses[-1][2]) == pytest.approx(0.005, rel=0.6)
    distance = re.fullmatch(r"slow weights: at most ([\d.]+) from the least-squares solution", last)
    assert float(distance[1]) < 0.02


def test_it_goes_on_with_a_run_that_exists(server: ServerProcess, run_id: str) -> None:
    run_example("--run", run_id, "--steps", "20", address=server.address)
    assert run_example("--run", run_id, "--steps", "5", address=server.address)[0].startswith("step 21: ")


def test_it_fits_on_a_page() -> None:
    assert len(EXAMPLE.read_text(encoding="utf-8").splitlines()) <= 100
