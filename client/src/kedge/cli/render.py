"""Runs and workers as tables for people. Where the output is no terminal they are plain, and no line is broken."""

import os
import sys
from collections.abc import Mapping, Sequence

from rich.console import Console, Group, RenderableType
from rich.table import Table

from kedge.cli.plain import change_title, optimizer_title, policy_title, size_bytes
from kedge.policies import Admission, BoundedStaleness, Checkpoints
from kedge.transport.values import Checkpoint, RoundStatus, RunInfo, WorkerStatus
from kedge.wire.manifest import Manifest
from kedge.wire.names import parse_checkpoint, parse_run, parse_worker

_UNBROKEN_WIDTH = 10_000
_NOTHING = "-"


def make_console() -> Console:
    """Standard output. COLUMNS, where it is set, is its width."""
    is_piped = not sys.stdout.isatty()
    return Console(
        force_terminal=False if is_piped else None,
        width=_UNBROKEN_WIDTH if is_piped and "COLUMNS" not in os.environ else None,
        markup=False,
        emoji=False,
        highlight=False,
    )


def write(console: Console, *pictures: RenderableType) -> None:
    """Prints one below the other, without the blanks that pad tables where the output is no terminal."""
    if console.is_terminal:
        console.print(*pictures, sep="\n")
        return
    with console.capture() as captured:
        console.print(*pictures, sep="\n")
    console.file.write("\n".join(line.rstrip() for line in captured.get().split("\n")))
    console.file.flush()


def run_table(infos: Sequence[RunInfo], *, rates: Mapping[str, float] | None = None) -> RenderableType:
    """A line for each run.

    Args:
        infos: the runs.
        rates: steps a second by run; None leaves the column out.
    """
    if not infos:
        return "no runs"
    rate_heading = ["steps/s"] if rates is not None else []
    numbers = ["step", *rate_heading, "durable", "workers", "parameters"]
    table = _table(["name"], numbers, ["optimizer", "aggregation", "durability"], ["loss"])
    for info in infos:
        rate = [_number(rates.get(info.name))] if rates is not None else []
        status = info.status
        table.add_row(
            parse_run(info.name),
            *(str(status.step), *rate, _durable_step(info), str(len(status.workers)), f"{info.parameter_count:,}"),
            *(optimizer_title(info.optimizer), policy_title(info.aggregation), info.durability),
            _number(status.loss),
        )
    problems = [f"{parse_run(i.name)}: {i.status.storage_problem}" for i in infos if i.status.storage_problem]
    return Group(table, "", *problems) if problems else table


def checkpoint_table(checkpoints: Sequence[Checkpoint]) -> RenderableType:
    """A line for each checkpoint of a run."""
    if not checkpoints:
        return "no checkpoints"
    table = _table(["checkpoint"], ["step", "bytes"], ["created", "metrics"])
    for checkpoint in checkpoints:
        table.add_row(
            parse_checkpoint(checkpoint.name).checkpoint_id,
            *(str(checkpoint.step), f"{checkpoint.size_bytes:,}"),
            checkpoint.create_time.isoformat(sep=" ", timespec="seconds"),
            ", ".join(f"{name}={value:.6g}" for name, value in sorted(checkpoint.metrics.items())) or _NOTHING,
        )
    return table


def workers_of(info: RunInfo) -> RenderableType:
    """A line for each worker of a run."""
    return worker_table(info.status.workers, with_clock=isinstance(info.aggregation, BoundedStaleness))


def worker_table(
    workers: Sequence[WorkerStatus], *, with_run: bool = False, with_clock: bool = False
) -> RenderableType:
    """A line for each worker, with its run's name and with its clock if asked for."""
    if not workers:
        return "no workers"
    clock_heading = ["clock"] if with_clock else []
    numbers = ["lease", "sequence", *clock_heading, "applied", "rejected", "staleness", "loss"]
    table = _table(["run", "worker"] if with_run else ["worker"], numbers)
    for worker in workers:
        name = parse_worker(worker.name)
        table.add_row(
            *([name.run_id, name.worker_id] if with_run else [name.worker_id]),
            *(f"{worker.lease_remaining_seconds:.1f} s", str(worker.last_sequence)),
            *([str(worker.clock)] if with_clock else []),
            *(str(worker.applied_count), str(worker.rejected_count), str(worker.last_staleness)),
            _number(worker.last_loss),
        )
    return table


def run_details(info: RunInfo, manifest: Manifest) -> RenderableType:
    """All of a run: a line for each property, then its workers."""
    status = info.status
    rejected = ", ".join(f"{count} {reason}" for reason, count in sorted(status.rejected_counts.items()))
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for label, value in (
        ("name", info.name),
        ("created", info.create_time.isoformat(sep=" ", timespec="seconds")),
        ("optimizer", repr(info.optimizer)),
        ("aggregation", policy_title(info.aggregation)),
        *([("admission", policy_title(info.admission))] if info.admission != Admission() else []),
        *[("group", repr(group)) for group in info.groups],
        *[("changed", change_title(made)) for made in info.changes],
        ("parameters", f"{info.parameter_count:,}"),
        ("tensors", f"{len(manifest.tensors):,} of {size_bytes(manifest):,} bytes"),
        ("durability", info.durability),
        *([("checkpoints", policy_title(info.checkpoints))] if info.checkpoints != Checkpoints() else []),
        ("step", str(status.step)),
        ("durable step", _durable_step(info)),
        *([("storage problem", status.storage_problem)] if status.storage_problem else []),
        ("lookahead syncs", str(status.lookahead_sync_count)),
        ("learning rate", _number(status.learning_rate)),
        ("loss", _number(status.loss)),
        ("round", _round(status.round)),
        ("waiting for", status.waiting_for or _NOTHING),
        ("applied", str(status.applied_count)),
        ("rejected", rejected or "0"),
    ):
        grid.add_row(label, value)
    return Group(grid, "", workers_of(info))


def _table(*headings: list[str]) -> Table:
    """A table without lines, whose groups of columns are by turns text and numbers."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for index, group in enumerate(headings):
        for heading in group:
            if index % 2:
                table.add_column(heading, justify="right", no_wrap=True)
            else:
                table.add_column(heading, overflow="fold")
    return table


def _durable_step(info: RunInfo) -> str:
    return _NOTHING if info.durability == "memory" else str(info.status.durable_step)


def _round(held: RoundStatus | None) -> str:
    return f"{held.contribution_count} of {held.required_count} contributions" if held else _NOTHING


def _number(value: float | None) -> str:
    return _NOTHING if value is None else f"{value:.6g}"
