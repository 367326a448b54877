"""Registered States: their names, what is written into them, what is sent of them, and what is refused."""

import subprocess
import sys
import threading
from typing import Any

import brainstate
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import kedge
from kedge import optim
from kedge.adapters import brainstate as kb

from .conftest import by_name, weights_of


def sgd(lr: float = 1.0, **target: Any) -> kb.Lookahead:
    """Plain SGD: a Lookahead whose slow weights go all the way, with a rate of 1."""
    return kb.Lookahead(optim.SGD(lr=lr), alpha=1.0, **target)


def states(**values: Any) -> dict[str, brainstate.ParamState]:
    return {name: brainstate.ParamState(jnp.asarray(value, jnp.float32)) for name, value in values.items()}


def test_tensors_are_named_by_their_paths_joined_by_dots(client: kedge.Client, model: Any) -> None:
    with sgd(client=client).register_trainable_weights(weights_of(model)) as optimizer:
        assert {spec.name: spec.shape for spec in optimizer.run.manifest.tensors} == {
            "layers.0.weight.bias": (3,),
            "layers.0.weight.weight": (4, 3),
            "layers.2.weight.bias": (2,),
            "layers.2.weight.weight": (3, 2),
        }


def test_a_tree_of_states_and_values_of_any_structure_can_be_registered(client: kedge.Client) -> None:
    tree = {
        "a": [brainstate.ParamState((jnp.zeros(2), {"x": jnp.ones(())}))],
        "b": {"c": brainstate.ParamState(jnp.ones(3))},
    }
    grads = {"a": [(jnp.ones(2), {"x": jnp.ones(())})], "b": {"c": jnp.array([1.0, 2.0, 3.0])}}
    with sgd(client=client).register_trainable_weights(tree) as optimizer:
        assert [spec.name for spec in optimizer.run.manifest.tensors] == ["a.0.0", "a.0.1.x", "b.c"]
        optimizer.update(grads)
    assert jax.tree.map(lambda leaf: leaf.tolist(), tree["a"][0].value) == ([-1.0, -1.0], {"x": 0.0})
    assert tree["b"]["c"].value.tolist() == [0.0, -1.0, -2.0]


def test_a_nested_dict_of_states_and_its_gradients_are_taken(client: kedge.Client) -> None:
    layer = brainstate.nn.Linear(2, 1)
    layer.weight.value = {"weight": jnp.ones((2, 1)), "bias": jnp.zeros(1)}
    nested = weights_of(layer).to_nest()
    with sgd(client=client).register_trainable_weights(nested) as optimizer:
        optimizer.update(brainstate.transform.grad(lambda: jnp.sum(layer(jnp.array([[2.0, 3.0]]))), nested)())
    assert layer.weight.value["weight"].tolist() == [[-1.0], [-2.0]]
    assert layer.weight.value["bias"].tolist() == [-1.0]


def test_one_state_alone_can_be_registered(client: kedge.Client) -> None:
    state = brainstate.ParamState(jnp.array([3.0]))
    with sgd(client=client).register_trainable_weights(state) as optimizer:
        assert [spec.name for spec in optimizer.run.manifest.tensors] == ["weights"]
        optimizer.update(jnp.array([1.0]))
    assert state.value.tolist() == [2.0]


def test_update_takes_a_step_and_step_is_the_same(client: kedge.Client) -> None:
    weights = states(w=[3.0])
    with sgd(client=client).register_trainable_weights(weights) as optimizer:
        assert optimizer.step_count.value == 0
        assert optimizer.update({"w": jnp.array([1.0])}) is None
        optimizer.step({"w": jnp.array([1.0])}, loss=jnp.float32(0.25), example_count=7)
        assert optimizer.step_count.value == 2
        assert optimizer.run.status().loss == 0.25
    assert weights["w"].value.tolist() == [1.0]


def test_registering_overwrites_the_weights_with_those_of_the_run(any_client: kedge.Client, name: str) -> None:
    first, second = states(w=[3.0, 4.0]), states(w=[-8.0, 0.5])
    with sgd(client=any_client, run=name) as early, sgd(client=any_client, run=f"runs/{name}") as late:
        early.register_trainable_weights(first)
        early.update({"w": jnp.ones(2)})
        late.register_trainable_weights(second)
        assert second["w"].value.tolist() == [2.0, 3.0]
        assert late.step_count.value == 1
        assert early.run.name == late.run.name == f"runs/{name}"


