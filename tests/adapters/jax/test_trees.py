"""What tensors a pytree becomes, and that it comes back as it was."""

import collections
import dataclasses
from typing import Any, NamedTuple

import equinox as eqx
import flax.core
import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import kedge
import kedge.adapters.jax
from kedge import optim, tree
from kedge.errors import InvalidInputError


class Boxed(NamedTuple):
    value: Any


class Layer(NamedTuple):
    weight: Any
    bias: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Model:
    second: Any
    first: Any


@jax.tree_util.register_pytree_node_class
class Opaque:
    """Registered without keys."""

    def __init__(self, *parts: Any) -> None:
        self.parts = parts

    def tree_flatten(self) -> tuple[Any, None]:
        return self.parts, None

    @classmethod
    def tree_unflatten(cls, _: None, parts: Any) -> "Opaque":
        return cls(*parts)


class Network(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(3, 4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)])


def ones(*shape: int) -> jax.Array:
    return jnp.ones(shape, jnp.float32)


def linen_params() -> Any:
    model = flax.linen.Sequential([flax.linen.Dense(3), flax.linen.Dense(2)])
    return model.init(jax.random.key(0), ones(1, 4))["params"]


def equinox_params() -> Any:
    return eqx.filter(eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0)), eqx.is_inexact_array)


def nnx_params() -> nnx.State[Any, Any]:
    return nnx.state(Network(nnx.Rngs(0)), nnx.Param)


LINEN = ["layers_0.kernel", "layers_0.bias", "layers_1.kernel", "layers_1.bias"]
EQUINOX = ["layers.0.weight", "layers.0.bias", "layers.1.weight", "layers.1.bias"]
NNX = [
    "layers.0.bias",
    "layers.0.kernel",
    "layers.1.bias",
    "layers.1.kernel",
    "norm.bias",
    "norm.scale",
]
TREES = {
    "a dict, in the order of insertion": (
        lambda: {"z": ones(1), "a": {"y": ones(2), "b": ones(3)}},
        ["z", "a.y", "a.b"],
    ),
    "an ordered dict": (lambda: collections.OrderedDict(z=ones(1), a=ones(2)), ["z", "a"]),
    "lists and tuples": (lambda: [ones(1), (ones(2), [ones(3)])], ["0", "1.0", "1.1.0"]),
    "a named tuple": (lambda: Layer(ones(2), ones(1)), ["weight", "bias"]),
    "a named tuple of one value": (lambda: {"x": Boxed(ones(2))}, ["x.value"]),
    "a dataclass": (lambda: Model(first=ones(1), second=ones(2)), ["second", "first"]),
    "an opaque node": (lambda: {"o": Opaque(ones(1), ones(2))}, ["o.0", "o.1"]),
    "whole numbers as keys": (lambda: {2: ones(1), 1: ones(2)}, ["2", "1"]),
    "None is structure": (lambda: {"w": ones(1), "none": None, "l": [None, ones(2)]}, ["w", "l.1"]),
    "a bare array": (lambda: ones(3), ["weights"]),
    "a NumPy array": (lambda: {"w": np.ones(2, np.float32)}, ["w"]),
    "Flax Linen": (linen_params, LINEN),
    "Flax Linen, frozen": (lambda: flax.core.freeze(linen_params()), LINEN),
    "Flax NNX": (nnx_params, NNX),
    "Equinox": (equinox_params, EQUINOX),
}


def new_run(client: kedge.Client, params: Any, name: str = "r", **options: Any) -> kedge.adapters.jax.JaxRun:
    defaults = {"optimizer": optim.SGD(lr=1.0), "aggregation": kedge.Synchronous(quorum=1)}
    return kedge.adapters.jax.create_run(client, name, params=params, **(defaults | options))


def test_named_tuple_of_one_value_is_the_same_run_to_numpy(fake_client):
    new_run(fake_client, {"x": Boxed(ones(2)), "y": ones(3)})
    like = {"x": Boxed(np.ones(2, np.float32)), "y": np.ones(3, np.float32)}
    assert fake_client.get_run("r", like=like).pull()["x"].value.tolist() == [1, 1]


def names(run: kedge.adapters.jax.JaxRun) -> list[str]:
    return [spec.name for spec in run.run.manifest.tensors]


@pytest.mark.parametrize(("make", "expected"), TREES.values(), ids=TREES)
def test_tensors_are_named_by_the_keys_on_the_way_to_them(fake_client, make, expected):
    assert names(new_run(fake_client, make())) == expected


@pytest.mark.parametrize(("make", "expected"), TREES.values(), ids=TREES)
def test_what_comes_back_has_the_structure_and_the_values_of_the_params(fake_client, make, expected):
    params = make()
    pulled = new_run(fake_client, params).pull()

    assert jax.tree.structure(pulled) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, pulled, params)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(pulled))


