"""Times the update of a round whose contributions are combined by mean, trimmed mean or median.

The compiled update alone, on gradients that lie aligned in memory as they do in the server. The three take turns in one
process, and the best of nine counts: compare within a row.
"""

import argparse
import time
from collections.abc import Sequence

import jax
import numpy as np

from kedge import optim
from kedge.optim.controls import Controls
from kedge.wire.manifest import Manifest
from kedge_server.core.plan import plan
from kedge_server.core.update import Blocks, Program
from kedge_server.core.values import MEAN, Combine
from kedge_server.engine.staging import StagingPool

_REPETITIONS = 9
_OPTIMIZERS: dict[str, optim.Optimizer] = {
    "SGD": optim.SGD(1e-6),
    "Lookahead(AdaBelief)": optim.Lookahead(optim.AdaBelief(1e-6)),
}
_COMBINES = {"mean": MEAN, "trimmed mean (1)": Combine("trimmed_mean", 1), "median": Combine("median")}


class Bench:
    """One optimizer's state, and what it is updated with."""

    def __init__(self, optimizer: optim.Optimizer, element_count: int) -> None:
        manifest = Manifest.from_specs([("w", (element_count,), "float32")])
        self._program = Program(plan(optimizer.spec(), manifest, block_elements=1 << 20))
        self._values = Controls.begin(optimizer.spec(), ()).values()
        self._blocks: Blocks = self._program.init(np.zeros(element_count, np.float32), self._values)
        self._step = 0

    def seconds(self, gradients: Sequence[np.ndarray], combine: Combine) -> float:
        """The time of one update."""
        self._step += 1
        factors = [1.0 / len(gradients) if combine == MEAN else 1.0] * len(gradients)
        begin = time.perf_counter()
        self._blocks = self._program.apply(
            self._blocks, gradients, factors=factors, step=self._step, values=self._values, combine=combine
        )
        jax.block_until_ready(self._blocks)  # type: ignore[no-untyped-call]  # JAX leaves it bare
        return time.perf_counter() - begin


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=4 << 20)
    parser.add_argument("--contributions", default="3,5,8,16")
    arguments = parser.parse_args()
    counts = [int(count) for count in arguments.contributions.split(",")]
    random, pool = np.random.default_rng(0), StagingPool(1 << 40)
    gradients = [pool.acquire(arguments.elements).array for _ in range(max(counts))]
    for gradient in gradients:
        gradient[:] = random.standard_normal(arguments.elements, np.float32)
    print(
        "| optimizer | contributions | mean, ns an element |",
        " | ".join(list(_COMBINES)[1:]),
        "|\n|---|---|---|---|---|",
    )
    for title, optimizer in _OPTIMIZERS.items():
        bench = Bench(optimizer, arguments.elements)
        for count in counts:
            taken: dict[str, list[float]] = {name: [] for name in _COMBINES}
            for _ in range(_REPETITIONS + 2):
                for name, combine in _COMBINES.items():
                    taken[name].append(bench.seconds(gradients[:count], combine))
            best = {name: min(times[2:]) for name, times in taken.items()}  # the first ones compile
            ratios = " | ".join(f"{best[name] / best['mean']:.2f}" for name in list(_COMBINES)[1:])
            print(f"| {title} | {count} | {best['mean'] / arguments.elements * 1e9:.2f} | {ratios} |", flush=True)


if __name__ == "__main__":
    main()
