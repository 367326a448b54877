"""`kedge checkpoints`: the durable states of a run."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
from kedge.cli.plain import checkpoint_fields
from kedge.errors import KedgeError
from kedge.run import Run

app = typer.Typer(no_args_is_help=True, help="List and take checkpoints of a run, and go on from one.")

CheckpointArgument = Annotated[
    str, typer.Argument(metavar="CHECKPOINT", help="Its id or its name, as list shows it.", show_default=False)
]


@app.command("list")
def list_checkpoints(
    run: RunArgument,
    *,
    address: AddressOption = DEFAULT_ADDRESS,
    timeout_seconds: TimeoutOption = DEFAULT_TIMEOUT_SECONDS,
    as_json: JsonOption = False,
) -> None:
    """List the checkpoints of a run, newest first."""
    with _opened(run, address, timeout_seconds) as opened:
        checkpoints = opened.checkpoints()
    if as_json:
        typer.echo(json.dumps([checkpoint_fields(each) for each in checkpoints], indent=2, allow_nan=False))
    else:
        render.write(render.make_console(), render.checkpoint_table(checkpoints))


@app.command()
def create(
    run: RunArgument,
    *,
    metric: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="A measure of the weights; may be repeated.", show_default=False),
    ] = None,
    address: AddressOption = DEFAULT_ADDRESS,
    timeout_seconds: TimeoutOption = DEFAULT_TIMEOUT_SECONDS,
) -> None:
    """Take a checkpoint of the present step, and wait until it is safe."""
    metrics = _metrics(metric or ())
    with _opened(run, address, timeout_seconds) as opened:
        checkpoint = opened.checkpoint(metrics)
    typer.echo(f"step {checkpoint.step}: {checkpoint.size_bytes:,} bytes in {checkpoint.name}")


@app.command()
def restore(
    run: RunArgument,
    checkpoint: CheckpointArgument,
    *,
    address: AddressOption = DEFAULT_ADDRESS,
    timeout_seconds: TimeoutOption = DEFAULT_TIMEOUT_SECONDS,
) -> None:
    """Let a run go on from one of its checkpoints. Its workers join again by themselves."""
    with _opened(run, address, timeout_seconds) as opened:
        step = opened.restore(checkpoint)
    typer.echo(f"{opened.name} goes on from step {step}")


@app.command()
def fork(
    run: RunArgument,
    checkpoint: CheckpointArgument,
    new: Annotated[str, typer.Argument(metavar="NEW", help="The name of the new run.", show_default=False)],
    *,
    address: AddressOption = DEFAULT_ADDRESS,
    timeout_seconds: TimeoutOption = DEFAULT_TIMEOUT_SECONDS,
) -> None:
    """Create a run that begins where a checkpoint of another is."""
    with _opened(run, address, timeout_seconds) as opened:
        begun = opened.fork(checkpoint, new)
    typer.echo(f"created {begun.name} from a checkpoint of {opened.name}")


@contextmanager
def _opened(run: str, address: str, timeout_seconds: float) -> Iterator[Run]:
    """The run; what is wrong with the arguments of its methods becomes one line."""
    with open_client(address, timeout_seconds) as client:
        try:
            yield client.get_run(run)
        except KedgeError:
            raise  # some are ValueErrors too
        except ValueError as error:
            raise CommandError(str(error)) from error


def _metrics(given: Sequence[str]) -> dict[str, float]:
    """The metrics that options name.

    Raises:
        typer.BadParameter: for what is not NAME=VALUE.
    """
    metrics = {}
    for text in given:
        name, equals, value = text.rpartition("=")
        try:
            metrics[name] = float(value)
        except ValueError:
            equals = ""
        if not (equals and name):
            raise typer.BadParameter(f"{text!r} is not NAME=VALUE with a number", param_hint="--metric")
    return metrics