@pytest.mark.parametrize(
    "make",
    [
        lambda array: {"z": array(2), "a": [array(3), {"y": array(1), "b": array(4)}]},
        lambda array: Layer(array(2), (array(1), array(3))),
        lambda array: array(5),
    ],
)
def test_manifest_is_that_of_the_sdk_where_the_sdk_knows_the_containers(fake_client, make):
    of_sdk = tree.manifest_from_leaves(tree.named_leaves(make(lambda n: np.ones(n, np.float32))))

    assert new_run(fake_client, make(ones)).run.manifest.digest == of_sdk.digest


def test_nnx_state_and_its_pure_dict_are_one_manifest(fake_client):
    state = nnx_params()

    assert names(new_run(fake_client, nnx.to_pure_dict(state), "dict")) == names(new_run(fake_client, state, "state"))


def test_leaves_keep_their_dtypes(fake_client):
    params = {"a": jnp.ones(2, jnp.bfloat16), "b": jnp.ones(2, jnp.float16), "c": jnp.ones(2, jnp.float32)}
    pulled = new_run(fake_client, params).pull()

    assert {name: leaf.dtype.name for name, leaf in pulled.items()} == {"a": "bfloat16", "b": "float16", "c": "float32"}


def test_a_run_is_opened_like_shapes_and_in_other_dtypes(fake_client):
    new_run(fake_client, {"w": ones(2, 3)})
    like = jax.eval_shape(lambda: {"w": jnp.zeros((2, 3), jnp.bfloat16)})
    run = kedge.adapters.jax.get_run(fake_client, "r", like=like)
    with run.join() as worker:
        assert worker.pull()["w"].dtype == jnp.bfloat16
        pulled = worker.step({"w": jnp.full((2, 3), 0.25, jnp.bfloat16)})

    np.testing.assert_array_equal(pulled["w"].astype(jnp.float32), np.full((2, 3), 0.75, np.float32))


def test_a_run_is_not_opened_like_what_does_not_fit(fake_client):
    new_run(fake_client, {"w": ones(2)})
    for like, reason in (
        ({"w": ones(3)}, "TENSOR_SHAPE_MISMATCH"),
        ({"v": ones(2)}, "TENSOR_MISSING"),
        ({"w": ones(2), "v": ones(2)}, "TENSOR_UNEXPECTED"),
    ):
        with pytest.raises(InvalidInputError) as error:
            kedge.adapters.jax.get_run(fake_client, "r", like=like)
        assert error.value.reason == reason


@pytest.mark.parametrize(
    ("leaf", "reason", "advice"),
    [
        (jnp.arange(3), "UNSUPPORTED_DTYPE", "eqx.partition"),
        (jnp.array(True), "UNSUPPORTED_DTYPE", "nnx.Param"),
        (jax.random.key(0), "UNSUPPORTED_DTYPE", "eqx.partition"),
        (np.zeros(3), "UNSUPPORTED_DTYPE", "astype"),
        (jnp.zeros(3, jnp.complex64), "UNSUPPORTED_DTYPE", "astype"),
        (jax.nn.relu, "UNSUPPORTED_STRUCTURE", "eqx.partition"),
        (1.0, "UNSUPPORTED_STRUCTURE", "arrays"),
        ("text", "UNSUPPORTED_STRUCTURE", "arrays"),
    ],
)
def test_leaf_that_cannot_be_trained_is_refused_with_the_way_to_leave_it_out(fake_client, leaf, reason, advice):
    with pytest.raises(InvalidInputError, match=advice) as error:
        new_run(fake_client, {"layer": {"x": leaf}, "w": ones(1)})

    assert (error.value.reason, error.value.metadata["tensor"]) == (reason, "layer.x")
    assert fake_client.list_runs() == []


def test_two_leaves_of_one_name_are_refused(fake_client):
    with pytest.raises(InvalidInputError, match=r"a\.b") as error:
        new_run(fake_client, {"a.b": ones(1), "a": {"b": ones(1)}})

    assert error.value.reason == "MANIFEST_INVALID"


@pytest.mark.parametrize("key", [(1, 2), 1.5, "", "a\n"])
def test_key_that_cannot_be_part_of_a_name_is_refused(fake_client, key):
    with pytest.raises(InvalidInputError, match="cannot be a key") as error:
        new_run(fake_client, {key: ones(1)})

    assert error.value.reason == "UNSUPPORTED_STRUCTURE"


def test_params_without_values_make_no_run(fake_client):
    with pytest.raises(TypeError, match="ShapeDtypeStruct"):
        new_run(fake_client, jax.eval_shape(lambda: {"w": ones(1)}))
    with pytest.raises(TypeError, match=r"'w' is traced.*outside"):
        jax.jit(lambda w: new_run(fake_client, {"w": w}).pull())(ones(1))
    assert fake_client.list_runs() == []


def test_array_that_is_spread_over_processes_is_refused_with_what_to_do(fake_client):
    class Spread:
        """What a global array of several processes says of itself in each of them."""

        dtype, shape, is_fully_addressable = np.dtype(np.float32), (2,), False

    run = new_run(fake_client, {"w": ones(2)})
    with run.join() as worker:
        worker.pull()
        with pytest.raises(TypeError, match=r"'w' is spread over several processes: gather it first"):
            worker.step({"w": Spread()})
    assert run.run.status().step == 0
