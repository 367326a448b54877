"""`kedge workers`: the workers of a run."""

import dataclasses
import json
from typing import Annotated

import typer

from kedge.cli import render
from kedge.cli.common import (
    DEFAULT_ADDRESS,
    DEFAULT_TIMEOUT_SECONDS,
    AddressOption,
    CommandError,
    JsonOption,
    RunArgument,
    TimeoutOption,
    open_client,
)
from kedge.cli.plain import finite
from kedge.errors import KedgeError

app = typer.Typer(no_args_is_help=True, help="List the workers of a run, and send one away.")


@app.command("list")
def list_workers(
    run: RunArgument,
    *,
    address: AddressOption = DEFAULT_ADDRESS,
    timeout_seconds: TimeoutOption = DEFAULT_TIMEOUT_SECONDS,
    as_json: JsonOption = False,
) -> None:
    """List the workers that hold a lease, by name."""
    with open_client(address, timeout_seconds) as client:
        info = client.get_run(run).info()
    if as_json:
        fields = [finite(dataclasses.asdict(worker)) for worker in info.status.workers]
        typer.echo(json.dumps(fields, indent=2, allow_nan=False))
    else:
        render.write(render.make_console(), render.workers_of(info))


@app.command()
def evict(
    run: RunArgument,
    worker: Annotated[str, typer.Argument(metavar="WORKER", help="w1 or runs/digits/workers/w1.", show_default=False)],
    *,
    cause: Annotated[str, typer.Option(help="Why, for the worker to read.", show_default=False)] = "",
    block: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="For how long nobody may join under its name.", show_default=False),
    ] = None,
    address: AddressOption = DEFAULT_ADDRESS,
    timeout_seconds: TimeoutOption = DEFAULT_TIMEOUT_SECONDS,
) -> None:
    """Send a worker away. What it has contributed stays; what it sends from then on is refused."""
    with open_client(address, timeout_seconds) as client:
        opened = client.get_run(run)
        try:
            opened.evict(worker, cause, block_seconds=block)
        except KedgeError:
            raise  # some are ValueErrors too
        except ValueError as error:
            raise CommandError(str(error)) from error
    blocked = "" if block is None else f", and blocked its name for {block:g} s"
    typer.echo(f"evicted {worker} from {opened.name}{blocked}")
