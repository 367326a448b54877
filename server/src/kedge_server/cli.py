"""`kedge-server`: serves, looks at configurations and data directories, and makes certificates and tokens."""

import asyncio
import gc
import json
import os
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
certs_app = typer.Typer(no_args_is_help=True, help="Make certificates.")
app.add_typer(certs_app, name="certs")
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
    _silence_grpc()
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


def _silence_grpc() -> None:
    """Before it is imported: its own log has a line for each peer that breaks a rule, as often as that likes."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")


def _announce(address: str) -> None:
    # What is there by now stays: JAX and Python's modules. To look through it for garbage takes 0.1 s each time.
    gc.freeze()
    # One write: print() may make two, between which a line of the log could come where both go to one file.
    sys.stdout.write(f"listening on {address}\n")
    sys.stdout.flush()


@app.command()
def health(
    *,
    config: ConfigOption = None,
    address: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Where it is; unset: where this configuration listens.")
    ] = None,
    timeout_seconds: Annotated[float, typer.Option(min=0.001, help="How long it has for its answer.")] = 5.0,
) -> None:
    """Ask the server of this configuration whether it serves: exits with 0 if so, else with 1 and the reason.

    With TLS it trusts that server's certificate and the CAs of its clients. For health checks of containers.
    """
    _silence_grpc()
    from kedge_server.tools import health as asking

    try:
        asking.require_serving(configuration.load(config), address, timeout_seconds=timeout_seconds)
    except (configuration.ConfigError, asking.UnhealthyError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    typer.echo("serving")


@certs_app.command()
def dev(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where to; made if it is not there.")],
    *,
    host: Annotated[
        list[str] | None,
        typer.Option(help="A name or address of the server, beside loopback's and this host's name. May be repeated."),
    ] = None,
) -> None:
    """Make a development CA, and certificates of it for a server and for clients of each role.

    Called again it renews them: the CA is used again, certificates of it are replaced, and nothing else is.
    """
    from kedge_server.security import certificates
    from kedge_server.tools.certificate_text import lines

    try:
        made = certificates.make(folder, host or ())
    except (OSError, ValueError) as error:
        raise _refuse(error) from error
    typer.echo("\n".join(lines(made)))


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


token_app = typer.Typer(no_args_is_help=True, help="Make tokens, with which callers say who they are.")
app.add_typer(token_app, name="token")


class RoleName(StrEnum):
    """Each may do what those before it may."""

    READER = "reader"
    WORKER = "worker"
    ADMIN = "admin"


@token_app.command("new")
def new_token(
    identity: Annotated[str, typer.Argument(metavar="ID", help="Whose token it is.", show_default=False)],
    *,
    role: Annotated[RoleName, typer.Option(help="What it may do.", show_default=False)],
    runs: Annotated[str, typer.Option(help="The runs that it may touch, as digits,exp-*.")] = "*",
    file: Annotated[
        Path | None,
        typer.Option(help="Add its line to this file, which access.tokens_file names.", show_default=False),
    ] = None,
) -> None:
    """Make a token, and print it: this once, since nobody keeps it. Who has it may call as ID."""
    from kedge_server.security import token_file

    try:
        token, note = token_file.make(identity, role=role.value, runs=runs, file=file)
    except (OSError, ValueError) as error:
        raise _refuse(error) from error
    typer.echo(note, err=True)
    typer.echo(token)
