"""The character model's example, as a user runs it: a server and four worker processes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from server_process import ServerProcess

import kedge

EXAMPLE = Path(__file__).parents[2] / "examples" / "characters.py"
STEPS = 150


@pytest.mark.slow
def test_four_workers_learn_what_source_text_looks_like() -> None:
    with ServerProcess() as server:
        done = subprocess.run(
            [sys.executable, "-W", "error", EXAMPLE, "--steps", str(STEPS)],
            env=os.environ | {"KEDGE_ADDRESS": server.address},
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        with kedge.connect(server.address) as client:
            status = client.get_run("characters").status()
    assert (status.step, status.applied_count, status.workers) == (STEPS, 4 * STEPS, ())

    lines = done.stdout.splitlines()
    found = [re.fullmatch(r"step (\d+): loss ([\d.]+) of unseen text", line) for line in lines[:11]]
    assert [int(line[1]) for line in found] == list(range(0, STEPS + 1, STEPS // 10))
    losses = [float(line[2]) for line in found]
    assert losses[0] == pytest.approx(4.852, abs=0.2)  # ln 128: nothing is known yet
    # With the frequencies of the characters alone it cannot be less than their entropy, 3.15 nats.
    assert losses[-1] < 2.9
    assert len("\n".join(lines[11:])) >= 300


def test_it_fits_on_a_page() -> None:
    assert len(EXAMPLE.read_text(encoding="utf-8").splitlines()) <= 100
