"""A run in the shape of an optax transformation."""

from functools import partial
from typing import Any, NamedTuple, Self

import jax
import numpy as np

try:
    import optax
except ImportError as error:
    raise ImportError("remote() needs optax: pip install kedge[jax]") from error

from kedge.adapters._jax_run import JaxWorker
from kedge.adapters._jax_tree import refuse_tracers


class RemoteState(NamedTuple):
    """The state of a `Remote`. The optimizer's own is on the server."""

    step: int
    """The run's step that the params are of."""


class Remote(optax.GradientTransformationExtraArgs):  # type: ignore[misc]  # optax has no types
    """What `kedge.adapters.jax.remote` makes: a transformation whose updates lead to the server's weights.

    It holds a lease: close it, or use it in a `with` block. It cannot be traced.

    Attributes:
        worker: what pushes and pulls.
    """

    worker: JaxWorker

    def __new__(cls, worker: JaxWorker) -> Self:
        """A transformation that contributes as `worker`."""
        remote: Self = super().__new__(cls, partial(_init, worker), partial(_update, worker))
        remote.worker = worker
        return remote

    def pull(self) -> Any:
        """The run's fast weights: the params to begin with."""
        return self.worker.pull()

    def close(self) -> None:
        """Gives the lease back. May be called twice."""
        self.worker.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _init(worker: JaxWorker, params: Any) -> RemoteState:
    """The state for these params.

    Once something was pulled they are not compared with it, as that would need another pull.

    Raises:
        TypeError: if they are traced.
        ValueError: if nothing was pulled and they are not the run's fast weights.
        KedgeError: as `Worker.pull`.
    """
    refuse_tracers({"params": params})
    try:
        return RemoteState(worker.step_number)
    except ValueError:  # nothing was pulled yet
        different = _first_difference(worker.structure.to_host(worker.pull()), worker.structure.to_host(params))
    if different:
        raise ValueError(
            f"params is not the run's weights of step {worker.step_number}: {different!r} differs; begin with "
            "params = tx.pull()"
        )
    return RemoteState(worker.step_number)


def _first_difference(held: dict[str, np.ndarray], given: dict[str, np.ndarray]) -> str | None:
    return next((name for name in held if name not in given or not np.array_equal(held[name], given[name])), None)


def _update(
    worker: JaxWorker,
    updates: Any,
    state: RemoteState,
    params: Any = None,
    *,
    value: Any = None,
    example_count: int = 1,
    **_: object,
) -> tuple[Any, RemoteState]:
    """Pushes the gradient and gives the way from `params` to the weights that came of it.

    Raises:
        TypeError: if anything is traced.
        ValueError: without params, and for a state that is not this worker's last one.
        KedgeError: as `Worker.step`.
    """
    refuse_tracers({"updates": updates, "state": state, "params": params})
    if params is None:
        raise ValueError("params is None: give update() the params that the gradient is of, as its third argument")
    if int(state.step) != worker.step_number:
        raise ValueError(
            f"state is of step {int(state.step)} and the worker's weights are of step {worker.step_number}: begin anew "
            "with params = tx.pull() and state = tx.init(params)"
        )
    weights = worker.step(updates, loss=value, example_count=example_count)
    return jax.tree.map(lambda new, old: new - old, weights, params), RemoteState(worker.step_number)
