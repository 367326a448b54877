"""What a series of inputs came to: how many, how long, the slowest, and the memory that they left behind."""

import gc
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

INPUTS = int(os.environ.get("KEDGE_FUZZ_INPUTS", "1000"))
"""Of each kind; `make fuzz` sets it to 100 000."""

CALLS = INPUTS if "KEDGE_FUZZ_INPUTS" in os.environ else 400
"""Of each kind that goes over a socket: the tests are to take no more than a minute."""

SEED = int(os.environ.get("KEDGE_FUZZ_SEED", "20261123"))
MAX_SECONDS = 1.0
MAX_GROWTH_BYTES = 50 << 20


@dataclass
class Figures:
    """The figures of one series."""

    name: str
    input_count: int = 0
    accepted_count: int = 0
    seconds: float = 0.0
    slowest_seconds: float = 0.0
    slowest: bytes = field(default=b"", repr=False)
    growth_bytes: int = 0
    log_bytes: int = 0
    honest_count: int = 0
    """The steps of the honest worker meanwhile."""
    honest_slowest_seconds: float = 0.0

    @contextmanager
    def one(self, raw: bytes) -> Iterator[None]:
        """Around one input."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.note(time.perf_counter() - begun, raw)

    def note(self, seconds: float, raw: bytes = b"", *, count: int = 1) -> None:
        """Counts an input, or several that were met together."""
        self.input_count += count
        if seconds > self.slowest_seconds:
            self.slowest_seconds, self.slowest = seconds, raw[:200]

    @property
    def row(self) -> str:
        """A row of the table."""
        honest = f"{self.honest_count:,} | {1e3 * self.honest_slowest_seconds:.0f}" if self.honest_count else " | "
        return (
            f"| {self.name} | {self.input_count:,} | {self.accepted_count:,} | {self.seconds:.0f} | "
            f"{1e3 * self.slowest_seconds:.1f} | {self.growth_bytes / (1 << 20):.1f} | {self.log_bytes:,} | {honest} |"
        )


ALL: list[Figures] = []
"""Of the test that is being run."""

REPORT = os.environ.get("KEDGE_FUZZ_REPORT")
"""A file that each row is added to as soon as it is known."""


@contextmanager
def measured(name: str, pid: int | None = None) -> Iterator[Figures]:
    """Measures a series, which notes its inputs, and the memory of a process, this one unless another is named."""
    figures = Figures(name)
    process = psutil.Process(pid)
    gc.collect()
    before, begun = process.memory_info().rss, time.perf_counter()
    yield figures
    gc.collect()
    figures.seconds = time.perf_counter() - begun
    figures.growth_bytes = process.memory_info().rss - before
    ALL.append(figures)


def publish(figures: Figures) -> str:
    """The row of a series that is done."""
    if REPORT:
        with Path(REPORT).open("a") as file:
            file.write(f"{figures.row}\n")
    return figures.row
