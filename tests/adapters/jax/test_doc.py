"""docs/jax.md: its programs run, one after the other, as they are written."""

import re
from pathlib import Path

import jax
import pytest

import kedge

PAGE = (Path(__file__).parents[3] / "docs" / "jax.md").read_text(encoding="utf-8")
PROGRAMS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def test_its_programs_train(monkeypatch: pytest.MonkeyPatch) -> None:
    with kedge.testing.FakeServer() as server:
        monkeypatch.setenv("KEDGE_ADDRESS", server.address)
        names: dict[str, object] = {}
        for program in PROGRAMS:
            exec(program, names)
        with kedge.connect() as client:
            status = client.get_run("jax").status()
    assert len(PROGRAMS) == 3
    assert status.step == 200
    assert status.loss < 0.1  # 1 at weights of zero
    assert isinstance(names["best"]["w"], jax.Array)


def test_every_optimizer_that_it_lists_is_tried() -> None:
    listed = re.search(r"Read are (.*?), or the same", PAGE, re.DOTALL)
    tests = Path(__file__).with_name("test_from_optax.py").read_text(encoding="utf-8")
    names = re.findall(r"`(\w+)`", listed[1])
    assert len(names) == 20
    assert [name for name in names if f"optax.{name}(" not in tests] == []
