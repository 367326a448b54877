"""A round's mean, and a push that is repeated, on numbers that are exact in float32."""

from collections.abc import Iterator
from contextlib import ExitStack, closing

import numpy as np

from kedge.optim import SGD
from kedge.policies import Synchronous
from kedge.transport import Push
from kedge.verify.bench import AT_ONCE, Bench, Row, pulled, row

_LEASE_SECONDS = 60.0

# The mean is (1 * 8 + 1 * 16 + 2 * 4 + 4 * 2) / 8 = 5. Without the counts it would be 7.5.
_GRADIENTS = (8.0, 16.0, 4.0, 2.0)
_EXAMPLE_COUNTS = (1, 1, 2, 4)


def weighted_mean(bench: Bench) -> Iterator[Row]:
    """Four workers' gradients make one step, each weighted by its `example_count`."""
    everyone = Synchronous(quorum=len(_GRADIENTS))
    with bench.run("mean", [12.0], SGD(lr=1.0), everyone) as run, ExitStack() as leases:
        workers = [leases.enter_context(run.join()) for _ in _GRADIENTS]
        for worker, gradient, count in zip(workers, _GRADIENTS, _EXAMPLE_COUNTS, strict=True):
            worker.push(np.array([gradient], np.float32), example_count=count, base_step=0)
        yield row("weighted mean of 4 workers, 12 less 5", expected=7, got=pulled(run, 1))


def repeated_push(bench: Bench) -> Iterator[Row]:
    """A push of the same sequence is applied once. No worker repeats one unasked, so this is done below it."""
    transport = bench.client._transport
    # Not synchronous: there a second application could not be told from a rejection for its staleness.
    with bench.run("repetition", [3.0], SGD(lr=1.0), AT_ONCE) as run:
        lease = transport.join(run.name, "repeater", _LEASE_SECONDS)
        push = Push(lease, 1, 0, 1, None, [np.ones(1, np.float32)], "float32", 0.0, None)
        with closing(transport.open_exchange(run.manifest)) as exchange:
            for _ in range(2):
                exchange.push(push)
        yield row("a push sent twice, 3 less 1", expected=2, got=pulled(run, 1))
