from collections import OrderedDict, defaultdict
from collections.abc import Mapping
from typing import NamedTuple

import ml_dtypes
import numpy as np
import pytest

from kedge import tree
from kedge.errors import InvalidInputError
from kedge.wire.manifest import Manifest

F32 = np.float32


class Pair(NamedTuple):
    first: object
    second: object


class Frozen(Mapping):
    def __init__(self, items):
        self._items = dict(items)

    def __getitem__(self, key):
        return self._items[key]

    def __iter__(self):
        return iter(self._items)

    def __len__(self):
        return len(self._items)


class Foreign:
    """What another framework's array looks like from here."""

    def __init__(self, values):
        self.values = np.asarray(values, F32)

    def __array__(self, dtype=None, copy=None):
        return self.values


class OfAGraph(Foreign):
    def __array__(self, dtype=None, copy=None):
        raise RuntimeError("detach it first")

    def detach(self):
        return Foreign(self.values)


def refill(structure):
    template = tree.Template.from_tree(structure)
    return template.fill(tree.named_leaves(structure))


def test_names_follow_keys_indices_and_fields_in_the_order_of_the_tree():
    leaves = tree.named_leaves({"z": [F32(1), (F32(2),)], "a": Pair(F32(3), {7: F32(4)})})

    assert [value.item() for value in leaves.values()] == [1, 2, 3, 4]
    assert list(leaves) == ["z.0", "z.1.0", "a.first", "a.second.7"]


@pytest.mark.parametrize(
    "structure",
    [
        {"a": F32(1), "b": {}},
        [F32(1), [], ()],
        (F32(1), [F32(2)]),
        Pair(F32(1), (F32(2),)),
        OrderedDict(b=F32(1), a=F32(2)),
        F32(1),
    ],
)
def test_containers_come_back_with_their_types(structure):
    filled = refill(structure)

    assert filled == structure
    assert type(filled) is (np.ndarray if isinstance(structure, F32) else type(structure))


def test_what_a_subclass_of_dict_adds_is_kept():
    state_dict = OrderedDict(w=F32(1))
    state_dict._metadata = {"version": 2}
    counted = defaultdict(list, w=F32(1))

    assert refill(state_dict)._metadata == {"version": 2}
    assert refill(counted).default_factory is list


def test_immutable_mappings_are_made_anew():
    filled = refill(Frozen({"a": F32(1)}))

    assert type(filled) is Frozen
    assert dict(filled) == {"a": 1}


def test_template_keeps_no_leaf():
    leaf = np.zeros(3, F32)
    skeleton = tree.Template.from_tree(OrderedDict(a=leaf))._skeleton

    assert skeleton == OrderedDict(a="a")


def test_arrays_of_other_frameworks_are_read_through_the_array_protocol():
    assert tree.named_leaves([Foreign([1, 2])])["0"].tolist() == [1, 2]


def test_arrays_that_are_part_of_a_graph_are_detached():
    assert tree.named_leaves([OfAGraph([1, 2])])["0"].tolist() == [1, 2]


@pytest.mark.parametrize("leaf", [1.0, 1, True, 1j, np.zeros(2), np.int32(1), np.zeros(2, ">f4")])
def test_other_dtypes_are_refused_by_name(leaf):
    with pytest.raises(InvalidInputError, match=r"'a\.b'") as error:
        tree.named_leaves({"a": {"b": leaf}})
    assert error.value.reason == "UNSUPPORTED_DTYPE"


@pytest.mark.parametrize("leaf", ["text", {1, 2}, object()])
def test_what_is_neither_container_nor_array_is_refused_by_name(leaf):
    with pytest.raises(InvalidInputError, match=r"'a\.0'") as error:
        tree.named_leaves({"a": [leaf]})
    assert error.value.reason == "UNSUPPORTED_STRUCTURE"


def test_missing_gradient_is_asked_for_as_zeros():
    with pytest.raises(InvalidInputError, match=r"'a\.0' is None: give zeros") as error:
        tree.named_leaves({"a": [None]})
    assert error.value.reason == "TENSOR_MISSING"


@pytest.mark.parametrize("key", ["", "a\nb", 1.5, None, ("a",)])
def test_keys_that_make_no_name_are_refused(key):
    with pytest.raises(InvalidInputError) as error:
        tree.named_leaves({"a": {key: F32(1)}})
    assert error.value.reason == "UNSUPPORTED_STRUCTURE"


def test_two_leaves_of_one_name_are_refused():
    with pytest.raises(InvalidInputError) as error:
        tree.named_leaves({"a": {"b": F32(1)}, "a.b": F32(2)})
    assert error.value.reason == "MANIFEST_INVALID"


def test_tree_without_leaves_makes_no_manifest():
    with pytest.raises(InvalidInputError) as error:
        tree.manifest_from_leaves(tree.named_leaves({"a": {}}))
    assert error.value.reason == "MANIFEST_INVALID"


def test_leaves_are_matched_by_name_and_come_in_manifest_order():
    manifest = Manifest.from_specs([("b", (2,), "float32"), ("a", (), "float16")])
    arrays = tree.arrays_in_order({"a": ml_dtypes.bfloat16(1), "b": np.array([2, 3], F32)}, manifest)

    assert [array.tolist() for array in arrays] == [[2, 3], 1]


def test_float32_tensors_are_views_of_the_flat_range_and_others_have_their_dtype():
    manifest = Manifest.from_specs([("a", (2, 2), "float32"), ("b", (1,), "bfloat16"), ("c", (), "float32")])
    flat = np.arange(6, dtype=F32)
    arrays = tree.split_flat(flat, manifest)

    assert {name: array.tolist() for name, array in arrays.items()} == {"a": [[0, 1], [2, 3]], "b": [4], "c": 5}
    assert arrays["b"].dtype == ml_dtypes.bfloat16
    assert [np.shares_memory(array, flat) for array in arrays.values()] == [True, False, True]
