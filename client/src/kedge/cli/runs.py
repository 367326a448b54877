"""`kedge runs`: the runs of a server."""

import json
from typing import Annotated

import typer

from kedge.cli import render
from kedge.cli.common import (
    DEFAULT_ADDRESS,
    DEFAULT_TIMEOUT_SECONDS,
    AddressOption,
    JsonOption,
    RunArgument,
    TimeoutOption,
    open_client,
)
from kedge.cli.plain import manifest_fields, run_fields

app = typer.Typer(no_args_is_help=True, help="List, show and delete runs.")


@app.command("list")
def list_runs(
    *,
    address: AddressOption = DEFAULT_ADDRESS,
    timeout_seconds: TimeoutOption = DEFAULT_TIMEOUT_SECONDS,
    as_json: JsonOption = False,
) -> None:
    """List the runs by name."""
    with open_client(address, timeout_seconds) as client:
        infos = client.list_runs()
    if as_json:
        typer.echo(json.dumps([run_fields(info) for info in infos], indent=2, allow_nan=False))
    else:
        render.write(render.make_console(), render.run_table(infos))


@app.command()
def show(
    run: RunArgument,
    *,
    address: AddressOption = DEFAULT_ADDRESS,
    timeout_seconds: TimeoutOption = DEFAULT_TIMEOUT_SECONDS,
    as_json: JsonOption = False,
) -> None:
    """Show all of a run but its weights."""
    with open_client(address, timeout_seconds) as client:
        opened = client.get_run(run)
        info = opened.info()
    if as_json:
        typer.echo(json.dumps(run_fields(info) | manifest_fields(opened.manifest), indent=2, allow_nan=False))
    else:
        render.write(render.make_console(), render.run_details(info, opened.manifest))


@app.command()
def delete(
    run: RunArgument,
    *,
    address: AddressOption = DEFAULT_ADDRESS,
    timeout_seconds: TimeoutOption = DEFAULT_TIMEOUT_SECONDS,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Delete a run with its weights, its optimizer state and its leases."""
    with open_client(address, timeout_seconds) as client:
        info = client.get_run(run).info()
        if not yes:
            question = f"Delete {info.name} with {info.parameter_count:,} parameters, at step {info.status.step}?"
            typer.confirm(question, abort=True, err=True)
        client.delete_run(info.name)
    typer.echo(f"deleted {info.name}")
