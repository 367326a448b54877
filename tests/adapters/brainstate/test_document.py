"""The programs in docs/brainstate.md, run one after the other as they are written."""

import re
from pathlib import Path
from typing import Any

import pytest

import kedge
from kedge import testing

DOCUMENT = Path(__file__).parents[3] / "docs" / "brainstate.md"
PROGRAMS = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)


def test_the_programs_of_the_document_run(monkeypatch: pytest.MonkeyPatch) -> None:
    names: dict[str, Any] = {}
    with testing.FakeServer() as server:
        monkeypatch.setenv("KEDGE_ADDRESS", server.address)
        for program in PROGRAMS:
            exec(program, names)
        with kedge.connect() as client:
            runs = {info.name.split("-")[0]: info.status for info in client.list_runs()}
    assert set(runs) == {"runs/adabelief", "runs/averaged", "runs/lookahead"}
    # The mean square of 5 outputs from the constant 1 begins above 1.
    assert runs["runs/adabelief"].step == 100
    assert runs["runs/adabelief"].loss < 0.5
    assert runs["runs/averaged"].step == runs["runs/lookahead"].step == 0
