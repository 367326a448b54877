"""Times one way over loopback TCP: a gradient up, weights down, against Arrow Flight and against bare bytes.

Three are compared, in turns within one sitting, each with messages of 1 MiB and 256 MiB in all:

- Kedge: a float32 gradient from `Worker.push` into a real server, and `Worker.pull` back into arrays, over gRPC. It
  includes encoding, a CRC-32C on both sides, the inspection of every value, leases, deadlines and the answer. The
  gradient is one of a second contribution to a round, which is judged and left out: no update is timed.
- Python's gRPC: bytes that nobody looks at, between a plain client and a plain asyncio server with the same options.
  It is the floor of what is built on it.
- Arrow Flight, C++ on both sides, by the script `flight_limit.py` of `--peers`: its data is not checked, either.

Each turn counts with its fastest of four, as that script does, and the table has the medians of the turns.
"""

import argparse
import asyncio
import multiprocessing
import re
import statistics
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import numpy as np
from exchange import server

import kedge
from kedge import optim
from kedge.transport.grpc import CHANNEL_OPTIONS
from kedge.wire.allocation import keep_freed_memory

TOTAL_BYTES = 256 << 20
MESSAGE_BYTES = 1 << 20
MESSAGE_COUNT = TOTAL_BYTES // MESSAGE_BYTES
_TIMES_A_TURN = 4

_SERVER_OPTIONS = [*CHANNEL_OPTIONS, ("grpc.so_reuseport", 0)]


class Speeds(NamedTuple):
    """Of one turn, in GB/s."""

    up: float
    down: float


@contextmanager
def of_kedge() -> Iterator[Callable[[], Speeds]]:
    """Measures a worker and a real server."""
    gradient = {"x": np.random.default_rng(0).standard_normal(TOTAL_BYTES // 4, np.float32)}
    with server() as address, kedge.connect(address) as client:
        run = client.create_run(
            "one-way",
            params={"x": np.zeros(TOTAL_BYTES // 4, np.float32)},
            optimizer=optim.SGD(lr=1e-3),
            aggregation=kedge.Synchronous(quorum=2),  # of which there is one: no round is ever full
        )
        with run.join(transport="grpc") as worker:
            worker.pull()
            worker.push(gradient, base_step=0)
            yield lambda: Speeds(_fastest(lambda: worker.push(gradient, base_step=0)), _fastest(worker.pull))


@contextmanager
def of_bytes() -> Iterator[Callable[[], Speeds]]:
    """Measures bare bytes through Python's gRPC."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_serve_bytes, args=(sender,), daemon=True)
    process.start()
    data = bytes(MESSAGE_BYTES)
    try:
        with grpc.insecure_channel(f"127.0.0.1:{receiver.recv()}", options=CHANNEL_OPTIONS) as channel:
            up: Any = channel.stream_unary("/bytes/up")
            down: Any = channel.unary_stream("/bytes/down")
            yield lambda: Speeds(
                _fastest(lambda: up(iter([data] * MESSAGE_COUNT))),
                _fastest(lambda: [None for _ in down(b"")]),
            )
    finally:
        process.terminate()
        process.join()


@contextmanager
def of_flight(folder: Path | None, python: Path | None) -> Iterator[Callable[[], Speeds] | None]:
    """Measures Arrow Flight; None where there is none."""
    if folder is None or python is None:
        yield None
        return
    found = re.compile(rf"chunk_KiB={MESSAGE_BYTES >> 10} up_GBps=([\d.]+) down_GBps=([\d.]+)")

    def measure() -> Speeds:
        command = [str(python), "flight_limit.py"]
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=True)
        speeds = found.search(result.stdout)
        assert speeds is not None, f"flight_limit.py printed {result.stdout!r}"
        return Speeds(float(speeds[1]), float(speeds[2]))

    yield measure


def _fastest(transfer: Callable[[], object]) -> float:
    seconds = []
    for _ in range(_TIMES_A_TURN):
        begin = time.perf_counter()
        transfer()
        seconds.append(time.perf_counter() - begin)
    return TOTAL_BYTES / min(seconds) / 1e9


def _serve_bytes(port: Connection) -> None:
    keep_freed_memory(arena_count=1)
    asyncio.run(_serve_bytes_until_killed(port))


async def _serve_bytes_until_killed(port: Connection) -> None:
    async def up(requests: AsyncIterator[bytes], _: Any) -> bytes:
        async for _message in requests:
            pass
        return b""

    async def down(_: bytes, context: Any) -> None:
        data = bytes(MESSAGE_BYTES)
        for _message in range(MESSAGE_COUNT):
            await context.write(data)

    handlers: dict[str, Any] = {
        "up": grpc.stream_unary_rpc_method_handler(up),
        "down": grpc.unary_stream_rpc_method_handler(down),
    }
    serving = grpc.aio.server(options=_SERVER_OPTIONS)
    serving.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bytes", handlers),))
    number = serving.add_insecure_port("127.0.0.1:0")
    await serving.start()
    port.send(number)
    await serving.wait_for_termination()


def _python_with_flight(pythons: list[Path]) -> Path | None:
    for python in pythons:
        if not subprocess.run([python, "-c", "import pyarrow.flight"], capture_output=True, check=False).returncode:
            return python
    return None


def _table(turns: dict[str, list[Speeds]]) -> str:
    lines = ["| | up GB/s (median) | min - max | down GB/s (median) | min - max |", "|---|---|---|---|---|"]
    medians: dict[str, Speeds] = {}
    for name, speeds in turns.items():
        ups, downs = zip(*speeds, strict=True)
        one = medians[name] = Speeds(statistics.median(ups), statistics.median(downs))
        up_spread, down_spread = (f"{min(way):.2f} - {max(way):.2f}" for way in (ups, downs))
        lines.append(f"| {name} | {one.up:.2f} | {up_spread} | {one.down:.2f} | {down_spread} |")
    ours = medians.pop("Kedge")
    lines += [
        f"| Kedge / {name} | {ours.up / it.up:.2f} | | {ours.down / it.down:.2f} | |" for name, it in medians.items()
    ]
    return "\n".join(lines)


def main() -> None:
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, help="the folder of the peers' scripts")
    parser.add_argument("--peers-python", "--python", type=Path, action="append", default=[], help="one with pyarrow")
    parser.add_argument("--turns", type=int, default=5, help="how often each is measured")
    arguments = parser.parse_args()
    python = _python_with_flight(arguments.peers_python)
    if arguments.peers is None or python is None:
        print("Arrow Flight is left out: it needs --peers, and --peers-python with pyarrow.\n")
    with of_kedge() as kedge_speeds, of_bytes() as bytes_speeds, of_flight(arguments.peers, python) as flight_speeds:
        everybody = {"Kedge": kedge_speeds, "bytes through Python's gRPC": bytes_speeds, "Arrow Flight": flight_speeds}
        present = {name: measure for name, measure in everybody.items() if measure is not None}
        turns: dict[str, list[Speeds]] = {name: [] for name in present}
        for turn in range(arguments.turns):
            for name in present if turn % 2 == 0 else reversed(present):
                turns[name].append(present[name]())
    print(_table(turns))


if __name__ == "__main__":
    main()
