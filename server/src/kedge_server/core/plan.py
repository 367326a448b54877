"""How a run's flat state is cut into blocks, each the work of one compiled call.

A block never crosses the border of a parameter group. Code is compiled for each length of a block, so lengths are of a
small set: a block's arrays may be longer than its range, and end in zeros.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from math import prod
from typing import NamedTuple

from kedge import optim
from kedge.optim.groups import assign
from kedge.wire.manifest import Manifest
from kedge_server.core.rules import Sees, rule_of

Shape = tuple[int, ...]

_LEAST_LENGTH = 4096
_MULTIPLE = 1 << 20
"""Lengths are powers of two up to it, and multiples of it beyond."""


class BlockPlan(NamedTuple):
    """A range of the flat state, in elements."""

    start: int
    stop: int
    group: int
    """0 for tensors of no group, i + 1 for the i-th group."""
    is_frozen: bool
    shape: Shape | None
    """Of the one tensor in it, where the rule looks at shapes."""

    @property
    def size(self) -> int:
        """The elements in it."""
        return self.stop - self.start

    @property
    def length(self) -> int:
        """Of its arrays: what is beyond its size are zeros."""
        if self.shape is not None:
            return self.size
        if self.size > _MULTIPLE:
            return -(-self.size // _MULTIPLE) * _MULTIPLE
        return max(_LEAST_LENGTH, 1 << (self.size - 1).bit_length())

    @property
    def is_padded(self) -> bool:
        """Whether there is something beyond its size."""
        return self.length > self.size


class Plan(NamedTuple):
    """What a run's updates are made by."""

    spec: optim.UpdateSpec
    blocks: tuple[BlockPlan, ...]
    block_elements: int
    """What it was cut with."""

    @property
    def element_count(self) -> int:
        """The elements of the state."""
        return self.blocks[-1].stop if self.blocks else 0

    @property
    def padded_count(self) -> int:
        """Where the arrays of the last block end, in elements."""
        return self.blocks[-1].start + self.blocks[-1].length if self.blocks else 0


def plan(
    spec: optim.UpdateSpec, manifest: Manifest, *, groups: Sequence[optim.Group] = (), block_elements: int
) -> Plan:
    """Cuts the state.

    Args:
        spec: the optimizer.
        manifest: the tensors.
        groups: the run's parameter groups.
        block_elements: the size of a block where the rule allows any; else every tensor is a block.

    Raises:
        ValueError: for a group that gets no tensor.
    """
    group_of = assign(groups, [tensor.name for tensor in manifest.tensors])
    sees = rule_of(spec.rule).sees
    blocks: list[BlockPlan] = []
    at = 0
    for group, members in groupby(zip(group_of, manifest.tensors, strict=True), key=lambda pair: pair[0]):
        is_frozen = group > 0 and groups[group - 1].frozen
        for size, shape in _cut([tuple(tensor.shape) for _, tensor in members], sees, block_elements):
            blocks.append(BlockPlan(at, at + size, group, is_frozen, shape))
            at += size
    assert at == manifest.element_count
    return Plan(spec, tuple(blocks), block_elements)


def _cut(shapes: Iterable[Shape], sees: Sees, block_elements: int) -> Iterator[tuple[int, Shape | None]]:
    """The sizes of the blocks of consecutive tensors, with the shape where it matters. None is empty."""
    if sees == "elements":
        left = sum(map(prod, shapes))
        while left > 0:
            yield min(left, block_elements), None
            left -= block_elements
    else:
        for shape in shapes:
            if prod(shape):
                yield prod(shape), shape if sees == "shapes" else None
