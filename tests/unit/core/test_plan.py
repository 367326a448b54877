"""How a run's state is cut into blocks."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kedge import optim
from kedge.wire.manifest import Manifest
from kedge_server.core.plan import BlockPlan, plan

TENSORS = [("a.w", (4, 5)), ("a.b", (5,)), ("b.w", (10, 10)), ("b.b", (10,)), ("scale", ())]
MANIFEST = Manifest.from_specs([(name, shape, "float32") for name, shape in TENSORS])
ELEMENTWISE = optim.AdaBelief().spec()
NORMS = optim.Lamb().spec()
SHAPES = optim.Adafactor().spec()
BIASES = optim.Group("*.b", weight_decay=0.0)


def ranges(blocks: tuple[BlockPlan, ...]) -> list[tuple[int, int]]:
    return [(block.start, block.stop) for block in blocks]


def test_elementwise_rules_are_cut_without_a_look_at_tensors():
    blocks = plan(ELEMENTWISE, MANIFEST, block_elements=50).blocks

    assert ranges(blocks) == [(0, 50), (50, 100), (100, 136)]
    assert all(block.shape is None for block in blocks)


@pytest.mark.parametrize(("spec", "shapes"), [(NORMS, [None] * 5), (SHAPES, [shape for _, shape in TENSORS])])
def test_for_other_rules_every_tensor_is_a_block(spec, shapes):
    blocks = plan(spec, MANIFEST, block_elements=30).blocks

    assert ranges(blocks) == [(0, 20), (20, 25), (25, 125), (125, 135), (135, 136)]
    assert [block.shape for block in blocks] == shapes


@pytest.mark.parametrize("spec", [ELEMENTWISE, NORMS, SHAPES], ids=["elements", "norms", "shapes"])
def test_no_block_crosses_the_border_of_a_group(spec):
    blocks = plan(spec, MANIFEST, groups=[BIASES], block_elements=1000).blocks

    assert ranges(blocks) == [(0, 20), (20, 25), (25, 125), (125, 135), (135, 136)]
    assert [block.group for block in blocks] == [0, 1, 0, 1, 0]


def test_tensors_of_one_group_in_a_row_are_one_range():
    blocks = plan(ELEMENTWISE, MANIFEST, groups=[optim.Group("a.*")], block_elements=1000).blocks

    assert ranges(blocks) == [(0, 25), (25, 136)]


def test_a_tensor_is_of_the_first_group_that_takes_it():
    groups = [optim.Group(("b.*", "scale")), BIASES]

    assert [block.group for block in plan(ELEMENTWISE, MANIFEST, groups=groups, block_elements=1000).blocks] == [
        0,
        2,
        1,
    ]


def test_frozen_groups_are_frozen_in_their_blocks():
    groups = [optim.Group("a.*", frozen=True), optim.Group("b.w")]
    blocks = plan(ELEMENTWISE, MANIFEST, groups=groups, block_elements=1000).blocks

    assert [block.is_frozen for block in blocks] == [True, False, False]


def test_a_group_whose_tensors_are_all_taken_is_refused():
    with pytest.raises(ValueError, match=r"^groups has '\*\.b', which no tensor is left for"):
        plan(ELEMENTWISE, MANIFEST, groups=[optim.Group("*"), BIASES], block_elements=1000)


@given(
    shapes=st.lists(st.lists(st.integers(0, 5), max_size=3).map(tuple), max_size=8).map(lambda more: [(2,), *more]),
    block_elements=st.integers(1, 40),
    spec=st.sampled_from([ELEMENTWISE, NORMS, SHAPES]),
    is_grouped=st.booleans(),
)
def test_blocks_cover_the_state_once_and_in_order(shapes, block_elements, spec, is_grouped):
    manifest = Manifest.from_specs([(f"t{i}", shape, "float32") for i, shape in enumerate(shapes)])
    groups = [optim.Group("t[02468]")] if is_grouped else []
    blocks = plan(spec, manifest, groups=groups, block_elements=block_elements).blocks

    edges = [0, *(block.stop for block in blocks)]
    assert [block.start for block in blocks] == edges[:-1]
    assert edges[-1] == manifest.element_count
    assert all(0 < block.size <= block.length for block in blocks)
    if spec is ELEMENTWISE:
        assert all(block.size <= block_elements for block in blocks)
    else:
        assert [block.size for block in blocks] == [tensor.size for tensor in manifest.tensors if tensor.size]


@given(size=st.integers(1, 2**26))
def test_lengths_are_few_and_not_much_longer_than_what_they_hold(size):
    length = BlockPlan(0, size, 0, False, None).length

    assert size <= length <= max(4096, 2 * size)
    assert length % 2**20 == 0 or (length & (length - 1) == 0 and 4096 <= length < 2**20)
    assert BlockPlan(0, size, 0, False, (size,)).length == size
