"""Trees of arrays: from nested dicts, lists and tuples to the named tensors of a manifest, and back.

It knows no framework: a leaf is whatever NumPy can read as an array. Nested keys are joined by dots, list and tuple
items are named by their index, named tuples by their fields; a bare array is named "weights". Leaves are matched by
name, so the order of a gradient's keys does not matter.
"""

import copy
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import numpy as np

from kedge.wire.errors import KedgeError
from kedge.wire.manifest import DTYPES, Manifest, TensorSpec, unsupported_dtype

BARE_ARRAY_NAME = "weights"
"""The name of the one tensor of a tree that is itself an array."""

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Template:
    """The structure of a tree without its values: what pulled tensors are put back into."""

    def __init__(self, skeleton: Any) -> None:
        self._skeleton = skeleton

    @classmethod
    def from_tree(cls, tree: Any) -> "Template":
        """The structure of `tree`. It keeps no reference to the leaves."""
        return cls(_skeleton(tree, ""))

    @classmethod
    def flat(cls, manifest: Manifest) -> "Template":
        """A plain dict from tensor names, in manifest order."""
        return cls({spec.name: spec.name for spec in manifest.tensors})

    def fill(self, arrays: Mapping[str, np.ndarray]) -> Any:
        """A tree of this structure with the arrays as its leaves."""
        return _fill(self._skeleton, arrays)


def named_leaves(tree: Any) -> dict[str, np.ndarray]:
    """The leaves of a tree as arrays by name, in the tree's own order.

    Raises:
        KedgeError: UNSUPPORTED_STRUCTURE for what is no container and no array, UNSUPPORTED_DTYPE for other dtypes than
            float32, bfloat16 and float16, MANIFEST_INVALID for two leaves of one name.
    """
    arrays: dict[str, np.ndarray] = {}
    for name, leaf in _leaves(tree, ""):
        if name in arrays:
            raise KedgeError("MANIFEST_INVALID", f"two tensors are named {name!r}: rename one", tensor=name)
        arrays[name] = _as_array(name, leaf)
    return arrays


def manifest_from_leaves(arrays: Mapping[str, np.ndarray]) -> Manifest:
    """The manifest of named arrays, in their order.

    Raises:
        KedgeError: MANIFEST_INVALID if there are none.
    """
    return Manifest.from_specs((name, array.shape, _DTYPE_NAMES[array.dtype]) for name, array in arrays.items())


def arrays_in_order(tree: Any, manifest: Manifest) -> list[np.ndarray]:
    """The leaves of a tree in manifest order, matched by name and checked by shape.

    Raises:
        KedgeError: TENSOR_MISSING, TENSOR_UNEXPECTED, TENSOR_SHAPE_MISMATCH, and those of `named_leaves`.
    """
    arrays = named_leaves(tree)
    ordered = [_take(arrays, spec) for spec in manifest.tensors]
    for name in arrays:  # what was not taken
        raise KedgeError(
            "TENSOR_UNEXPECTED",
            f"the run has no tensor {name!r}: leave it out, or create a run that has it",
            tensor=name,
        )
    return ordered


def split_flat(flat: np.ndarray, manifest: Manifest) -> dict[str, np.ndarray]:
    """The tensors in a flat range by name, in their own shapes and dtypes.

    Args:
        flat: float32 of shape [manifest.element_count].
        manifest: how the range is divided.

    Returns:
        Views of `flat` for float32 tensors; copies for the 16-bit ones.
    """
    return {
        spec.name: flat[spec.offset : spec.offset + spec.size]
        .reshape(spec.shape)
        .astype(DTYPES[spec.dtype], copy=False)
        for spec in manifest.tensors
    }


def _take(arrays: dict[str, np.ndarray], spec: TensorSpec) -> np.ndarray:
    array = arrays.pop(spec.name, None)
    if array is None:
        raise KedgeError(
            "TENSOR_MISSING",
            f"tensor {spec.name!r} is missing: give every tensor of the run, zeros where there is no gradient",
            tensor=spec.name,
        )
    if array.shape != spec.shape:
        raise KedgeError(
            "TENSOR_SHAPE_MISMATCH",
            f"tensor {spec.name!r} has shape {array.shape}, the run's has {spec.shape}",
            tensor=spec.name,
            expected=spec.shape,
            got=array.shape,
        )
    return array


def _leaves(tree: Any, path: str) -> Iterator[tuple[str, Any]]:
    children = _children(tree, path)
    if children is None:
        yield path or BARE_ARRAY_NAME, tree
        return
    for name, child in children:
        yield from _leaves(child, name)


def _children(tree: Any, path: str) -> list[tuple[str, Any]] | None:
    """The named children of a container; None for a leaf."""
    if isinstance(tree, Mapping):
        return [(_join(path, key), child) for key, child in tree.items()]
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return [(_join(path, field), child) for field, child in zip(tree._fields, tree, strict=True)]
    if isinstance(tree, list | tuple):
        return [(_join(path, index), child) for index, child in enumerate(tree)]
    return None


def _join(path: str, key: object) -> str:
    if not isinstance(key, str | int) or key == "" or not str(key).isprintable():
        raise KedgeError(
            "UNSUPPORTED_STRUCTURE",
            f"{key!r} in {path or 'the tree'!r} cannot be a key: use printable text or whole numbers",
            tensor=path,
        )
    return f"{path}.{key}" if path else str(key)


def _as_array(name: str, leaf: Any) -> np.ndarray:
    if leaf is None:
        raise KedgeError("TENSOR_MISSING", f"{name!r} is None: give zeros where there is no gradient", tensor=name)
    if not (hasattr(leaf, "__array__") or isinstance(leaf, bool | int | float | complex)):
        raise KedgeError(
            "UNSUPPORTED_STRUCTURE",
            f"{name!r} is a {type(leaf).__name__}: a tree may hold dicts, lists, tuples and arrays",
            tensor=name,
        )
    try:
        # A torch parameter refuses to become an array as long as it is part of a graph.
        array = np.asarray(leaf.detach() if hasattr(leaf, "detach") else leaf)
    except (TypeError, ValueError, RuntimeError) as error:
        raise KedgeError(
            "UNSUPPORTED_STRUCTURE", f"{name!r} cannot be read as a NumPy array: {error}", tensor=name
        ) from error
    if array.dtype not in _DTYPE_NAMES:
        raise unsupported_dtype(name, array.dtype)
    return array


def _skeleton(tree: Any, path: str) -> Any:
    """The tree with each leaf's name in its place."""
    children = _children(tree, path)
    if children is None:
        return path or BARE_ARRAY_NAME
    return _rebuild(tree, [_skeleton(child, name) for name, child in children])


def _fill(skeleton: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    if isinstance(skeleton, str):
        return arrays[skeleton]
    children = skeleton.values() if isinstance(skeleton, Mapping) else skeleton
    return _rebuild(skeleton, [_fill(child, arrays) for child in children])


def _rebuild(container: Any, children: list[Any]) -> Any:
    """A container of the same type and keys with other children."""
    if isinstance(container, Mapping):
        return _rebuild_mapping(container, dict(zip(container, children, strict=True)))
    if hasattr(container, "_fields"):
        return type(container)(*children)
    return type(container)(children)


def _rebuild_mapping(container: Any, items: dict[Any, Any]) -> Any:
    if type(container) is dict:
        return items
    if not isinstance(container, MutableMapping):
        return type(container)(items)
    other = copy.copy(container)  # keeps what a subclass adds: a default factory, torch's _metadata
    other.update(items)
    return other
