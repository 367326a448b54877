"""`kedge top`: runs and workers as they go, refreshed once a second."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from typing import Annotated, NamedTuple, Self

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live

from kedge.cli import render
from kedge.cli.common import (
    DEFAULT_ADDRESS,
    DEFAULT_TIMEOUT_SECONDS,
    AddressOption,
    TimeoutOption,
    open_client,
)
from kedge.client import Client
from kedge.errors import KedgeError
from kedge.transport.values import RunInfo
from kedge.wire.errors import Retry

REFRESH_SECONDS = 1.0


def top(
    run: Annotated[
        str | None, typer.Argument(metavar="[RUN]", help="This run alone: digits or runs/digits.", show_default=False)
    ] = None,
    *,
    once: Annotated[bool, typer.Option("--once", help="Print the table once, and end.")] = False,
    address: AddressOption = DEFAULT_ADDRESS,
    timeout_seconds: TimeoutOption = DEFAULT_TIMEOUT_SECONDS,
) -> None:
    """Watch runs and workers until Ctrl-C. A server that goes away is waited for."""
    address = address or DEFAULT_ADDRESS
    console = render.make_console()
    if once:
        with open_client(address, timeout_seconds) as client:
            render.write(console, _picture(_Sample.read(client, run), address))
        return
    with suppress(KeyboardInterrupt):
        _watch(console, address, run)


class _Sample(NamedTuple):
    """The runs at one moment."""

    seconds: float
    """The moment by the monotonic clock."""
    time: datetime
    """The same by the wall clock."""
    runs: list[RunInfo]

    @classmethod
    def read(cls, client: Client, run: str | None) -> Self:
        """All runs now, or one of them.

        Raises:
            KedgeError: SERVER_UNAVAILABLE, RUN_NOT_FOUND.
        """
        runs = client.list_runs() if run is None else [client.get_run(run).info()]
        return cls(time.monotonic(), datetime.now().astimezone(), runs)

    def rates_since(self, before: "_Sample | None") -> dict[str, float]:
        """Steps a second, by run; none for a run that is new, or began anew."""
        if before is None:
            return {}
        old = {info.name: info.status.step for info in before.runs}
        made = {info.name: info.status.step - old[info.name] for info in self.runs if info.name in old}
        return {name: steps / (self.seconds - before.seconds) for name, steps in made.items() if steps >= 0}


def _watch(console: Console, address: str, run: str | None) -> None:
    sample: _Sample | None = None
    picture: RenderableType = ""
    with ExitStack() as exits:
        show = exits.enter_context(_shown_on(console))
        client: Client | None = None
        while True:
            try:
                if client is None:
                    client = open_client(address, REFRESH_SECONDS, retry_seconds=0)
                    exits.enter_context(client)
                before, sample = sample, _Sample.read(client, run)
                picture = _picture(sample, address, rates=sample.rates_since(before))
                show(picture)
            except KedgeError as error:
                if error.entry.retry is not Retry.BACKOFF:
                    raise
                show(Group(f"{error}; waiting for it", "", picture))
            time.sleep(REFRESH_SECONDS)


@contextmanager
def _shown_on(console: Console) -> Iterator[Callable[[RenderableType], None]]:
    """Shows one picture in the place of the last; one after the other where that cannot be done."""
    if not console.is_terminal or console.is_dumb_terminal:
        yield lambda picture: render.write(console, picture, "")
        return
    with Live(console=console, screen=True, auto_refresh=False) as live:
        yield lambda picture: live.update(picture, refresh=True)


def _picture(sample: _Sample, address: str, *, rates: dict[str, float] | None = None) -> RenderableType:
    workers = [worker for info in sample.runs for worker in info.status.workers]
    counts = f"runs: {len(sample.runs)}, workers: {len(workers)}"
    return Group(
        f"{address} at {sample.time:%H:%M:%S}  {counts}",
        "",
        render.run_table(sample.runs, rates=rates),
        "",
        render.worker_table(workers, with_run=True),
    )
