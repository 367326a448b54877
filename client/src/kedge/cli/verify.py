"""`kedge verify`: compares a server with closed forms, row by row."""

import signal
import sys
import time
from contextlib import closing
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from kedge.cli import render
from kedge.cli.common import (
    DEFAULT_ADDRESS,
    DEFAULT_TIMEOUT_SECONDS,
    AddressOption,
    CommandError,
    TimeoutOption,
    open_client,
)
from kedge.client import Client
from kedge.errors import KedgeError
from kedge.verify import Row
from kedge.verify import verify as compare

_FAILED = 1
_NOT_VERIFIED = 2
_CHECK_WIDTH, _VALUES_WIDTH, _TOLERANCE_WIDTH = 47, 19, 9


def verify(
    *,
    full: Annotated[bool, typer.Option("--full", help="Longer trajectories too; takes half a minute.")] = False,
    address: AddressOption = DEFAULT_ADDRESS,
    timeout_seconds: TimeoutOption = DEFAULT_TIMEOUT_SECONDS,
) -> None:
    """Train small runs whose outcome is known, and compare. They are deleted again.

    Exits with 0 if every check passes, 1 if one fails, 2 if the server could not be verified.
    """
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that runs are deleted then too
    try:
        with open_client(address, timeout_seconds) as client:
            failed_count = _report(render.make_console(), client, full=full)
    except (CommandError, KedgeError) as error:
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(_NOT_VERIFIED) from error
    if failed_count:
        raise typer.Exit(_FAILED)


def _report(console: Console, client: Client, *, full: bool) -> int:
    """Prints the table as it comes, and returns how many checks failed."""
    began = time.monotonic()
    _write(console, Text(_line("check", "expected", "got", "tolerance", "verdict")))
    verdicts = []
    with console.status("comparing"), closing(compare(client, full=full)) as rows:
        for row in rows:
            verdicts.append(row.passes)
            _write(console, _picture(row))
    failed_count = verdicts.count(False)
    seconds = time.monotonic() - began
    outcome = f"{failed_count} of {len(verdicts)} checks failed" if failed_count else f"{len(verdicts)} checks passed"
    _write(console, Text(f"{outcome} in {seconds:.1f} s"))
    return failed_count


def _picture(row: Row) -> Text:
    tolerance = f"{row.tolerance:.1e}" if row.tolerance else "exact"
    verdict = ("pass", "green") if row.passes else ("FAIL", "bold red")
    return Text.assemble(_line(row.check, _values(row.expected), _values(row.got), tolerance, ""), verdict)


def _line(check: str, expected: str, got: str, tolerance: str, verdict: str) -> str:
    values = f"{expected:>{_VALUES_WIDTH}}  {got:>{_VALUES_WIDTH}}"
    return f"{check:<{_CHECK_WIDTH}}{values}  {tolerance:>{_TOLERANCE_WIDTH}}  {verdict}"


def _values(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.6g}" for value in values)


def _write(console: Console, line: Text) -> None:
    console.print(line, soft_wrap=True)
    console.file.flush()
