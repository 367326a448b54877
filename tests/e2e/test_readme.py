"""The README's programs, run as they are written, and its links."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from server_process import ServerProcess

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROGRAMS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def run_program(source: str, **environment: str) -> str:
    command = [sys.executable, "-W", "error", "-c", source]
    done = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_worker_trains_against_a_server() -> None:
    with ServerProcess() as server:
        output = run_program(PROGRAMS[0], KEDGE_ADDRESS=server.address)
    found = re.fullmatch(r"step 100: loss ([\d.]+), slow weights from ([\d.]+) to ([\d.]+)\n", output)
    assert found, output
    # The labels are sums of 64 independent inputs: at weights of zero the mean square is 64, at weights of one it is 0.
    assert float(found[1]) < 6.4
    assert float(found[2]) > 0.5


def test_the_fake_server_program_runs() -> None:
    run_program(PROGRAMS[1])


def test_there_are_no_other_programs() -> None:
    assert len(PROGRAMS) == 2


def _links() -> list[tuple[str, str]]:
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return [
        (str(page.relative_to(ROOT)), target)
        for page in pages
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8"))
    ]


@pytest.mark.parametrize(("page", "target"), _links())
def test_every_link_leads_somewhere(page: str, target: str) -> None:
    assert (ROOT / page).parent.joinpath(target).exists()
