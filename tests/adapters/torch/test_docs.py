"""The programs of docs/pytorch.md, run one after the other as they are written."""

import re
from pathlib import Path

import pytest

from kedge import testing

pytest.importorskip("torch")

PAGE = Path(__file__).parents[3] / "docs" / "pytorch.md"


def test_programs_of_the_page_run(monkeypatch, capsys):
    programs = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(programs) == 4
    with testing.FakeServer() as server:
        monkeypatch.setenv("KEDGE_ADDRESS", server.address)
        names = {}
        for program in programs:
            exec(compile(program, PAGE.name, "exec"), names)
        names["client"].close()
    assert capsys.readouterr().out.splitlines() == [
        "101 applied",
        "[['0.weight'], ['2.weight', '2.bias'], ['0.bias']]",
        "[0.1, 0.01]",
    ]
