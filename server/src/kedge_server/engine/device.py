"""The thread that owns JAX, and the writer that keeps one run's state there.

Nothing else in the server calls JAX. A call into the thread is awaited by the loop, never waited for.
"""

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import jax
import numpy as np

from kedge.optim.controls import StepValues
from kedge.wire.allocation import set_apart
from kedge_server.core.placement import DeviceCount, Placement
from kedge_server.core.plan import Plan
from kedge_server.core.update import Parts, Program
from kedge_server.core.values import MEAN, Combine
from kedge_server.engine.snapshots import Snapshot
from kedge_server.telemetry.failpoints import failpoint

ResultT = TypeVar("ResultT")

_BLOCK_ELEMENTS = {"cpu": 1 << 20}
_BLOCK_ELEMENTS_ELSEWHERE = 32 << 20  # on a GPU fewer, larger calls, so that dispatch does not show


def default_block_elements() -> int:
    """The block length that measured best on this platform."""
    return _BLOCK_ELEMENTS.get(jax.default_backend(), _BLOCK_ELEMENTS_ELSEWHERE)


class DeviceThread:
    """Runs functions one after the other on the thread that owns JAX.

    Args:
        device_count: how many of this host's devices a run's state is dealt to; see `Placement.of`.
    """

    def __init__(self, device_count: DeviceCount = None) -> None:
        self._device_count: DeviceCount = device_count
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="kedge-device")

    async def run(self, function: Callable[..., ResultT], *arguments: object) -> ResultT:
        """Calls the function there; the loop goes on meanwhile."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, function, *arguments)

    async def placement(self) -> Placement:
        """Where the states of runs live.

        Raises:
            ValueError: for more devices than there are.
        """
        return await self.run(Placement.of, self._device_count)

    def close(self) -> None:
        """Finishes what was begun."""
        self._executor.shutdown()


class Writer:
    """The only one who changes a run's weights. Constructed and called on the device thread.

    Args:
        plan: how its state is cut, and updated.
        weights: the initial weights, float32, flat. Copied.
        values: the hyperparameters of the first step.
        placement: where the state lives; None for the platform's default.
    """

    def __init__(
        self, plan: Plan, weights: np.ndarray, values: Sequence[StepValues], placement: Placement | None = None
    ) -> None:
        self._program = Program(plan, placement)
        self._spec = plan.spec
        self._step = 0
        self._lookahead_sync_count = 0
        with set_apart():
            self._blocks = self._program.init(weights, values)
            jax.block_until_ready(self._blocks)  # type: ignore[no-untyped-call]  # JAX leaves it bare

    @classmethod
    def resume(
        cls,
        plan: Plan,
        arrays: Mapping[str, np.ndarray],
        values: Sequence[StepValues],
        *,
        step: int,
        placement: Placement | None = None,
    ) -> "Writer":
        """The writer of a run that stands where `capture` left it, on however many devices that was.

        Raises:
            ValueError: for arrays that are not of this plan.
        """
        writer = cls.__new__(cls)
        writer._program = Program(plan, placement)
        writer._spec = plan.spec
        writer.go_back(arrays, values, step=step)
        return writer

    def go_back(self, arrays: Mapping[str, np.ndarray], values: Sequence[StepValues], *, step: int) -> Snapshot:
        """Puts another state of the run in the place of this one.

        Raises:
            ValueError: for arrays that are not of this run; then nothing has changed.
        """
        with set_apart():
            self._blocks = self._program.resume(arrays, values)
            jax.block_until_ready(self._blocks)  # type: ignore[no-untyped-call]  # JAX leaves it bare
        self._step = step
        self._lookahead_sync_count = 0 if self._spec.sync_period is None else step // self._spec.sync_period
        return self.snapshot()

    def capture(self) -> dict[str, np.ndarray]:
        """The state on the host; see `Program.state_arrays`."""
        return self._program.state_arrays(self._blocks)

    def replay(self, gradient: np.ndarray, values: Sequence[StepValues]) -> None:
        """Applies a gradient that was applied before, float32, flat."""
        self._step += 1
        self._lookahead_sync_count += self._spec.ends_sync_period(self._step)
        self._blocks = self._program.apply(self._blocks, [gradient], factors=[1.0], step=self._step, values=values)
        jax.block_until_ready(self._blocks)  # type: ignore[no-untyped-call]  # JAX leaves it bare

    def apply_combined(
        self,
        gradients: Sequence[np.ndarray],
        factors: Sequence[float],
        values: Sequence[StepValues],
        combine: Combine = MEAN,
        *,
        on_combined: Callable[[Sequence[np.ndarray]], object],
    ) -> Snapshot:
        """Applies one round as `replay` will, and says what as soon as it is known.

        Args:
            gradients: as of `apply`.
            factors: as of `apply`.
            values: as of `apply`.
            combine: as of `apply`.
            on_combined: is given the gradient that is applied: arrays that are, one after the other, the flat one.
        """
        self._step += 1
        self._lookahead_sync_count += self._spec.ends_sync_period(self._step)
        if len(gradients) == 1 and factors[0] == 1:
            on_combined([gradients[0][: self._program.plan.element_count]])
            parts: Iterable[Parts] = self._program.parts(gradients, factors, combine)
        else:
            parts, host = self._program.combined(gradients, factors, combine)
            on_combined(host)
        failpoint("engine.apply.before")
        self._blocks = self._program.apply_parts(self._blocks, parts, step=self._step, values=values)
        jax.block_until_ready(self._blocks)  # type: ignore[no-untyped-call]  # JAX leaves it bare
        failpoint("engine.apply.after")
        return self.snapshot()

    def apply(
        self,
        gradients: Sequence[np.ndarray],
        factors: Sequence[float],
        values: Sequence[StepValues],
        combine: Combine = MEAN,
    ) -> Snapshot:
        """Applies one round and waits for it: afterwards the gradients may be overwritten.

        Args:
            gradients: one for each contribution, float32, flat; longer than the state, by what its last block is padded
                with, if that is not to be copied.
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
