"""`kedge watch`: what happens to a run, a line for each event."""

import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Annotated

import typer

from kedge.cli.common import (
    DEFAULT_ADDRESS,
    DEFAULT_TIMEOUT_SECONDS,
    AddressOption,
    RunArgument,
    TimeoutOption,
    open_client,
)
from kedge.cli.plain import event_fields, policy_title
from kedge.transport.values import Event
from kedge.wire.names import parse_checkpoint, parse_worker


def watch(
    run: RunArgument,
    *,
    from_step: Annotated[
        int | None,
        typer.Option(min=0, max=(1 << 63) - 1, help="Begin with the events of this step.", show_default="now"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a line of JSON for each event.")] = False,
    address: AddressOption = DEFAULT_ADDRESS,
    timeout_seconds: TimeoutOption = DEFAULT_TIMEOUT_SECONDS,
) -> None:
    """Print what happens to a run until Ctrl-C: steps, workers that come and go, gradients that were rejected."""
    with (
        suppress(KeyboardInterrupt),
        open_client(address, timeout_seconds) as client,
        client.get_run(run).watch(from_step=from_step) as events,
    ):
        for event in events:
            typer.echo(json.dumps(event_fields(event), allow_nan=False) if as_json else event_line(event))  # flushes


def event_line(event: Event) -> str:
    """An event for people: 12:00:03  step 7  alice left."""
    happened = _happened(event)
    if event.reason and event.kind in ("step", "evicted", "rejected"):
        happened += f" [{event.reason}]"
    line = f"{event.time.astimezone():%H:%M:%S}  step {event.step}  {happened}"
    return " ".join(line.split("\n"))


def _happened(event: Event) -> str:
    worker = parse_worker(event.worker).worker_id if event.worker else ""
    said = f": {event.message}" if event.message else ""
    match event.kind:
        case "step":
            loss = "" if event.loss is None else f", loss {event.loss:.6g}"
            return f"made of {_counted(event.contribution_count, 'contribution')}{loss}"
        case "lookahead_sync":
            return "lookahead sync"
        case "joined" | "left":
            return f"{worker} {event.kind}"
        case "evicted":
            return f"{worker} evicted{said}"
        case "rejected":
            return f"{worker}: a gradient was rejected{said}"
        case "aggregation_changed":
            return f"aggregation is now {policy_title(event.aggregation)}" if event.aggregation else "other aggregation"
        case "waiting" | "recovered":
            return f"{event.kind}{said}"
        case "checkpoint" | "restored":
            source = "" if event.kind == "checkpoint" else "restored from "
            return f"{source}checkpoint {parse_checkpoint(event.checkpoint).checkpoint_id}"
        case "summary":
            return _left_out(event.skipped_counts)


def _left_out(counts: Mapping[str, int]) -> str:
    skipped = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
    return f"{_counted(sum(counts.values()), 'event')} left out: {skipped}"


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")
