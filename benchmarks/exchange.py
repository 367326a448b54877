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
from layouts import LAYOUTS, Layout, layout_of, parameter_count

import kedge
from kedge import optim
from kedge.policies import Durability
from kedge.transport import Channel

_STEPS = {"mlp": 200, "gpt2": 5}
_SERVER = Path(sys.executable).with_name("kedge-server")


class Plan(NamedTuple):
    """One row of the table."""

    layout: str
    worker_count: int
    wire_dtype: str
    step_count: int
    warmup_count: int
    durability: Durability = "memory"
    transport: Channel = "auto"
    """The default takes shared memory for float32, and gRPC for everything else."""
    has_lookahead: bool = False


class Timing(NamedTuple):
    """What a row measured."""

    step_seconds: list[float]
    """The slowest worker's, of each timed step."""

    @property
    def mean_milliseconds(self) -> float:
        """The mean step time, which is what a loop around many steps shows."""
        return 1e3 * sum(self.step_seconds) / len(self.step_seconds)

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
    name = f"{plan.layout}-{plan.worker_count}-{plan.wire_dtype}".replace("_", "-").replace(":", "-")
    with kedge.connect(address) as client:
        client.create_run(
            name,
            params={name: np.zeros(shape, np.float32) for name, shape in layout_of(plan.layout)},
            optimizer=_optimizer(plan),
            aggregation=kedge.Synchronous(quorum=plan.worker_count),
            durability=plan.durability,
        )
        try:
            return Timing(_run_workers(address, name, plan))
        finally:
            client.delete_run(name)


def _optimizer(plan: Plan) -> optim.Optimizer:
    # Signs make AdaBelief diverge unless its direction is capped, and are refused.
    base = optim.AdaBelief(lr=1e-3, max_direction=1.0 if plan.wire_dtype == "sign" else None)
    return optim.Lookahead(base) if plan.has_lookahead else base


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
    grads = _gradient(layout_of(plan.layout), seed)
    seconds: list[float] = []
    with (
        kedge.connect(address) as client,
        client.get_run(run_name).join(wire_dtype=wire_dtype(plan.wire_dtype), transport=plan.transport) as worker,
    ):
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


def wire_dtype(name: str) -> "str | kedge.TopK":
    """What `join` takes for a name of this benchmark's: "top_k" sends the largest hundredth."""
    return kedge.TopK(0.01) if name == "top_k" else name


def bytes_per_parameter(name: str) -> float:
    """What travels for a parameter in one step, up and down: compressed gradients come back as bfloat16."""
    up = {
        "float32": 4.0,
        "bfloat16": 2.0,
        "float16": 2.0,
        "int8": 1 + 4 / 1024,
        "top_k": 0.08,
        "sign": 0.125 + 4 / 1024,
    }
    return up[name] + (up[name] if name in ("float32", "bfloat16", "float16") else 2.0)


HEADER = (
    "| layout | parameters | workers | transport | wire dtype | ms a step (median) | min - max | goodput GB/s |\n"
    "|---|---|---|---|---|---|---|---|"
)


def row(plan: Plan, timing: Timing) -> str:
    """A row of the table."""
    count = parameter_count(layout_of(plan.layout))
    median = timing.milliseconds(0.5)
    goodput = bytes_per_parameter(plan.wire_dtype) * count * plan.worker_count / (median / 1e3) / 1e9
    spread = f"{timing.milliseconds(0):.1f} - {timing.milliseconds(1):.1f}"
    return (
        f"| {plan.layout} | {count:,} | {plan.worker_count} | {plan.transport} | {plan.wire_dtype} "
        f"| {median:.1f} | {spread} | {goodput:.2f} |"
    )


def main() -> None:
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", default="resnet50", help=f"of {', '.join(LAYOUTS)}, joined by commas")
    parser.add_argument("--workers", default="1,2,4", help="worker counts, joined by commas")
    parser.add_argument("--transports", default="shared_memory,grpc", help="transports, joined by commas")
    parser.add_argument(
        "--wire-dtypes", default="float32", help="wire dtypes, joined by commas; shared memory carries float32 only"
    )
    parser.add_argument("--steps", type=int, default=0, help="timed steps a row; 0: 200 for mlp, 5 for gpt2, else 20")
    arguments = parser.parse_args()
    print(HEADER, flush=True)
    with server() as address:
        for layout in arguments.layouts.split(","):
            for dtype in arguments.wire_dtypes.split(","):
                for transport in arguments.transports.split(","):
                    if transport == "shared_memory" and dtype != "float32":
                        continue
                    for worker_count in map(int, arguments.workers.split(",")):
                        steps = arguments.steps or _STEPS.get(layout, 20)
                        plan = Plan(layout, worker_count, dtype, steps, max(3, steps // 10), transport=transport)
                        print(row(plan, measure(address, plan)), flush=True)


if __name__ == "__main__":
    main()
