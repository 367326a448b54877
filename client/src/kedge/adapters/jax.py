"""Workers in JAX: runs whose weights and gradients are pytrees of `jax.Array`.

Any pytree will do: nested dicts, a Flax Linen model's params, `nnx.state(model, nnx.Param)`, an Equinox model's half of
`eqx.partition`, dataclasses, named tuples, a bare array. Leaves have to be floats; None is structure. What comes back
has the structure, the dtypes and the device placement of the params that were given.

Example:
    >>> import jax
    >>> import kedge.adapters.jax
    >>> run = kedge.adapters.jax.get_or_create_run(
    ...     client, "digits", params=params, optimizer=optim.Adam(lr=1e-3), aggregation=kedge.Synchronous(quorum=4)
    ... )
    >>> value_and_grad = jax.jit(jax.value_and_grad(loss))
    >>> with run.join() as worker:
    ...     params = worker.pull()
    ...     for batch in batches:
    ...         value, grads = value_and_grad(params, batch)
    ...         params = worker.step(grads, loss=value, example_count=len(batch))
    >>> best = run.pull("slow")
"""

try:
    import jax as _  # noqa: F401  said here, before the modules that need it
except ImportError as error:
    raise ImportError("kedge.adapters.jax needs JAX: pip install kedge[jax]") from error

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from kedge import optim, policies
from kedge.adapters._jax_run import JaxRun, JaxWorker
from kedge.adapters._jax_tree import Structure
from kedge.client import ALL_THAT_ARE_FINITE, Client
from kedge.compression import TopK
from kedge.errors import ConflictError

if TYPE_CHECKING:
    from kedge.adapters._jax_remote import Remote

__all__ = ["JaxRun", "JaxWorker", "create_run", "get_or_create_run", "get_run", "remote"]


def create_run(
    client: Client,
    name: str,
    *,
    params: Any,
    optimizer: optim.Optimizer,
    aggregation: policies.Policy,
    groups: Sequence[optim.Group] = (),
    admission: policies.Admission = ALL_THAT_ARE_FINITE,
    durability: policies.Durability | None = None,
    checkpoints: policies.Checkpoints | None = None,
) -> JaxRun:
    """Creates a run from a pytree; blocks until the server holds it.

    Args:
        client: as `kedge.connect` makes it.
        name: as for `Client.create_run`.
        params: the initial weights: a pytree of arrays, each float32, bfloat16 or float16. A tensor is named by the
            keys on the way to it, joined by dots: "layers.0.weight".
        optimizer: of `kedge.optim`.
        aggregation: as for `Client.create_run`.
        groups: as for `Client.create_run`; their patterns fit the tensors' names.
        admission: as for `Client.create_run`.
        durability: as for `Client.create_run`.
        checkpoints: as for `Client.create_run`.

    Raises:
        TypeError: for traced params: call it outside of `jax.jit`.
        KedgeError: UNSUPPORTED_STRUCTURE and UNSUPPORTED_DTYPE for leaves that are no arrays of floats: leave them out;
            also those of `Client.create_run`.
    """
    structure = Structure(params)
    run = client.create_run(
        name,
        params=structure.to_host(params),
        optimizer=optimizer,
        aggregation=aggregation,
        groups=groups,
        admission=admission,
        durability=durability,
        checkpoints=checkpoints,
    )
    return JaxRun(run, structure)


