"""Times the exchange of one step: every worker hands over a full gradient and has the updated weights back.

No gradient is computed, so what is timed is the service alone: a real server process, real worker processes, loopback.
`goodput` counts gradient and weight bytes of all workers. Absolute times are the machine's; compare within one sitting.
"""

import argparse
import contextlib
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import numpy as np
from layouts import LAYOUTS, Layout, parameter_count

import kedge
from kedge import optim
from kedge.policies import Durability

_SERVER = Path(sys.executable).with_name("kedge-server")


class Plan(NamedTuple):
    """One row of the table."""

    layout: str
    worker_count: int
    wire_dtype: str
    step_count: int
    warmup_count: int
    durability: Durability = "memory"


class Timing(NamedTuple):
    """What a row measured: the slowest worker's seconds for each timed step."""

    step_seconds: list[float]

    def milliseconds(self, quantile: float) -> float:
        """A quantile of the step time."""
        return 1e3 * float(np.quantile(self.step_seconds, quantile))


@contextlib.contextmanager
def server(*arguments: str) -> Iterator[str]:
    """A server process on a free port; its address."""
    process = subprocess.Popen(
        [_SERVER, "serve", "--listen", "127.0.0.1:0", *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"KEDGE_LOG__LEVEL": "warning"},
    )
    assert process.stdout is not None
    try:
        yield process.stdout.readline().removeprefix("listening on ").strip()
    finally:
        process.terminate()
        process.wait(timeout=30)


def measure(address: str, plan: Plan) -> Timing:
    """Runs one row."""
    name = f"{plan.layout}-{plan.worker_count}-{plan.wire_dtype}"
    with kedge.connect(address) as client:
        client.create_run(
            name,
            params={name: np.zeros(shape, np.float32) for name, shape in LAYOUTS[plan.layout]()},
            optimizer=optim.AdaBelief(lr=1e-3),
            aggregation=kedge.Synchronous(quorum=plan.worker_count),
            durability=plan.durability,
        )
        try:
            return Timing(_run_workers(address, name, plan))
        finally:
            client.delete_run(name)


def _run_workers(address: str, run_name: str, plan: Plan) -> list[float]:
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe(duplex=False) for _ in range(plan.worker_count)]
    workers = [
        context.Process(target=_work, args=(address, run_name, plan, seed, sender))
        for seed, (_, sender) in enumerate(pipes)
    ]
    for worker in workers:
        worker.start()
    for _, sender in pipes:
        sender.close()
    try:
        per_worker = [receiver.recv() for receiver, _ in pipes]
    finally:
        for worker in workers:
            worker.join(timeout=60)
            worker.kill()
    return [max(times) for times in zip(*per_worker, strict=True)]


def _work(address: str, run_name: str, plan: Plan, seed: int, results: Connection) -> None:
    layout = LAYOUTS[plan.layout]()
    grads = _gradient(layout, seed)
    seconds: list[float] = []
    with kedge.connect(address) as client, client.get_run(run_name).join(wire_dtype=plan.wire_dtype) as worker:
        worker.pull()
        # Synchronous rounds keep the workers in step, so no barrier of the benchmark's own is needed.
        for _ in range(plan.warmup_count + plan.step_count):
            begin = time.perf_counter()
            worker.step(grads)
            seconds.append(time.perf_counter() - begin)
    results.send(seconds[plan.warmup_count :])


def _gradient(layout: Layout, seed: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {name: random.standard_normal(shape, np.float32) for name, shape in layout}


def _row(plan: Plan, timing: Timing) -> str:
    count = parameter_count(LAYOUTS[plan.layout]())
    itemsize = 4 if plan.wire_dtype == "float32" else 2
    median = timing.milliseconds(0.5)
    goodput = 2 * itemsize * count * plan.worker_count / (median / 1e3) / 1e9
    spread = f"{timing.milliseconds(0):.1f} - {timing.milliseconds(1):.1f}"
    return (
        f"| {plan.layout} | {count:,} | {plan.worker_count} | {plan.wire_dtype} "
        f"| {median:.1f} | {spread} | {goodput:.2f} |"
    )


def main() -> None:
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layout", default="resnet50", choices=LAYOUTS)
    parser.add_argument("--workers", default="1,2,4", help="worker counts, joined by commas")
    parser.add_argument("--wire-dtypes", default="float32", help="wire dtypes, joined by commas")
    parser.add_argument("--steps", type=int, default=20, help="timed steps a row")
    parser.add_argument("--warmup", type=int, default=5, help="steps before them, which compile and fill pools")
    arguments = parser.parse_args()
    print("| layout | parameters | workers | wire dtype | ms a step (median) | min - max | goodput GB/s |")
    print("|---|---|---|---|---|---|---|", flush=True)
    with server() as address:
        for wire_dtype in arguments.wire_dtypes.split(","):
            for worker_count in map(int, arguments.workers.split(",")):
                plan = Plan(arguments.layout, worker_count, wire_dtype, arguments.steps, arguments.warmup)
                print(_row(plan, measure(address, plan)), flush=True)


if __name__ == "__main__":
    main()