def test_weights_without_a_gradient_stay_where_they_are(client: kedge.Client) -> None:
    weights = states(w=[3.0], frozen=[5.0])
    with sgd(client=client).register_trainable_weights(weights) as optimizer:
        optimizer.update({"w": jnp.array([1.0]), "not_registered": jnp.array([9.0])})
        optimizer.update({"w": None, "frozen": jnp.array([2.0])})
    assert (weights["w"].value.tolist(), weights["frozen"].value.tolist()) == ([2.0], [3.0])


def test_a_leaf_without_a_gradient_stays_where_it_is(client: kedge.Client) -> None:
    state = brainstate.ParamState({"weight": jnp.array([3.0]), "bias": jnp.array([5.0])})
    with sgd(client=client).register_trainable_weights({"layer": state}) as optimizer:
        optimizer.update({"layer": {"weight": jnp.array([1.0]), "bias": None}})
    assert {leaf: value.tolist() for leaf, value in state.value.items()} == {"weight": [2.0], "bias": [5.0]}


def test_a_state_under_two_keys_is_one_tensor_and_moves_once(client: kedge.Client) -> None:
    shared = brainstate.ParamState(jnp.array([3.0]))
    weights = {"encoder": shared, "decoder": shared}

    def loss() -> Any:
        return jnp.sum(weights["encoder"].value * weights["decoder"].value)

    with sgd(lr=0.25, client=client).register_trainable_weights(weights) as optimizer:
        assert [spec.name for spec in optimizer.run.manifest.tensors] == ["decoder"]
        optimizer.update(brainstate.transform.grad(loss, weights)())
    assert shared.value.tolist() == [3.0 - 0.25 * 6.0]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_a_state_keeps_its_dtype(client: kedge.Client, dtype: Any) -> None:
    state = brainstate.ParamState(jnp.array([1.5, -2.0], dtype))
    with sgd(client=client).register_trainable_weights({"w": state}) as optimizer:
        optimizer.update({"w": jnp.array([0.5, 1.0], dtype)})
    assert state.value.dtype == dtype
    assert state.value.tolist() == [1.0, -3.0]


def test_a_state_keeps_its_dtype_where_the_run_has_another(client: kedge.Client, name: str) -> None:
    run = client.create_run(
        name,
        params={"w": np.array([1.0], ml_dtypes.bfloat16)},
        optimizer=optim.Lookahead(optim.SGD(lr=1.0), alpha=1.0),
        aggregation=kedge.Synchronous(quorum=1),
    )
    weights = states(w=[8.0])
    with sgd(run=run).register_trainable_weights(weights):
        assert weights["w"].value.dtype == jnp.float32
        assert weights["w"].value.tolist() == [1.0]


def test_a_quantity_keeps_its_unit(client: kedge.Client) -> None:
    saiunit = pytest.importorskip("saiunit")
    state = brainstate.ParamState(jnp.array([3.0]) * saiunit.mV)
    with sgd(client=client).register_trainable_weights({"v": state}) as optimizer:
        optimizer.update({"v": jnp.array([1.0]) / saiunit.mV})
    assert state.value.unit == saiunit.mV
    assert state.value.mantissa.tolist() == [2.0]


PLACEMENT = """
import brainstate, jax, jax.numpy as jnp, kedge
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from kedge import optim, testing
from kedge.adapters import brainstate as kb

devices = jax.devices()
assert len(devices) == 4
halves = NamedSharding(Mesh(devices[:2], "x"), PartitionSpec("x"))
values = {
    "third": jax.device_put(jnp.ones(4), devices[2]),
    "halves": jax.device_put(jnp.ones(4), halves),
    "anywhere": jnp.ones(4),
}
states = {name: brainstate.ParamState(value) for name, value in values.items()}
with testing.FakeServer() as server, kedge.connect(server.address) as client:
    with kb.Lookahead(optim.SGD(lr=1.0), client=client).register_trainable_weights(states) as optimizer:
        optimizer.update({name: 2 * state.value for name, state in states.items()})
for name, state in states.items():
    assert state.value.tolist() == [-1.0] * 4, state
    assert state.value.sharding == values[name].sharding, state.value.sharding
    assert state.value.committed == values[name].committed, name
"""


