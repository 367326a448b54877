"""How a run's flat state is cut into blocks, each the work of one compiled call.

A block never crosses the border of a parameter group. Rules that look at whole tensors get blocks of whole tensors.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from math import prod
from typing import NamedTuple

from kedge import optim
from kedge.optim.groups import assign
from kedge.wire.manifest import Manifest
from kedge_server.core.rules import rule_of

Shape = tuple[int, ...]


class BlockPlan(NamedTuple):
    """A range of the flat state, in elements."""

    start: int
    stop: int
    group: int
    """0 for tensors of no group, i + 1 for the i-th group."""
    is_frozen: bool
    shapes: tuple[Shape, ...] | None
    """Of the tensors in it; None where the rule does not look at them."""


class Plan(NamedTuple):
    """What a run's updates are made by."""

    spec: optim.UpdateSpec
    blocks: tuple[BlockPlan, ...]


def plan(
    spec: optim.UpdateSpec, manifest: Manifest, *, groups: Sequence[optim.Group] = (), block_elements: int
) -> Plan:
    """Cuts the state.

    Args:
        spec: the optimizer.
        manifest: the tensors.
        groups: the run's parameter groups.
        block_elements: the length of a block where the rule allows any; else as many whole tensors as fit in, or one.

    Raises:
        ValueError: for a group that gets no tensor.
    """
    names = [tensor.name for tensor in manifest.tensors]
    group_of = assign(groups, names)
    cut = _ranges if rule_of(spec.rule).is_elementwise else _whole_tensors
    blocks: list[BlockPlan] = []
    at = 0
    for group, members in groupby(zip(group_of, manifest.tensors, strict=True), key=lambda pair: pair[0]):
        is_frozen = group > 0 and groups[group - 1].frozen
        for size, shapes in cut([tuple(tensor.shape) for _, tensor in members], block_elements):
            blocks.append(BlockPlan(at, at + size, group, is_frozen, shapes))
            at += size
    assert at == manifest.element_count
    return Plan(spec, tuple(blocks))


def _ranges(shapes: Iterable[Shape], block_elements: int) -> Iterator[tuple[int, None]]:
    left = sum(prod(shape) for shape in shapes)
    while left > 0:
        size = min(left, block_elements)
        yield size, None
        left -= size


def _whole_tensors(shapes: Iterable[Shape], block_elements: int) -> Iterator[tuple[int, tuple[Shape, ...]]]:
    held: list[Shape] = []
    size = 0
    for shape in shapes:
        if held and size + prod(shape) > block_elements:
            yield size, tuple(held)
            held, size = [], 0
        held.append(shape)
        size += prod(shape)
    if held:
        yield size, tuple(held)
