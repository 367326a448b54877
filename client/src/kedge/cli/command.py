"""The command put together, and how it ends: 0, 1 with a line on standard error, or 2 for wrong usage."""

import os
import sys
from importlib.metadata import version
from typing import Annotated

import typer

from kedge.cli import checkpoints, runs, workers
from kedge.cli.common import CommandError
from kedge.cli.pull import pull
from kedge.cli.top import top
from kedge.cli.verify import verify
from kedge.cli.watch import watch
from kedge.errors import KedgeError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # typer would colour what is piped wherever GITHUB_ACTIONS is set
    help="Kedge, an optimizer as a service: look at the runs of a server and their workers, and fetch their weights.",
)
app.add_typer(runs.app, name="runs")
app.add_typer(workers.app, name="workers")
app.add_typer(checkpoints.app, name="checkpoints")
app.command()(pull)
app.command()(top)
app.command()(verify)
app.command()(watch)


def _tell_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kedge {version('kedge')}")
        raise typer.Exit


@app.callback()
def _common(
    *,
    show_version: Annotated[
        bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="Print the version, and end.")
    ] = False,
) -> None:
    pass


def run() -> None:
    """Runs the command that the arguments name; what fails becomes one line and exit code 1."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # gRPC writes a line for each attempt at a handshake
    try:
        app()
    except (KedgeError, CommandError) as error:
        line = " ".join(str(error).split())
        typer.echo(f"error: {line}", err=True)
        sys.exit(1)
