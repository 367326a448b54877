"""The `kedge` command in a process of its own."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

EXECUTABLE = Path(sys.executable).with_name("kedge")

Command = Callable[..., subprocess.CompletedProcess[str]]


def environment(address: str, **variables: str) -> dict[str, str]:
    inherited = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "FORCE_COLOR")}
    return inherited | {"KEDGE_ADDRESS": address} | variables


def run_kedge(*arguments: object, address: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*options.pop("prefix", []), EXECUTABLE, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=environment(address, **options.pop("variables", {})),
        **options,
    )


def rows(table: str) -> dict[str, list[str]]:
    """The lines of a table by their first word."""
    return {line.split()[0]: line.split() for line in table.splitlines() if line}


def assert_refused(done: subprocess.CompletedProcess[str], reason: str) -> None:
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.endswith(f" [{reason}]\n")
    assert done.stderr.count("\n") == 1


def next_line(process: subprocess.Popen[str], text: str) -> str:
    for line in process.stdout:
        if text in line:
            return line
    raise AssertionError(f"it ended without {text!r}: {process.stderr.read()}")
