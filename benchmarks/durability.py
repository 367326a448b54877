"""What durability costs: the exchange of a step at each level, by turns, in one sitting.

The levels take turns, several times each, on one server with its data directory on the disk of `--data-dir`; what is
compared is the median and the mean of each level's steps with those of `memory`. The mean has the checkpoints and the
fdatasyncs in it that a median step does not meet. Nothing is computed but the update: a real worker that computes
gradients sees less of it.
"""

import argparse
import tempfile
from pathlib import Path
from statistics import mean, median
from typing import get_args

from exchange import Plan, measure, server
from layouts import layout_of, parameter_count

from kedge.policies import Durability

LEVELS: tuple[Durability, ...] = get_args(Durability)


def measure_levels(address: str, plan: Plan, turns: int) -> dict[Durability, list[float]]:
    """The seconds of each timed step at each level."""
    seconds: dict[Durability, list[float]] = {level: [] for level in LEVELS}
    for turn in range(turns):
        for level in LEVELS if turn % 2 == 0 else reversed(LEVELS):
            seconds[level] += measure(address, plan._replace(durability=level)).step_seconds
    return seconds


def _rows(plan: Plan, seconds: dict[Durability, list[float]]) -> list[str]:
    base = seconds["memory"]
    megabytes = 4 * parameter_count(layout_of(plan.layout)) / 1e6
    return [
        f"| {plan.layout} | {megabytes:.1f} | {plan.worker_count} | {level} | {1e3 * median(of_level):.1f} "
        f"| {median(of_level) / median(base):.2f} | {mean(of_level) / mean(base):.2f} |"
        for level, of_level in seconds.items()
    ]


def main() -> None:
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", default="mlp,resnet50", help="layouts, joined by commas")
    parser.add_argument("--workers", default="1,4", help="worker counts, joined by commas")
    parser.add_argument("--turns", type=int, default=4, help="how often each level has its turn")
    parser.add_argument("--steps", type=int, default=0, help="timed steps a turn; 0: 200 for mlp, 20 for others")
    parser.add_argument(
        "--data-dir", type=Path, help="an empty directory on the disk in question; default: a temporary one"
    )
    arguments = parser.parse_args()
    print(
        "| layout | MB a gradient | workers | durability | ms a step (median) | median to memory's | mean to memory's |"
    )
    print("|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory(dir=arguments.data_dir) as directory, server("--data-dir", directory) as address:
        for layout in arguments.layouts.split(","):
            steps = arguments.steps or (200 if layout == "mlp" else 20)
            for worker_count in map(int, arguments.workers.split(",")):
                plan = Plan(layout, worker_count, "float32", steps, max(5, steps // 10))
                print("\n".join(_rows(plan, measure_levels(address, plan, arguments.turns))), flush=True)


if __name__ == "__main__":
    main()
