"""Times the compiled update as a server calls it, against what the machine's memory can do.

A step of AdaBelief has to read weights, gradient and two moments, and to write weights and two moments: 28 bytes a
parameter. Each gradient more is 4, and the step that ends Lookahead's period has 8 for the slow weights. `limit` is
the time for so many bytes at the rate of a copy: NumPy's, of 100 MB, by as many threads as
there are processors, or by one where that is faster; it counts what is read and what is written. Copy and update take
turns in one process. `CPU` is the processor time of an update; where it equals the time, the system left the process
on one processor, so run it again.
"""

import argparse
import multiprocessing
import os
import resource
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from statistics import median
from typing import NamedTuple

import numpy as np

from kedge import optim
from kedge.optim.controls import Controls
from kedge.wire.allocation import keep_freed_memory
from kedge.wire.manifest import Manifest
from kedge_server.core.plan import plan
from kedge_server.engine.device import Writer, default_block_elements
from kedge_server.engine.staging import StagingPool

_PERIOD = 5
_SYNC_BYTES = 8
_COPIED_COUNT = 24 << 20


class Case(NamedTuple):
    """A row of the table."""

    name: str
    optimizer: optim.Optimizer
    bytes_per_parameter: int
    contribution_count: int = 1
    is_sync: bool = False
    """Whether it is about the steps that end a period, or about the others."""


_ADABELIEF = optim.AdaBelief(1e-6)
_LOOKAHEAD = optim.Lookahead(_ADABELIEF, sync_period=_PERIOD)
CASES = [
    Case("AdaBelief", _ADABELIEF, 28),
    Case("AdaBelief, 4 contributions", _ADABELIEF, 28 + 3 * 4, 4),
    Case("AdaBelief, clipped by norm", optim.AdaBelief(1e-6, grad_clip_norm=1.0), 28 + 4),
    Case("Lookahead(AdaBelief)", _LOOKAHEAD, 28),
    Case("Lookahead(AdaBelief), sync", _LOOKAHEAD, 28 + _SYNC_BYTES, is_sync=True),
]


class Times(NamedTuple):
    """Of one thing, once, in seconds."""

    wall: float
    cpu: float


def timed(function: Callable[[], object]) -> Times:
    """Its times."""
    used, begin = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    function()
    wall, now = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_SELF)
    return Times(wall, now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime)


class Copy:
    """Copies of arrays that no cache holds."""

    def __init__(self) -> None:
        self._from, self._to = np.ones(_COPIED_COUNT, np.float32), np.zeros(_COPIED_COUNT, np.float32)
        self._threads = ThreadPoolExecutor(os.cpu_count() or 1)

    def seconds(self) -> float:
        """The time of one, by as many threads as is faster."""
        return min(timed(partial(self._run, count)).wall for count in {1, os.cpu_count() or 1})

    def _run(self, thread_count: int) -> None:
        cuts = [self._from.size * at // thread_count for at in range(thread_count + 1)]
        parts = [slice(start, stop) for start, stop in pairwise(cuts)]
        list(self._threads.map(lambda part: np.copyto(self._to[part], self._from[part]), parts))


class Steps:
    """The updates of one run. Its snapshot is held from one step to the next, as the server does."""

    def __init__(self, case: Case, element_count: int) -> None:
        spec = case.optimizer.spec()
        manifest = Manifest.from_specs([("w", (element_count,), "float32")])
        self._values = Controls.begin(spec, ()).values()
        random, pool = np.random.default_rng(0), StagingPool(1 << 40)
        self._gradients = [pool.acquire(element_count).array for _ in range(case.contribution_count)]
        for gradient in self._gradients:
            random.standard_normal(element_count, np.float32, out=gradient)
        cut = plan(spec, manifest, block_elements=default_block_elements())
        self._writer = Writer(cut, np.zeros(element_count, np.float32), self._values)
        self._is_sync = case.is_sync
        self._has_sync = spec.sync_period is not None
        self._step = 0
        for _ in range(_PERIOD + 2):  # until all is compiled and the memory is there
            self._advance()

    def next(self) -> Times:
        """The times of the next step of the kind that counts."""
        while self._has_sync and ((self._step + 1) % _PERIOD == 0) != self._is_sync:
            self._advance()
        return timed(self._advance)

    def _advance(self) -> None:
        self._step += 1
        shares = [1 / len(self._gradients)] * len(self._gradients)
        self._snapshot = self._writer.apply(self._gradients, shares, self._values)


def row(case: Case, element_count: int, repetition_count: int) -> str:
    """A line of the table."""
    copy, steps = Copy(), Steps(case, element_count)
    copies: list[float] = []
    updates: list[Times] = []
    for _ in range(repetition_count):
        copies.append(copy.seconds())
        updates.append(steps.next())
    rate = 2 * 4 * _COPIED_COUNT / median(copies)
    limit = case.bytes_per_parameter * element_count / rate
    wall, cpu = median(each.wall for each in updates), median(each.cpu for each in updates)
    return (
        f"| {case.name} | {element_count / 1e6:.1f} M | {wall * 1e3:.1f} | {cpu * 1e3:.1f} "
        f"| {case.bytes_per_parameter} | {limit * 1e3:.1f} | {rate / 1e9:.1f} | {wall / limit:.2f} |"
    )


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", default="25557032,124439808", help="ResNet-50's and GPT-2's unless given")
    parser.add_argument("--repetitions", type=int, default=15)
    arguments = parser.parse_args()
    print("| optimizer | parameters | ms | CPU ms | bytes a parameter | limit ms | copy GB/s | ratio |")
    print("|---|---|---|---|---|---|---|---|")
    for element_count in map(int, arguments.elements.split(",")):
        for case in CASES:
            print(_in_a_process_of_its_own(case, element_count, arguments.repetitions), flush=True)


def _as_the_server() -> None:
    keep_freed_memory(arena_count=1)


def _in_a_process_of_its_own(case: Case, element_count: int, repetition_count: int) -> str:
    """A line of the table, from a process that holds nothing of the lines before."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=_as_the_server) as process:
        return process.submit(row, case, element_count, repetition_count).result()


if __name__ == "__main__":
    main()
