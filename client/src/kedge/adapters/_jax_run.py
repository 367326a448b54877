"""A run and its workers in terms of JAX pytrees. All else that a run can do is in its `run`."""

from typing import Any, Self

import numpy as np

from kedge.adapters._jax_tree import Structure, refuse_tracers, refuse_tracing
from kedge.compression import TopK
from kedge.run import Run, Snapshot
from kedge.transport import PushResult
from kedge.weights import FastOrSlow
from kedge.worker import Worker


class JaxRun:
    """A run whose weights are pytrees of `jax.Array`. `kedge.adapters.jax` makes it; use it from any thread.

    Attributes:
        run: the run itself, whose trees are flat dicts from tensor names to NumPy arrays: for `status`,
            `set_hyperparameters` and everything else that has nothing to do with trees.
    """

    def __init__(self, run: Run, structure: Structure) -> None:
        self.run = run
        self._structure = structure

    def join(
        self,
        name: str | None = None,
        *,
        wire_dtype: str | TopK = "float32",
        weights_dtype: str | None = None,
        transport: str = "auto",
        lease_seconds: float | None = None,
    ) -> "JaxWorker":
        """Joins as a worker, as `Run.join` does and with its arguments."""
        worker = self.run.join(
            name,
            wire_dtype=wire_dtype,
            weights_dtype=weights_dtype,
            transport=transport,
            lease_seconds=lease_seconds,
        )
        return JaxWorker(worker, self._structure)

    def pull(
        self,
        weights: FastOrSlow = "fast",
        *,
        min_step: int | None = None,
        timeout_seconds: float | None = 60.0,
        if_newer_than: int | None = None,
    ) -> Any:
        """Fetches weights without a lease, as `Run.pull` does and with its arguments.

        Returns:
            A pytree of `jax.Array` like the params that the run was opened with; None as `Run.pull`.

        Raises:
            TypeError: within `jax.jit` and the like.
            KedgeError: as `Run.pull`.
        """
        refuse_tracing("pull")
        held = self.run.pull(weights, min_step=min_step, timeout_seconds=timeout_seconds, if_newer_than=if_newer_than)
        return None if held is None else self._structure.to_device(held)

    def snapshot(self, weights: FastOrSlow | None = None) -> Snapshot:
        """Fetches weights with the step that they are of, as `Run.snapshot` does.

        Raises:
            TypeError: within `jax.jit` and the like.
            KedgeError: as `Run.snapshot`.
        """
        refuse_tracing("snapshot")
        held = self.run.snapshot(weights)
        return Snapshot(held.step, *(tree and self._structure.to_device(tree) for tree in (held.fast, held.slow)))

    def __repr__(self) -> str:
        return f"<kedge.adapters.jax.JaxRun {self.run.name}>"


class JaxWorker:
    """A worker whose gradients and weights are pytrees of `jax.Array`. `JaxRun.join` makes it; use it from one thread.

    It cannot be used within `jax.jit`: compile what computes the gradient.

    Attributes:
        worker: the worker itself, whose trees are flat dicts from tensor names to NumPy arrays.
        structure: between those and the pytrees.
    """

    def __init__(self, worker: Worker, structure: Structure) -> None:
        self.worker = worker
        self.structure = structure

    @property
    def step_number(self) -> int:
        """The step of the fast weights that were last pulled.

        Raises:
            ValueError: before the first pull.
        """
        return self.worker.step_number

    @property
    def last_result(self) -> PushResult | None:
        """What became of the last push; None before the first."""
        return self.worker.last_result

    def pull(
        self,
        weights: FastOrSlow = "fast",
        *,
        min_step: int | None = None,
        timeout_seconds: float | None = None,
        if_newer_than: int | None = None,
    ) -> Any:
        """Fetches weights, as `Worker.pull` does and with its arguments.

        Returns:
            A pytree of `jax.Array` like the params that the run was opened with; None as `Worker.pull`.

        Raises:
            TypeError: within `jax.jit` and the like.
            KedgeError: as `Worker.pull`.
        """
        refuse_tracing("pull")
        held = self.worker.pull(
            weights, min_step=min_step, timeout_seconds=timeout_seconds, if_newer_than=if_newer_than
        )
        return None if held is None else self.structure.to_device(held)

    def push(
        self,
        grads: Any,
        *,
        loss: Any = None,
        example_count: int = 1,
        base_step: int | None = None,
        wait_seconds: float = 0.0,
    ) -> PushResult:
        """Sends a gradient, as `Worker.push` does and with its arguments.

        Args:
            grads: a pytree of arrays, named and shaped as the run's params. Of another structure it may be.
            loss: a number or a scalar array.
            example_count: as for `Worker.push`.
            base_step: as for `Worker.push`.
            wait_seconds: as for `Worker.push`.

        Raises:
            TypeError: for what is traced, and within `jax.jit` and the like: call it outside.
            ValueError, KedgeError: as `Worker.push`.
        """
        return self.worker.push(
            self._to_host(grads, loss),
            loss=loss,
            example_count=example_count,
            base_step=base_step,
            wait_seconds=wait_seconds,
        )

    def step(self, grads: Any, *, loss: Any = None, example_count: int = 1) -> Any:
        """Pushes a gradient, waits for its round, and pulls what came of it, as `Worker.step` does.

        Args:
            grads: as for `push`.
            loss: as for `push`.
            example_count: as for `Worker.push`.

        Returns:
            Fast weights: a pytree of `jax.Array` like the params that the run was opened with.

        Raises:
            TypeError: for what is traced, and within `jax.jit` and the like: call it outside.
            ValueError, KedgeError: as `Worker.step`.
        """
        arrays = self._to_host(grads, loss)
        return self.structure.to_device(self.worker.step(arrays, loss=loss, example_count=example_count))

    def close(self) -> None:
        """Gives the lease back. May be called twice."""
        self.worker.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _to_host(self, grads: Any, loss: Any) -> dict[str, np.ndarray]:
        """The gradient by name, if there is no tracing."""
        refuse_tracers({"loss": loss})
        arrays = self.structure.to_host(grads)
        refuse_tracing("gradient")
        return arrays

    def __repr__(self) -> str:
        return f"<kedge.adapters.jax.JaxWorker {self.worker.name}>"
