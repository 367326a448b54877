"""Times the steps of one worker, alone and in a crowd that only stands in the way.

The crowd (tests/support/crowd.py, a process of its own): 500 silent connections, 500 idle streams, 50 streams of a byte
or a tiny chunk a second, 50 readers that never read. Phases with and without it take turns on one server. Absolute
times are the machine's; compare within one sitting.
"""

import argparse
import contextlib
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
from exchange import server

import kedge
from kedge import optim

_CROWD = Path(__file__).parents[1] / "tests" / "support" / "crowd.py"
_RUN = "crowded"


@contextlib.contextmanager
def crowd(address: str) -> Iterator[None]:
    """The crowd, from when it has gathered until it is told to go."""
    process = subprocess.Popen(
        [sys.executable, _CROWD, address, f"runs/{_RUN}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "gathered\n", "the crowd did not gather"
        yield
    finally:
        process.stdin.close()
        process.wait(timeout=30)


def step_milliseconds(worker: kedge.Worker, gradient: np.ndarray, seconds: float) -> list[float]:
    """The times of as many steps as there is time for."""
    times: list[float] = []
    end_at = time.perf_counter() + seconds
    while (begin := time.perf_counter()) < end_at:
        worker.step({"w": gradient})
        times.append(1e3 * (time.perf_counter() - begin))
    return times


def measure(phase_count: int, phase_seconds: float, parameter_count: int) -> None:
    """Prints a row for each phase, and what all of each kind say together."""
    gradient = np.ones(parameter_count, np.float32)
    times: dict[str, list[float]] = {"alone": [], "crowd": []}
    with server() as address, kedge.connect(address) as client:
        process = psutil.Process().children()[0]
        params = {"w": np.zeros(parameter_count, np.float32)}
        run = client.create_run(_RUN, params=params, optimizer=optim.SGD(lr=1e-3), aggregation=kedge.Asynchronous())
        with run.join() as worker:
            worker.pull()
            step_milliseconds(worker, gradient, phase_seconds)  # compiles, and fills pools
            for number in range(2 * phase_count):
                kind = "crowd" if number % 2 else "alone"
                with crowd(address) if kind == "crowd" else contextlib.nullcontext():
                    phase = step_milliseconds(worker, gradient, phase_seconds)
                    _print_row(kind, phase, process)
                times[kind] += phase
        for kind, all_times in times.items():
            _print_row(f"{kind}, all", all_times, process)
    ratios = [_quantile(times["crowd"], q) / _quantile(times["alone"], q) for q in (0.5, 0.99)]
    print(f"\nwith the crowd a step takes {ratios[0]:.2f} times as long in the median, {ratios[1]:.2f} at p99")


def _print_row(kind: str, times: list[float], process: psutil.Process) -> None:
    resident_mib = process.memory_info().rss / (1 << 20)
    p50, p99 = _quantile(times, 0.5), _quantile(times, 0.99)
    print(f"| {kind} | {len(times)} | {p50:.2f} | {p99:.2f} | {max(times):.1f} | {resident_mib:.0f} |", flush=True)


def _quantile(times: list[float], quantile: float) -> float:
    return float(np.quantile(times, quantile))


def main() -> None:
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--phases", type=int, default=4, help="phases of each kind")
    parser.add_argument("--seconds", type=float, default=8.0, help="the length of a phase")
    parser.add_argument("--parameters", type=int, default=1 << 20, help="parameters of the model")
    arguments = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))  # the server inherits it
    print("| phase | steps | p50 ms | p99 ms | max ms | resident MiB |")
    print("|---|---|---|---|---|---|", flush=True)
    measure(arguments.phases, arguments.seconds, arguments.parameters)


if __name__ == "__main__":
    main()
