"""The thread that owns JAX, and the writer that keeps one run's state there.

Nothing else in the server calls JAX. A call into the thread is awaited by the loop, never waited for.
"""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import jax
import numpy as np

from kedge.optim.controls import StepValues
from kedge_server.core.plan import Plan
from kedge_server.core.update import Program
from kedge_server.core.values import MEAN, Combine
from kedge_server.engine.snapshots import Snapshot

ResultT = TypeVar("ResultT")

_BLOCK_ELEMENTS = {"cpu": 1 << 20}
_BLOCK_ELEMENTS_ELSEWHERE = 32 << 20  # on a GPU fewer, larger calls, so that dispatch does not show


def default_block_elements() -> int:
    """The block length that measured best on this platform."""
    return _BLOCK_ELEMENTS.get(jax.default_backend(), _BLOCK_ELEMENTS_ELSEWHERE)


class DeviceThread:
    """Runs functions one after the other on the thread that owns JAX."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="kedge-device")

    async def run(self, function: Callable[..., ResultT], *arguments: object) -> ResultT:
        """Calls the function there; the loop goes on meanwhile."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, function, *arguments)

    def close(self) -> None:
        """Finishes what was begun."""
        self._executor.shutdown()


class Writer:
    """The only one who changes a run's weights. Constructed and called on the device thread.

    Args:
        plan: how its state is cut, and updated.
        weights: the initial weights, float32, flat. Copied.
        values: the hyperparameters of the first step.
    """

    def __init__(self, plan: Plan, weights: np.ndarray, values: Sequence[StepValues]) -> None:
        self._program = Program(plan)
        self._spec = plan.spec
        self._step = 0
        self._lookahead_sync_count = 0
        self._blocks = self._program.init(weights, values)

    def apply(
        self,
        gradients: Sequence[np.ndarray],
        factors: Sequence[float],
        values: Sequence[StepValues],
        combine: Combine = MEAN,
    ) -> Snapshot:
        """Applies one round and waits for it: afterwards the gradients may be overwritten.

        Args:
            gradients: one for each contribution, float32, flat.
            factors: what each is multiplied with: for the mean its share too, else its scale alone.
            values: the hyperparameters of the step, for each parameter group.
            combine: what is done with the products. The round has its `required_count` at least.
        """
        self._step += 1
        self._lookahead_sync_count += self._spec.ends_sync_period(self._step)
        self._blocks = self._program.apply(
            self._blocks, gradients, factors=factors, step=self._step, values=values, combine=combine
        )
        jax.block_until_ready(self._blocks)  # type: ignore[no-untyped-call]  # JAX leaves it bare
        return self.snapshot()

    def snapshot(self) -> Snapshot:
        """The weights as they are now. On the CPU the arrays are the state's, elsewhere copies on the host."""
        fast = self._program.host_weights(block.weights for block in self._blocks)
        slow = None
        if self._spec.sync_period is not None:
            is_synced = all(block.slow is block.weights for block in self._blocks)
            slow = fast if is_synced else self._program.host_weights(self._slow_arrays())
        return Snapshot(self._step, self._lookahead_sync_count, fast, slow)

    def _slow_arrays(self) -> list[jax.Array]:
        return [block.slow for block in self._blocks if block.slow is not None]