def test_a_state_stays_on_its_devices() -> None:
    environment = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    finished = subprocess.run(
        [sys.executable, "-c", PLACEMENT], env=environment, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr


@pytest.mark.parametrize("transform", [jax.jit, brainstate.transform.jit, jax.grad], ids=["jit", "state_jit", "grad"])
def test_update_inside_a_transformation_is_refused(client: kedge.Client, transform: Any) -> None:
    weights = states(w=[3.0])
    with sgd(client=client).register_trainable_weights(weights) as optimizer:

        def train(x: Any) -> Any:
            optimizer.update({"w": x * jnp.ones(1)})
            return x

        with pytest.raises(TypeError, match=r"grads has no values yet: .*call update\(\) outside"):
            transform(train)(jnp.float32(1.0))
        assert optimizer.step_count.value == 0
        optimizer.update({"w": jnp.array([1.0])})
    assert weights["w"].value.tolist() == [2.0]


def test_a_gradient_can_be_computed_under_jit(client: kedge.Client, model: Any) -> None:
    inputs = jnp.ones((2, 4))

    @brainstate.transform.jit
    def gradient() -> Any:
        return brainstate.transform.grad(lambda: jnp.sum(model(inputs)), weights_of(model))()

    before = by_name(weights_of(model))
    with sgd(client=client).register_trainable_weights(weights_of(model)) as optimizer:
        optimizer.update(gradient())
    # The sum over two rows: the last bias has a gradient of 2.
    after = by_name(weights_of(model))
    np.testing.assert_allclose(after["layers.2.weight.bias"], before["layers.2.weight.bias"] - 2, rtol=1e-6)


def test_before_registration_there_is_nothing_to_update(client: kedge.Client) -> None:
    optimizer = sgd(client=client)
    for use in (lambda: optimizer.update({}), optimizer.pull, optimizer.state_dict, lambda: optimizer.run):
        with pytest.raises(ValueError, match="register_trainable_weights must be called first"):
            use()
    optimizer.close()


def test_what_is_no_state_is_refused(client: kedge.Client) -> None:
    optimizer = sgd(client=client)
    with pytest.raises(TypeError, match=r"layer\.w is a ArrayImpl: all weights must be brainstate\.State"):
        optimizer.register_trainable_weights({"layer": {"w": jnp.ones(2)}})
    assert client.list_runs() == []


def test_an_empty_tree_is_refused(client: kedge.Client) -> None:
    with pytest.raises(kedge.KedgeError) as caught:
        sgd(client=client).register_trainable_weights({})
    assert caught.value.reason == "MANIFEST_INVALID"


def test_two_weights_of_one_name_are_refused(client: kedge.Client) -> None:
    with pytest.raises(kedge.KedgeError, match=r"'a\.b'") as caught:
        sgd(client=client).register_trainable_weights({"a.b": states(x=1)["x"], "a": states(b=1)})
    assert caught.value.reason == "MANIFEST_INVALID"
    assert client.list_runs() == []


@pytest.mark.parametrize("value", [np.arange(3), np.ones(3)], ids=["int64", "float64"])
def test_other_dtypes_are_refused(client: kedge.Client, value: np.ndarray) -> None:
    with pytest.raises(kedge.KedgeError, match="'count'") as caught:
        sgd(client=client).register_trainable_weights({"count": brainstate.ParamState(value)})
    assert caught.value.reason == "UNSUPPORTED_DTYPE"
    assert client.list_runs() == []


def test_gradients_of_other_weights_are_refused(client: kedge.Client) -> None:
    with sgd(client=client).register_trainable_weights(states(w=[1.0])) as optimizer:
        with pytest.raises(ValueError, match="grads has none of the registered weights, as w: "):
            optimizer.update({"v": jnp.ones(1)})
        with pytest.raises(kedge.KedgeError) as caught:
            optimizer.update({"w": jnp.ones(2)})
        assert caught.value.reason == "TENSOR_SHAPE_MISMATCH"
        with pytest.raises(kedge.KedgeError) as caught:
            optimizer.update({"w": {"inner": jnp.ones(1)}})
        assert caught.value.reason == "TENSOR_UNEXPECTED"
        assert optimizer.run.status().step == 0


def test_a_gradient_that_is_not_finite_is_left_out(client: kedge.Client) -> None:
    weights = states(w=[3.0])
    with sgd(client=client).register_trainable_weights(weights) as optimizer:
        optimizer.update({"w": jnp.array([jnp.nan])})
        assert weights["w"].value.tolist() == [3.0]
        assert optimizer.step_count.value == 0


def test_slow_weights_are_pulled_to_evaluate_and_no_gradient_is_taken_of_them(client: kedge.Client) -> None:
    weights = states(w=[3.0])
    optimizer = kb.Lookahead(optim.SGD(lr=1.0), sync_period=2, alpha=0.5, client=client)
    with optimizer.register_trainable_weights(weights):
        optimizer.update({"w": jnp.ones(1)})
        assert weights["w"].value.tolist() == [2.0]
        optimizer.pull("slow")
        assert weights["w"].value.tolist() == [3.0]
        with pytest.raises(ValueError, match="the weights are the slow ones: pull"):
            optimizer.update({"w": jnp.ones(1)})
        optimizer.pull()
        optimizer.update({"w": jnp.ones(1)})
        assert weights["w"].value.tolist() == [2.0]  # 3 -> 2 -> 1 -> lookahead sync -> 2


def test_without_lookahead_there_are_no_slow_weights(client: kedge.Client) -> None:
    with kb.AdaBelief(client=client).register_trainable_weights(states(w=[3.0])) as optimizer:
        with pytest.raises(kedge.KedgeError) as caught:
            optimizer.pull("slow")
        assert caught.value.reason == "NO_SLOW_WEIGHTS"


def test_a_closed_optimizer_has_no_lease_and_can_register_again(client: kedge.Client) -> None:
    weights = states(w=[3.0])
    with sgd(client=client).register_trainable_weights(weights) as optimizer:
        run = optimizer.run
        optimizer.update({"w": jnp.ones(1)})
    optimizer.close()
    assert run.status().workers == ()
    with pytest.raises(ValueError, match="register_trainable_weights must be called first"):
        optimizer.update({"w": jnp.ones(1)})
    with optimizer.register_trainable_weights(weights):
        optimizer.update({"w": jnp.ones(1)})
    assert weights["w"].value.tolist() == [1.0]
    assert run.status().step == 2


def test_registering_twice_changes_nothing(client: kedge.Client) -> None:
    weights = states(w=[3.0])
    with sgd(client=client).register_trainable_weights(weights) as optimizer:
        worker = optimizer.state_dict()["worker"]
        optimizer.update({"w": jnp.ones(1)})
        optimizer.register_trainable_weights(weights)
        assert optimizer.state_dict() == {
            "run": optimizer.run.name,
            "worker": worker,
            "step_count": 1,
            "lr": 1.0,
            "base_lr": 1.0,
        }


def test_weights_may_be_registered_in_parts_until_the_run_is_in_use(client: kedge.Client) -> None:
    first, second = states(a=[1.0]), states(b=[2.0])
    with sgd(client=client).register_trainable_weights(first) as optimizer:
        optimizer.register_trainable_weights(second)
        optimizer.update({"a": jnp.ones(1), "b": jnp.ones(1)})
        assert (first["a"].value.tolist(), second["b"].value.tolist()) == ([0.0], [1.0])
        with pytest.raises(ValueError, match="is in use, and its tensors and groups were fixed"):
            optimizer.register_trainable_weights(states(c=[3.0]))
        optimizer.update({"a": jnp.ones(1), "b": jnp.ones(1)})
        assert (first["a"].value.tolist(), second["b"].value.tolist()) == ([-1.0], [0.0])


def test_two_workers_average_their_gradients(any_client: kedge.Client, name: str) -> None:
    mine, others = states(w=[3.0]), states(w=[-1.0])
    run = any_client.create_run(
        name,
        params=kb.params(mine),
        optimizer=optim.Lookahead(optim.SGD(lr=1.0), alpha=1.0),
        aggregation=kedge.Synchronous(quorum=2),
    )
    with sgd(run=run).register_trainable_weights(mine) as one, sgd(run=run).register_trainable_weights(others) as two:
        thread = threading.Thread(target=two.update, args=({"w": jnp.array([1.0])},), kwargs={"example_count": 3})
        thread.start()
        one.update({"w": jnp.array([5.0])}, example_count=1)
        thread.join()
    # (3 * 1 + 1 * 5) / 4 = 2
    assert mine["w"].value.tolist() == others["w"].value.tolist() == [1.0]


def test_a_gradient_that_came_too_late_is_left_out_and_the_newer_weights_are_taken(
    client: kedge.Client, name: str
) -> None:
    fast, slow = states(w=[3.0]), states(w=[3.0])
    with sgd(client=client, run=name) as one, sgd(client=client, run=name) as two:
        one.register_trainable_weights(fast)
        two.register_trainable_weights(slow)
        one.update({"w": jnp.ones(1)})
        two.update({"w": jnp.ones(1)})
        assert slow["w"].value.tolist() == [2.0]
        assert two.step_count.value == 1
        two.update({"w": jnp.ones(1)})
        assert slow["w"].value.tolist() == [1.0]


def test_without_brainstate_the_import_says_what_to_install() -> None:
    code = "import sys; sys.modules['brainstate'] = None; import kedge.adapters.brainstate"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert finished.returncode == 1
    assert "ImportError: kedge.adapters.brainstate needs brainstate: pip install kedge[brainstate]" in finished.stderr


def test_braintools_and_optax_are_not_needed() -> None:
    code = (
        "import sys; sys.modules |= {'braintools': None, 'optax': None}\nfrom kedge.adapters.brainstate import StepLR"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
