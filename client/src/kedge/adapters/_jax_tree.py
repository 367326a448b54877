"""JAX pytrees of any kind: from their leaves to named tensors and back, each leaf in its own dtype and place.

Tensors are named by the keys on the way to them, joined by dots: what `kedge.tree` calls them where it knows the
container. So a worker in NumPy and one in JAX can share a run. None is structure and no tensor.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey, tree_flatten_with_path

from kedge.tree import BARE_ARRAY_NAME
from kedge.wire.errors import KedgeError
from kedge.wire.manifest import DTYPES, unsupported_dtype

_Path = tuple[Any, ...]
"""JAX's keys on the way to a leaf."""

_DTYPES = frozenset(DTYPES.values())


class _Place(NamedTuple):
    """What a pulled tensor becomes."""

    dtype: np.dtype
    sharding: jax.sharding.Sharding | None
    """None: wherever JAX puts new arrays."""


class Structure:
    """A pytree without its values. It holds no reference to the leaves, which may be donated.

    Args:
        tree: a pytree of arrays, or of `jax.ShapeDtypeStruct`s.

    Raises:
        TypeError: for a traced leaf.
        KedgeError: UNSUPPORTED_STRUCTURE, UNSUPPORTED_DTYPE, MANIFEST_INVALID for two leaves of one name.
    """

    def __init__(self, tree: Any) -> None:
        named = _named(tree)
        paths, self._treedef = tree_flatten_with_path(tree)
        name_of = {path: name for name, (path, _) in named.items()}
        self._jax_order = [name_of[path] for path, _ in paths]
        self._places = {name: _place(leaf) for name, (_, leaf) in named.items()}
        self._shapes = {name: np.shape(leaf) for name, (_, leaf) in named.items()}

    def stand_ins(self) -> dict[str, np.ndarray]:
        """Tensors of the same names, shapes and dtypes, in manifest order, that take no memory."""
        return {
            name: np.broadcast_to(np.zeros((), place.dtype), self._shapes[name]) for name, place in self._places.items()
        }

    def to_host(self, tree: Any) -> dict[str, np.ndarray]:
        """The leaves of a tree by name, in NumPy. It waits until they are computed.

        A tree of this structure keeps the order of `stand_ins`; another one is taken apart by its own names.

        Raises:
            TypeError: for a leaf without values: traced, a shape alone, or spread over several processes.
            KedgeError: as the constructor.
        """
        leaves, treedef = jax.tree.flatten(tree)
        if treedef == self._treedef:  # type: ignore[operator]  # jaxlib's stubs have no __eq__
            held = dict(zip(self._jax_order, leaves, strict=True))
            named = {name: held[name] for name in self._places}
        else:
            named = {name: leaf for name, (_, leaf) in _named(tree).items()}
        for name, leaf in named.items():
            _check_leaf(name, leaf)
            _check_values(name, leaf)
        return dict(zip(named, jax.device_get(list(named.values())), strict=True))

    def to_device(self, arrays: Mapping[str, np.ndarray]) -> Any:
        """A tree of this structure with the arrays as its leaves, each in the place of the leaf that it was made of.

        On the CPU the leaves may be the arrays' own memory: give it up.
        """
        places = [self._places[name] for name in self._jax_order]
        hosted = [
            arrays[name].astype(place.dtype, copy=False) for name, place in zip(self._jax_order, places, strict=True)
        ]
        leaves = jax.device_put(hosted, [place.sharding for place in places])  # one call costs half of one for each
        return jax.tree.unflatten(self._treedef, leaves)


def _named(tree: Any) -> dict[str, tuple[_Path, Any]]:
    """The leaves with their key paths by name, in the tree's own order."""
    leaves: dict[str, tuple[_Path, Any]] = {}
    for path, joined, leaf in _walk(tree, (), ""):
        name = joined or BARE_ARRAY_NAME
        if name in leaves:
            raise KedgeError("MANIFEST_INVALID", f"two tensors are named {name!r}: rename one", tensor=name)
        _check_leaf(name, leaf)
        leaves[name] = path, leaf
    return leaves


