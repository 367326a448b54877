"""Times the same exchange step here and on what a user would pick instead, in turns, and prints the ratios.

The peers are scripts of their own in a folder, each of which takes `--layout`, `--workers`, `--steps` and `--warmup`,
and prints a line with `step_ms=`: the mean of the timed steps. So this project's mean is compared with theirs, and of
several turns the medians. A peer whose package is not installed is left out, and named.
"""

import argparse
import re
import subprocess
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

from exchange import Plan, measure, server

from kedge.transport import Channel


class Ours(NamedTuple):
    """One way of this project's."""

    name: str
    transport: Channel
    wire_dtype: str


class Peer(NamedTuple):
    """Somebody else's."""

    name: str
    script: str
    package: str
    """What it imports."""


class Work(NamedTuple):
    """What is compared."""

    layout: str
    worker_count: int
    step_count: int


SAME_HOST = Ours("same host", "auto", "float32")
GRPC = Ours("gRPC float32", "grpc", "float32")
GRPC_BF16 = Ours("gRPC bfloat16", "grpc", "bfloat16")

TORCH_RPC = Peer("torch_rpc", "torch_rpc.py", "torch")
RAY = Peer("ray", "ray_ps.py", "ray")
TF_PS = Peer("tf_ps", "tf_ps.py", "tensorflow")
DDP_GLOO = Peer("ddp_gloo", "ddp_gloo.py", "torch")

OURS = {"resnet50": (SAME_HOST, GRPC_BF16, GRPC), "mlp": (SAME_HOST,)}
PEERS = {"resnet50": (TORCH_RPC, RAY, TF_PS, DDP_GLOO), "mlp": (TORCH_RPC, RAY)}
STEPS = {"resnet50": 10, "mlp": 300}

GOALS: dict[tuple[str, Ours, Peer], float] = {
    ("resnet50", SAME_HOST, TORCH_RPC): 0.6,
    ("resnet50", GRPC_BF16, TORCH_RPC): 1.0,
    ("resnet50", GRPC, TF_PS): 1.0,
    ("mlp", SAME_HOST, TORCH_RPC): 1.0,
    ("resnet50", SAME_HOST, RAY): 1.0,
    ("resnet50", GRPC_BF16, RAY): 1.0,
    ("resnet50", GRPC, RAY): 1.0,
    ("mlp", SAME_HOST, RAY): 1.0,
}
"""The most that this project's time may be of the peer's."""

Times = dict[tuple[Work, Ours | Peer], list[float]]
"""Milliseconds a step, one for each turn."""


class Scripts:
    """The peers that can be run here.

    Args:
        folder: where the scripts are.
        pythons: the interpreters of the environments that the packages may be in.
    """

    def __init__(self, folder: Path, pythons: Sequence[Path]) -> None:
        self._folder = folder
        self._pythons = {peer: self._python_for(peer, pythons) for peer in (TORCH_RPC, RAY, TF_PS, DDP_GLOO)}

    @property
    def missing(self) -> list[Peer]:
        """Those that cannot be run."""
        return [peer for peer, python in self._pythons.items() if python is None]

    def milliseconds(self, peer: Peer, work: Work) -> float | None:
        """The mean step time of one run; None if it cannot be run, or fails."""
        python = self._pythons[peer]
        if python is None:
            return None
        arguments = {"--layout": work.layout, "--workers": work.worker_count, "--steps": work.step_count, "--warmup": 3}
        command = [str(python), peer.script, *(str(part) for pair in arguments.items() for part in pair)]
        try:
            result = subprocess.run(command, cwd=self._folder, capture_output=True, text=True, timeout=300, check=False)
        except subprocess.TimeoutExpired:
            print(f"{peer.name} took too long at {work}")
            return None
        found = re.search(r"step_ms=([\d.]+)", result.stdout)
        if found is None:
            print(f"{peer.name} failed at {work}: {result.stderr[-300:]}")
        return float(found[1]) if found else None

    def _python_for(self, peer: Peer, pythons: Sequence[Path]) -> Path | None:
        if not (self._folder / peer.script).is_file():
            return None
        for python in pythons:
            found = subprocess.run([python, "-c", f"import {peer.package}"], capture_output=True, check=False)
            if found.returncode == 0:
                return python
        return None


def compare(scripts: Scripts, works: Sequence[Work], turns: int) -> Times:
    """Lets everybody have their turns, in the opposite order every other time."""
    times: Times = defaultdict(list)
    with server() as address:
        for turn in range(turns):
            for work in works:
                everybody: list[Ours | Peer] = [*OURS[work.layout], *PEERS[work.layout]]
                for one in everybody if turn % 2 == 0 else reversed(everybody):
                    measured = (
                        _our_milliseconds(address, one, work)
                        if isinstance(one, Ours)
                        else scripts.milliseconds(one, work)
                    )
                    if measured is not None:
                        times[work, one].append(measured)
    return times


def _our_milliseconds(address: str, ours: Ours, work: Work) -> float:
    plan = Plan(work.layout, work.worker_count, ours.wire_dtype, work.step_count, 3, transport=ours.transport)
    return measure(address, plan).mean_milliseconds


def table(times: Times) -> str:
    """The ratios, in Markdown."""
    lines = [
        "| layout | workers | Kedge | ms | peer | ms | ratio | goal | met |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (work, ours), our_times in times.items():
        if not isinstance(ours, Ours):
            continue
        lines += [
            _row(work, ours, median(our_times), peer, median(times[work, peer]))
            for peer in PEERS[work.layout]
            if (work, peer) in times
        ]
    return "\n".join(lines)


def _row(work: Work, ours: Ours, our_ms: float, peer: Peer, peer_ms: float) -> str:
    goal = GOALS.get((work.layout, ours, peer))
    ratio = our_ms / peer_ms
    verdict = "" if goal is None else "yes" if ratio <= goal else "no"
    return (
        f"| {work.layout} | {work.worker_count} | {ours.name} | {our_ms:.1f} | {peer.name} | {peer_ms:.1f} "
        f"| {ratio:.2f} | {'' if goal is None else goal} | {verdict} |"
    )


def works(layouts: str, workers: str) -> list[Work]:
    """The works of layouts and worker counts, each joined by commas."""
    return [
        Work(layout, count, STEPS[layout]) for layout in layouts.split(",") for count in map(int, workers.split(","))
    ]


def main() -> None:
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, required=True, help="the folder of the peers' scripts")
    parser.add_argument(
        "--python", type=Path, action="append", required=True, help="an interpreter with peers' packages; repeatable"
    )
    parser.add_argument("--layouts", default="mlp,resnet50", help="layouts, joined by commas")
    parser.add_argument("--workers", default="1,2,4", help="worker counts, joined by commas")
    parser.add_argument("--turns", type=int, default=3, help="how often everybody has a turn")
    arguments = parser.parse_args()
    scripts = Scripts(arguments.peers, arguments.python)
    for peer in scripts.missing:
        print(f"{peer.name} is left out: {peer.script} or its package {peer.package} is not there")
    print(table(compare(scripts, works(arguments.layouts, arguments.workers), arguments.turns)))


if __name__ == "__main__":
    main()
