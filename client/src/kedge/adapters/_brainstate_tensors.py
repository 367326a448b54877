"""The registered States of brainstate as named tensors: their leaves by name, their gradients, and the way back.

A State is known by its path in the tree that it was registered with, its leaves by the path inside its value; both
joined by dots make a tensor's name: the weight of a `Linear` at `("layers", 0, "weight")` is "layers.0.weight.weight".
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import brainstate
import jax
import jax.numpy as jnp
import numpy as np

from kedge.tree import BARE_ARRAY_NAME
from kedge.wire.errors import KedgeError

Path = tuple[Any, ...]
"""What to index a tree with, one level after the other. A level may be a tuple: a `FlattenedDict` has such keys."""


class Entry(NamedTuple):
    """A State, and where it stands."""

    path: Path
    state: brainstate.State[Any]


@dataclass(frozen=True)
class Tensors:
    """States in the order of their registration, each once."""

    entries: tuple[Entry, ...] = ()

    def merged(self, states: Any) -> "Tensors":
        """With those of another tree. A State that is there already keeps the path that it has.

        Raises:
            TypeError: for a leaf that is no State.
            KedgeError: MANIFEST_INVALID for two leaves of one name.
        """
        entries = {id(entry.state): entry for entry in self.entries}
        for entry in _entries(states):
            entries.setdefault(id(entry.state), entry)
        merged = Tensors(tuple(entries.values()))
        merged.arrays()
        return merged

    def select(self, states: Any) -> "Tensors":
        """Those of a tree alone, by the paths that they have here."""
        wanted = {id(entry.state) for entry in _entries(states)}
        return Tensors(tuple(entry for entry in self.entries if id(entry.state) in wanted))

    def without(self, states: Iterable[brainstate.State[Any]]) -> "Tensors":
        """All but these States."""
        left_out = {id(state) for state in states}
        return Tensors(tuple(entry for entry in self.entries if id(entry.state) not in left_out))

    def by_path(self) -> dict[Any, brainstate.State[Any]]:
        """The States by path; by its only level where it has but one, as in the tree that they came from."""
        return {path[0] if len(path) == 1 else path: state for path, state in self.entries}

    def arrays(self) -> dict[str, Any]:
        """The leaves by name.

        Raises:
            KedgeError: MANIFEST_INVALID for two leaves of one name.
        """
        named: dict[str, Any] = {}
        for path, state in self.entries:
            for name, leaf in _named_leaves(path, state.value):
                if name in named:
                    raise KedgeError("MANIFEST_INVALID", f"two weights are named {name!r}: rename one", tensor=name)
                named[name] = leaf
        return named

    def gradients(self, grads: Any) -> dict[str, Any]:
        """The gradient of every leaf by name: zeros where `grads` has none. What was never registered is left out.

        Args:
            grads: indexed as the tree of States was, with a value of the State's structure in each State's place.

        Raises:
            TypeError: for gradients under a transformation, which have no values yet.
            ValueError: if there is none for any of the States.
        """
        found = [_find(grads, path) for path, _ in self.entries]
        if all(value is None for value in found):
            paths = ", ".join(str(key) for key in list(self.by_path())[:3])
            raise ValueError(
                f"grads has none of the registered weights, as {paths}: "
                "compute it with brainstate.transform.grad(loss, states) over the states that were registered"
            )
        named: dict[str, Any] = {}
        for (path, state), value in zip(self.entries, found, strict=True):
            own = dict(_named_leaves(path, value)) if value is not None else {}
            zeros = {name: leaf for name, leaf in _named_leaves(path, state.value) if name not in own}
            named |= own | {name: np.zeros(leaf.shape, leaf.dtype) for name, leaf in zeros.items()}
        _refuse_tracers(named)
        return named

    def write(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Puts arrays into the States, on the devices and in the dtypes of what they hold."""
        for path, state in self.entries:
            leaves = [_placed(arrays[name], leaf) for name, leaf in _named_leaves(path, state.value)]
            state.value = jax.tree.unflatten(jax.tree.structure(state.value), leaves)


def _entries(states: Any) -> Iterator[Entry]:
    flat, _ = jax.tree_util.tree_flatten_with_path(states, is_leaf=lambda node: isinstance(node, brainstate.State))
    for keys, state in flat:
        path = tuple(_index(key) for key in keys)
        if not isinstance(state, brainstate.State):
            raise TypeError(
                f"{_name(path) or 'what was given'} is a {type(state).__name__}: all weights must be brainstate.State, "
                "as in register_trainable_weights(model.states(brainstate.ParamState))"
            )
        yield Entry(path, state)


def _named_leaves(path: Path, value: Any) -> Iterator[tuple[str, Any]]:
    for inner, leaf in jax.tree_util.tree_flatten_with_path(value)[0]:
        yield _name((*path, *(_index(key) for key in inner))) or BARE_ARRAY_NAME, leaf


def _index(key: Any) -> Any:
    """What one of JAX's keys indexes with."""
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return getattr(key, attribute)
    return key


def _name(path: Path) -> str:
    parts = [part for level in path for part in (level if isinstance(level, tuple) else (level,))]
    return ".".join(map(str, parts))


def _find(tree: Any, path: Path) -> Any:
    for key in path:
        try:
            tree = tree[key]
        except (KeyError, IndexError, TypeError):
            return None
    return tree


def _refuse_tracers(named: Mapping[str, Any]) -> None:
    if any(isinstance(leaf, jax.core.Tracer) for leaf in named.values()):
        raise TypeError(
            "grads has no values yet: update() was called inside jit or another transformation, where nothing can be "
            "sent; transform the function that computes the gradient, and call update() outside of it"
        )


def _placed(array: np.ndarray, like: Any) -> jax.Array:
    if not isinstance(like, jax.Array):
        return jnp.asarray(array, dtype=like.dtype)
    array = array.astype(like.dtype, copy=False)
    # What is not committed to its device may meet arrays of another one, and has to stay so.
    return cast(jax.Array, jax.device_put(array, like.sharding) if like.committed else jnp.asarray(array))
