"""Shows the progress: live on a terminal, as plain lines elsewhere."""

import sys
from collections.abc import Iterable
from types import TracebackType
from typing import Protocol, Self

from rich.console import Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from watch import Progress

_LINE_SECONDS = 1.0
_EVENTS_SHOWN = 8


class Display(Protocol):
    """Shows progress whenever told to; used in a `with` block."""

    def show(self, progress: Progress) -> None:
        """Shows it as it is now."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None: ...


def make(*, plain: bool) -> Display:
    """The display for standard output as it is."""
    return PlainDisplay() if plain or not sys.stdout.isatty() else LiveDisplay()


class PlainDisplay:
    """A line a second, and a line for each event."""

    def __init__(self) -> None:
        self._next_line_at = 0.0
        self._event_count = 0

    def show(self, progress: Progress) -> None:
        """Prints what is new."""
        for event in progress.events[self._event_count :]:
            print(event, flush=True)
        self._event_count = len(progress.events)
        if progress.elapsed_seconds >= self._next_line_at:
            self._next_line_at = progress.elapsed_seconds + _LINE_SECONDS
            print(_line(progress), flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        pass


class LiveDisplay:
    """A screen that is drawn anew. Its last state stays."""

    def __init__(self) -> None:
        self._live = Live(refresh_per_second=8)

    def show(self, progress: Progress) -> None:
        """Draws it."""
        events = Text("\n".join(progress.events[-_EVENTS_SHOWN:]))
        self._live.update(Group(Panel(_facts(progress), title="runs/digits"), _worker_table(progress), events))

    def __enter__(self) -> Self:
        self._live.__enter__()
        return self

    def __exit__(
        self, type_: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.__exit__(type_, error, trace)


def summary(progress: Progress) -> Iterable[str]:
    """The lines of the table at the end."""
    yield f"{'worker':<12}{'contributions':>14}{'rejected':>10}  state"
    for name, row in progress.workers.items():
        yield f"{name:<12}{row.applied:>14}{row.rejected:>10}  {row.state}"


def _line(progress: Progress) -> str:
    workers = "  ".join(
        f"{name} {row.applied}/{row.staleness}" for name, row in progress.workers.items() if row.state != "lost"
    )
    parts = [f"{progress.elapsed_seconds:5.1f} s  step {progress.step:5d}", f"{progress.steps_per_second:4.0f} steps/s"]
    parts += [f"loss {_number(progress.loss)}", f"accuracy fast {_number(progress.fast)} slow {_number(progress.slow)}"]
    if progress.is_waiting:
        parts.append(f"waiting for {_waiting_for(progress)}")
    elif workers:
        parts.append(f"contributions/staleness: {workers}")
    return "  ".join(parts)


def _facts(progress: Progress) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_row("step", f"{progress.step}", "lookahead syncs", f"{progress.sync_count}")
    grid.add_row("steps a second", f"{progress.steps_per_second:.0f}", "loss", _number(progress.loss))
    grid.add_row("accuracy, fast", _number(progress.fast), "accuracy, slow", _number(progress.slow))
    grid.add_row("elapsed", f"{progress.elapsed_seconds:.0f} s", "waiting for", _waiting_for(progress))
    return grid


def _worker_table(progress: Progress) -> Table:
    table = Table("worker", "contributions", "rejected", "staleness", "state")
    for name, row in progress.workers.items():
        style = {"killed": "red", "lost": "red", "done": "green"}.get(row.state, "")
        table.add_row(name, str(row.applied), str(row.rejected), str(row.staleness), row.state, style=style)
    return table


def _waiting_for(progress: Progress) -> str:
    return progress.waiting_for if progress.is_waiting else "nothing"


def _number(value: float | None) -> str:
    return "  -  " if value is None else f"{value:.3f}"
