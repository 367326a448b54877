"""`kedge-server`: serves, and looks at configurations and at data directories."""

import asyncio
import gc
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from kedge.wire.allocation import keep_freed_memory
from kedge_server import config as configuration

_ARENA_COUNT = 1
"""malloc's. Measured on two cores: with one, a stream is up to a tenth faster, and less memory is kept."""

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Kedge: an optimizer as a service.",
)
config_app = typer.Typer(no_args_is_help=True, help="Look at the configuration.")
app.add_typer(config_app, name="config")

ConfigOption = Annotated[
    Path | None, typer.Option("--config", help="A TOML file; `kedge-server config schema` says what may stand in it.")
]


DataDirArgument = Annotated[
    Path, typer.Argument(metavar="DATA_DIR", help="One that no server holds.", show_default=False)
]
RunOption = Annotated[
    str | None, typer.Option("--run", metavar="RUN", help="This run alone: digits or runs/digits.", show_default=False)
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


class Weights(StrEnum):
    """Which weights."""

    FAST = "fast"
    SLOW = "slow"


def main() -> None:
    """The entry point of the command."""
    app()


def _tell_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kedge-server {version('kedge-server')}")
        raise typer.Exit


@app.callback()
def _common(
    *,
    show_version: Annotated[
        bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="Print the version, and end.")
    ] = False,
) -> None:
    pass


@app.command()
def serve(
    *,
    config: ConfigOption = None,
    listen: Annotated[str | None, typer.Option(help="HOST:PORT; port 0 picks a free one.")] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Where runs are kept; without one they end with the server.")
    ] = None,
    insecure: Annotated[bool, typer.Option(help="Serve beyond loopback without TLS and authentication.")] = False,
) -> None:
    """Serve runs until SIGTERM. Prints `listening on HOST:PORT` once calls are answered."""
    given: dict[str, Any] = {"listen": listen, "data_dir": data_dir, "insecure": insecure or None}
    overrides = {"server": {key: value for key, value in given.items() if value is not None}}
    settings = _load(config, overrides)
    keep_freed_memory(arena_count=_ARENA_COUNT)  # before there are threads, and arenas of theirs
    # Imported here because JAX takes a second, which the other commands need not wait for.
    from kedge_server import app as application
    from kedge_server.engine.registry import RecoveryFailed
    from kedge_server.storage.errors import StorageError
    from kedge_server.telemetry import logging

    logging.configure(level=settings.log.level, format=settings.log.format)
    try:
        asyncio.run(application.serve(settings, on_listening=_announce))
    except (configuration.ConfigError, RecoveryFailed, StorageError) as error:
        raise _refuse(error) from error


def _announce(address: str) -> None:
    # What is there by now stays: JAX and Python's modules. To look through it for garbage takes 0.1 s each time.
    gc.freeze()
    # One write: print() may make two, between which a line of the log could come where both go to one file.
    sys.stdout.write(f"listening on {address}\n")
    sys.stdout.flush()


@app.command()
def inspect(data_dir: DataDirArgument, *, run: RunOption = None, as_json: JsonOption = False) -> None:
    """Look at a data directory: which runs it holds, where they stand, and whether all of it is intact.

    Changes nothing in it. Exits with 0 if all is intact, 1 if anything is damaged, 2 if it cannot be looked at.
    """
    with _offline_tools() as tools:
        raise typer.Exit(tools.inspect(data_dir, run=run, as_json=as_json))


@app.command()
def verify(data_dir: DataDirArgument, *, run: RunOption = None, as_json: JsonOption = False) -> None:
    """Apply the journals of a data directory anew, into nowhere, and compare with what the checkpoints hold.

    Changes nothing in it. Exits with 0 if all is intact and equal, 1 if not, 2 if it cannot be looked at.
    """
    with _offline_tools() as tools:
        raise typer.Exit(tools.verify(data_dir, run=run, as_json=as_json))


@app.command()
def export(
    data_dir: DataDirArgument,
    *,
    run: Annotated[str, typer.Option("--run", metavar="RUN", help="digits or runs/digits.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write.", show_default=False)],
    checkpoint: Annotated[
        str | None,
        typer.Option(
            metavar="ID", help="A checkpoint; without one, what a server would go on from.", show_default=False
        ),
    ] = None,
    weights: Annotated[Weights, typer.Option(help="Slow weights are the ones to evaluate and deploy.")] = Weights.FAST,
) -> None:
    """Write weights of a data directory's run to a safetensors file. A file that is there is replaced."""
    with _offline_tools() as tools:
        tools.export_weights(data_dir, output, run=run, checkpoint=checkpoint, weights=weights.value)


@contextmanager
def _offline_tools() -> Iterator[Any]:
    # Imported here for the same reason as the server.
    from kedge_server.tools import commands

    try:
        yield commands
    except commands.ToolError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(error.code) from error


@config_app.command()
def check(config: ConfigOption = None) -> None:
    """Check a configuration: exits 0 and says so, or names every key that is wrong."""
    _load(config)
    typer.echo("the configuration is valid")


@config_app.command()
def show(config: ConfigOption = None) -> None:
    """Show what holds: the file, the environment and the defaults, as JSON."""
    typer.echo(_load(config).model_dump_json(indent=2))


@config_app.command()
def schema() -> None:
    """Show every key with its meaning, as a JSON Schema."""
    typer.echo(json.dumps(configuration.ServerConfig.model_json_schema(), indent=2))


def _load(path: Path | None, overrides: dict[str, Any] | None = None) -> configuration.ServerConfig:
    try:
        return configuration.load(path, overrides=overrides)
    except configuration.ConfigError as error:
        raise _refuse(error) from error


def _refuse(error: Exception) -> typer.Exit:
    typer.echo(f"error: {error}", err=True)
    return typer.Exit(2)
