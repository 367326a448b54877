"""The manifest: a run's tensors in order, and the flat range that they form.

It is not a tree: how names come from nested dicts and lists is `kedge.tree`'s matter. Invariant: offsets are the
running sum of element counts, names are unique, and the digest is a function of the rest.
"""

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import ml_dtypes
import numpy as np

from kedge.wire.errors import KedgeError

DTYPES: dict[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
"""The element types of tensors and streams, by the names that the digest uses."""

MAX_NAME_LENGTH = 512
_MAX_ELEMENT_COUNT = 1 << 62


class TensorSpec(NamedTuple):
    """One tensor of a manifest."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """A key of `DTYPES`: what its owner holds it in."""
    offset: int
    """Where it begins in the flat range, in elements."""

    @property
    def size(self) -> int:
        """Its number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Manifest:
    """The ordered tensor specs of a run. Build it with `from_specs`, which checks."""

    tensors: tuple[TensorSpec, ...]

    @classmethod
    def from_specs(cls, specs: Iterable[tuple[str, tuple[int, ...], str]]) -> "Manifest":
        """Lays out (name, shape, dtype) triples one after the other.

        Raises:
            KedgeError: MANIFEST_INVALID, or UNSUPPORTED_DTYPE.
        """
        tensors: list[TensorSpec] = []
        names: set[str] = set()
        offset = 0
        for name, shape, dtype in specs:
            _check_spec(name, dtype, names)
            names.add(name)
            tensors.append(TensorSpec(name, tuple(shape), dtype, offset))
            offset += tensors[-1].size
            if offset > _MAX_ELEMENT_COUNT:
                raise KedgeError("MANIFEST_INVALID", f"tensor {name!r} ends beyond 2**62 elements", tensor=name)
        if not offset:
            raise KedgeError(
                "MANIFEST_INVALID", "there are no parameters: give at least one non-empty tensor", tensor=""
            )
        return cls(tuple(tensors))

    @cached_property
    def element_count(self) -> int:
        """The length of the flat range, in elements."""
        return self.tensors[-1].offset + self.tensors[-1].size

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 over one line for each tensor; proto/kedge/v1/tensor.proto has the format."""
        lines = (f"{t.name}\t{t.dtype}\t{','.join(map(str, t.shape))}\t{t.offset}\n" for t in self.tensors)
        return hashlib.sha256("".join(lines).encode()).digest()

    def size_bytes(self, dtype: str) -> int:
        """The length of the flat range in a wire dtype, in bytes."""
        return self.element_count * DTYPES[dtype].itemsize


def _check_spec(name: str, dtype: str, names: set[str]) -> None:
    if not 0 < len(name) <= MAX_NAME_LENGTH or not name.isprintable():
        raise KedgeError(
            "MANIFEST_INVALID",
            f"{name[:80]!r} cannot name a tensor: use 1 to {MAX_NAME_LENGTH} printable characters",
            tensor=name[:80],
        )
    if name in names:
        raise KedgeError("MANIFEST_INVALID", f"two tensors are named {name!r}: rename one", tensor=name)
    if dtype not in DTYPES:
        raise unsupported_dtype(name, dtype)


def unsupported_dtype(name: str, dtype: object) -> KedgeError:
    """The error for a tensor of a dtype that cannot be held."""
    return KedgeError(
        "UNSUPPORTED_DTYPE",
        f"tensor {name!r} is {dtype}; float32, bfloat16 and float16 are held: convert it, as in x.astype('float32')",
        tensor=name,
        dtype=dtype,
    )