def get_or_create_run(
    client: Client,
    name: str,
    *,
    params: Any,
    optimizer: optim.Optimizer,
    aggregation: policies.Policy,
    groups: Sequence[optim.Group] = (),
    admission: policies.Admission = ALL_THAT_ARE_FINITE,
    durability: policies.Durability | None = None,
    checkpoints: policies.Checkpoints | None = None,
) -> JaxRun:
    """Opens a run, or creates it if it does not exist: workers may call this in any order.

    Args:
        client: as `kedge.connect` makes it.
        name: as for `Client.create_run`.
        params: as for `create_run`. If the run exists, only names, shapes, dtypes and placement matter: the order does
            not, since JAX's functions sort the keys of the dicts that they return.
        optimizer: as for `Client.get_or_create_run`.
        aggregation: as for `Client.get_or_create_run`.
        groups: as for `Client.get_or_create_run`.
        admission: as for `Client.get_or_create_run`.
        durability: as for `Client.get_or_create_run`.
        checkpoints: as for `Client.get_or_create_run`.

    Raises:
        TypeError: as `create_run`.
        KedgeError: RUN_MISMATCH if the run that exists is another one; also those of `create_run`.
    """
    structure = Structure(params)
    arrays = structure.to_host(params)

    def open_with(ordered: dict[str, np.ndarray]) -> JaxRun:
        run = client.get_or_create_run(
            name,
            params=ordered,
            optimizer=optimizer,
            aggregation=aggregation,
            groups=groups,
            admission=admission,
            durability=durability,
            checkpoints=checkpoints,
        )
        return JaxRun(run, structure)

    try:
        return open_with(arrays)
    except ConflictError as error:
        if error.reason != "RUN_MISMATCH":
            raise
        names = [spec.name for spec in client.get_run(name).manifest.tensors]
        if names == list(arrays) or set(names) != arrays.keys():
            raise
    return open_with({tensor: arrays[tensor] for tensor in names})


def get_run(client: Client, name: str, *, like: Any) -> JaxRun:
    """Opens a run that exists, whoever created it.

    Args:
        client: as `kedge.connect` makes it.
        name: "digits" or "runs/digits".
        like: a pytree of arrays, or of `jax.ShapeDtypeStruct`s as `jax.eval_shape` makes them, with the run's names and
            shapes. What is pulled gets its structure, its placement, and its dtypes where they are not the run's.

    Raises:
        KedgeError: RUN_NOT_FOUND; TENSOR_MISSING, TENSOR_UNEXPECTED or TENSOR_SHAPE_MISMATCH if `like` does not fit;
            UNSUPPORTED_STRUCTURE, UNSUPPORTED_DTYPE.
    """
    structure = Structure(like)
    return JaxRun(client.get_run(name, like=structure.stand_ins()), structure)


def remote(
    run: JaxRun, name: str | None = None, *, wire_dtype: str | TopK = "float32", lease_seconds: float | None = None
) -> "Remote":
    """Joins a run as a worker in the shape of an optax transformation: for loops that are written for optax.

    `update` pushes the gradient, waits for its round, and gives `server's weights - params`, so that
    `optax.apply_updates` leads to the server's weights. It does to the bit where an element changes by less than a
    factor of two, and to one unit in the last place of the larger of the two elsewhere; as the next update starts from
    what came of it, nothing adds up. It has to be the last link of a chain.

    It cannot be traced: not within `jax.jit`, `jax.grad`, `jax.vmap` or `jax.lax.scan`; docs/jax.md says why. Compile
    what computes the gradient.

    Args:
        run: as the functions of this module open it.
        name: as for `Run.join`.
        wire_dtype: as for `Run.join`.
        lease_seconds: as for `Run.join`.

    Returns:
        An `optax.GradientTransformation` that holds a lease: close it, or use it in a `with` block. Its `update` also
        takes `value`, the loss, and `example_count`.

    Raises:
        ImportError: without optax.
        TypeError: if the run is not of this module's making.
        ValueError, KedgeError: as `Run.join`.

    Example:
        >>> with kedge.adapters.jax.remote(run) as tx:
        ...     params = tx.pull()
        ...     state = tx.init(params)
        ...     for batch in batches:
        ...         value, grads = value_and_grad(params, batch)
        ...         updates, state = tx.update(grads, state, params, value=value)
        ...         params = optax.apply_updates(params, updates)
    """
    from kedge.adapters._jax_remote import Remote

    if not isinstance(run, JaxRun):
        raise TypeError(f"run is {run!r}: open it with kedge.adapters.jax.get_run(client, name, like=params)")
    return Remote(run.join(name, wire_dtype=wire_dtype, lease_seconds=lease_seconds))