def _walk(node: Any, path: _Path, name: str) -> Iterator[tuple[_Path, str, Any]]:
    children = tree_flatten_with_path(node, is_leaf=lambda child: child is not node)[0]
    if len(children) == 1 and not children[0][0]:
        yield path, name, node
        return
    if _is_box(node, children):
        ((key,), boxed), *_ = children
        yield from _walk(boxed, (*path, key), name)
        return
    for keys, child in _in_own_order(node, children):
        yield from _walk(child, (*path, *keys), _join(name, keys[-1]))


def _is_box(node: Any, children: list[tuple[_Path, Any]]) -> bool:
    """Whether the node is there for its one value, as a Variable of Flax NNX: it adds nothing to the name.

    A named tuple is none, whatever its field is called: `kedge.tree` names it by that.
    """
    return not isinstance(node, tuple) and len(children) == 1 and children[0][0] == (GetAttrKey("value"),)


def _in_own_order(node: Any, children: list[tuple[_Path, Any]]) -> list[tuple[_Path, Any]]:
    """JAX sorts a dict's keys; a manifest has them as they were inserted."""
    if not isinstance(node, Mapping):
        return children
    by_key = {keys[-1].key: (keys, child) for keys, child in children if isinstance(keys[-1], DictKey)}
    return [by_key[key] for key in node] if by_key.keys() == node.keys() else children


def _join(path: str, key: Any) -> str:
    part = _text(key)
    if not isinstance(part, str | int) or part == "" or not str(part).isprintable():
        raise KedgeError(
            "UNSUPPORTED_STRUCTURE",
            f"{part!r} in {path or 'the tree'!r} cannot be a key: use printable text or whole numbers",
            tensor=path,
        )
    return f"{path}.{part}" if path else str(part)


def _text(key: Any) -> Any:
    match key:
        case DictKey(key=part) | FlattenedIndexKey(key=part) | SequenceKey(idx=part) | GetAttrKey(name=part):
            return part
    return str(key).strip(".[]'\"")


def _place(leaf: Any) -> _Place:
    # An array that nobody has placed must stay free to go where a computation's other arrays are.
    is_placed = getattr(leaf, "committed", True)
    return _Place(np.dtype(leaf.dtype), getattr(leaf, "sharding", None) if is_placed else None)


def _check_leaf(name: str, leaf: Any) -> None:
    """Refuses what is no array of floats."""
    refuse_tracers({name: leaf})
    dtype = getattr(leaf, "dtype", None)
    if dtype is None or not hasattr(leaf, "shape"):
        raise KedgeError(
            "UNSUPPORTED_STRUCTURE",
            f"{name!r} is a {type(leaf).__name__}: a run holds arrays; leave the rest out, {_HOW_TO_FILTER}",
            tensor=name,
        )
    if dtype in _DTYPES:
        return
    if jnp.issubdtype(dtype, jnp.inexact):
        raise unsupported_dtype(name, dtype)
    raise KedgeError(
        "UNSUPPORTED_DTYPE",
        f"{name!r} is {dtype}: a run holds what has a gradient; leave the rest out, {_HOW_TO_FILTER}",
        tensor=name,
        dtype=dtype,
    )


_HOW_TO_FILTER = "as eqx.partition(model, eqx.is_inexact_array) and nnx.split(model, nnx.Param, ...) do"


def _check_values(name: str, leaf: Any) -> None:
    """Refuses an array whose values are not here."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        raise TypeError(f"{name!r} is a ShapeDtypeStruct: give an array")
    if not getattr(leaf, "is_fully_addressable", True):
        raise TypeError(
            f"{name!r} is spread over several processes: gather it first, as multihost_utils.process_allgather does"
        )


def refuse_tracing(what: str) -> None:
    """Refuses to be called while JAX compiles: the answer would be a constant of the compiled code.

    Raises:
        TypeError: within jax.jit, jax.lax.scan and the like.
    """
    if isinstance(jnp.zeros(()), jax.core.Tracer):
        raise TypeError(_TRACED.format(what))


_TRACED = (
    "{!r} is traced: a server cannot be called within jax.jit, jax.grad and the like; compile what computes the "
    "gradient, and call the server outside"
)


def refuse_tracers(trees: Mapping[str, Any]) -> None:
    """Refuses what has no values yet, in trees by what they are called.

    Raises:
        TypeError: if there is a tracer among the leaves.
    """
    for what, tree in trees.items():
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree)):
            raise TypeError(_TRACED.format(what))
