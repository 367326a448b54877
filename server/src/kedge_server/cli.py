"""`kedge-server`: serves, and looks at configurations."""

import asyncio
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from kedge_server import config as configuration

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
    # One write: print() may make two, between which a line of the log could come where both go to one file.
    sys.stdout.write(f"listening on {address}\n")
    sys.stdout.flush()


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
