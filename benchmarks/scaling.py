"""How a step grows: its time with the parameters and with the workers, the server's memory with both.

The time is fitted by a straight line, a + b n, and by one with a bend, a + b n + c n^2: what the bend adds at the
largest model says whether anything grows faster than the model does. The memory is the server's own at its highest,
less what it maps of its workers' memory, beside what is promised: 16 bytes a parameter for the state of
Lookahead(AdaBelief), 4 bytes a parameter for each of (workers + 2), and 400 MB.
"""

import argparse
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
from exchange import Plan, measure, server

from kedge.transport import Channel

_PROMISED_BYTES = 400e6
_SAMPLE_SECONDS = 0.01


class Point(NamedTuple):
    """One measurement."""

    transport: Channel
    parameter_count: int
    worker_count: int
    milliseconds: float
    """Of the median step."""
    server_bytes: int
    """The most that the server had at once; of a server of its own."""

    @property
    def promised_bytes(self) -> float:
        """What the server may have."""
        return (16 + 4 * (self.worker_count + 2)) * self.parameter_count + _PROMISED_BYTES


def measure_point(transport: Channel, parameter_count: int, worker_count: int) -> Point:
    """Measures on a server of its own, so that the memory is of this run alone."""
    steps = max(5, min(100, 20_000_000 // (parameter_count * worker_count)))
    plan = Plan(f"flat:{parameter_count}", worker_count, "float32", steps, 5, transport=transport, has_lookahead=True)
    with server() as address, PeakMemory(_server_pid()) as memory:
        timing = measure(address, plan)
    return Point(transport, parameter_count, worker_count, timing.milliseconds(0.5), memory.peak_bytes)


def _server_pid() -> int:
    # Python's own helper of worker processes is a child, too.
    return next(child.pid for child in psutil.Process().children() if "kedge-server" in " ".join(child.cmdline()))


class PeakMemory:
    """The most memory of a process's own that was seen while this is entered: without pages that it shares.

    Args:
        pid: of the process.
    """

    def __init__(self, pid: int) -> None:
        self._status = Path(f"/proc/{pid}/status")
        self._has_ended = threading.Event()
        self._watching = threading.Thread(target=self._watch)
        self.peak_bytes = 0

    def __enter__(self) -> "PeakMemory":
        self._watching.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._has_ended.set()
        self._watching.join()

    def _watch(self) -> None:
        while not self._has_ended.wait(_SAMPLE_SECONDS):
            fields = dict(line.split(":", 1) for line in self._status.read_text("ascii").splitlines())
            kilobytes = sum(int(fields[name].split()[0]) for name in ("RssAnon", "RssFile"))
            self.peak_bytes = max(self.peak_bytes, 1024 * kilobytes)


class Fit(NamedTuple):
    """A straight line through step times, and the bend that a square would add."""

    constant_ms: float
    ms_per_million: float
    bend: float
    """What the square adds at the largest model, as a part of the time there."""


def fit(points: Sequence[Point]) -> Fit:
    """Fits times over parameters, each point weighted by its time, so that small models count as much as large ones."""
    counts = np.array([point.parameter_count for point in points]) / 1e6
    times = np.array([point.milliseconds for point in points])
    line = np.polynomial.Polynomial.fit(counts, times, 1, w=1 / times).convert().coef
    square = np.polynomial.Polynomial.fit(counts, times, 2, w=1 / times).convert().coef
    return Fit(line[0], line[1], square[2] * counts[-1] ** 2 / times[-1])


HEADER = (
    "| transport | parameters | workers | ms a step (median) | ns a parameter and worker | server's peak MB "
    "| promised MB |\n|---|---|---|---|---|---|---|"
)


def row(point: Point) -> str:
    """A row of the table."""
    nanoseconds = 1e6 * point.milliseconds / point.parameter_count / point.worker_count
    return (
        f"| {point.transport} | {point.parameter_count:,} | {point.worker_count} | {point.milliseconds:.1f} "
        f"| {nanoseconds:.2f} | {point.server_bytes / 1e6:.0f} | {point.promised_bytes / 1e6:.0f} |"
    )


def fit_text(transport: str, points: Sequence[Point]) -> str:
    """What the fit says."""
    line = fit(points)
    return (
        f"{transport}, one worker, {points[0].parameter_count:,} to {points[-1].parameter_count:,} parameters: "
        f"{line.constant_ms:.1f} ms + {line.ms_per_million:.2f} ms a million parameters; a square adds "
        f"{100 * line.bend:+.0f} % at the largest."
    )


def over_parameters(transport: Channel, counts: Sequence[int]) -> Iterator[Point]:
    """One worker, more and more parameters."""
    return (measure_point(transport, count, 1) for count in counts)


def over_workers(transport: Channel, counts: Sequence[int], parameter_count: int) -> Iterator[Point]:
    """More and more workers of one model."""
    return (measure_point(transport, parameter_count, count) for count in counts)


def _numbers(text: str) -> list[int]:
    return [int(float(number)) for number in text.split(",")]


def main() -> None:
    """Prints Markdown tables and fits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", default="1e5,3e5,1e6,3e6,1e7,3e7,1e8,2e8", help="joined by commas")
    parser.add_argument("--workers", default="1,2,4,8,16,32", help="joined by commas")
    parser.add_argument("--model", type=float, default=1e6, help="the parameters of the model that has many workers")
    parser.add_argument("--transports", default="shared_memory,grpc", help="joined by commas")
    arguments = parser.parse_args()
    print(HEADER, flush=True)
    fits: list[str] = []
    for transport in arguments.transports.split(","):
        points = []
        for point in over_parameters(transport, _numbers(arguments.parameters)):
            print(row(point), flush=True)
            points.append(point)
        fitted = [point for point in points if 1e6 <= point.parameter_count <= 1e8]
        if len(fitted) > 2:
            fits.append(fit_text(transport, fitted))
        for point in over_workers(transport, _numbers(arguments.workers), int(arguments.model)):
            print(row(point), flush=True)
    print("\n" + "\n\n".join(fits))


if __name__ == "__main__":
    main()
