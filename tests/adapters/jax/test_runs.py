"""Training through the adapter, against the fake server and a real one."""

import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import kedge
import kedge.adapters.jax
from kedge import optim
from kedge.errors import InvalidInputError

ALONE = kedge.Synchronous(quorum=1)
SGD = optim.SGD(lr=1.0)


def loss_of(params, batch):
    inputs, labels = batch
    hidden = jnp.tanh(inputs @ params["hidden"]["w"] + params["hidden"]["b"])
    return jnp.mean((hidden @ params["output"] - labels) ** 2)


def two_layers():
    generator = np.random.default_rng(1)
    return {
        "output": jnp.asarray(generator.normal(size=(8, 2)), jnp.float32),
        "hidden": {"w": jnp.asarray(generator.normal(size=(4, 8)), jnp.float32), "b": jnp.zeros(8)},
    }


def batches(count):
    generator = np.random.default_rng(2)
    return [tuple(generator.normal(size=(16, n)).astype(np.float32) for n in (4, 2)) for _ in range(count)]


def test_loop_of_value_and_grad_goes_where_optax_goes(client, run_name):
    optimizer = optim.SGD(lr=0.05, momentum=0.9)
    run = kedge.adapters.jax.create_run(client, run_name, params=two_layers(), optimizer=optimizer, aggregation=ALONE)
    value_and_grad = jax.jit(jax.value_and_grad(loss_of))
    here, tx = two_layers(), optax.sgd(0.05, momentum=0.9)
    state = tx.init(here)
    with run.join() as worker:
        params = worker.pull()
        for batch in batches(30):
            loss, grads = value_and_grad(params, batch)
            params = worker.step(grads, loss=loss, example_count=16)
            updates, state = tx.update(value_and_grad(here, batch)[1], state)
            here = optax.apply_updates(here, updates)
        assert worker.step_number == 30
        assert worker.last_result.outcome == "applied"
        assert run.run.status().loss == pytest.approx(float(loss), rel=1e-6)

    jax.tree.map(lambda got, expected: np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6), params, here)
    jax.tree.map(np.testing.assert_array_equal, run.pull(), params)


def test_worker_says_what_weights_are_sent_as_where_gradients_are_compressed(client, run_name):
    params = {"w": jnp.array([1.0 + 2.0**-20])}  # of more bits than bfloat16 has
    run = kedge.adapters.jax.create_run(client, run_name, params=params, optimizer=SGD, aggregation=ALONE)
    with run.join(wire_dtype="int8", weights_dtype="float32") as worker:
        assert worker.pull()["w"].tolist() == [1.0 + 2.0**-20]
    with run.join(wire_dtype="int8") as worker:
        assert worker.pull()["w"].tolist() == [1.0]


def test_worker_in_numpy_and_one_in_jax_share_a_run(client, run_name):
    make = lambda array: {"z": array([1.0, 2.0]), "a": [array([3.0])]}  # noqa: E731
    in_jax = kedge.adapters.jax.get_or_create_run(
        client,
        run_name,
        params=make(lambda values: jnp.array(values, jnp.float32)),
        optimizer=SGD,
        aggregation=kedge.Asynchronous(),
    )
    in_numpy = client.get_or_create_run(
        run_name,
        params=make(lambda values: np.array(values, np.float32)),
        optimizer=SGD,
        aggregation=kedge.Asynchronous(),
    )
    with in_jax.join() as one, in_numpy.join() as other:
        one.pull()
        other.pull()
        one.step({"z": jnp.array([1.0, 0.0]), "a": [jnp.array([0.5])]})
        seen = other.step({"z": np.array([0, 1], np.float32), "a": [np.array([0.5], np.float32)]})
        back = one.pull()

    for weights in (seen, back):
        np.testing.assert_array_equal(weights["z"], [0.0, 1.0])
        np.testing.assert_array_equal(weights["a"][0], [2.0])


def test_slow_weights_and_snapshots_come_as_pytrees(client, run_name):
    optimizer = optim.Lookahead(SGD, sync_period=2, alpha=0.5)
    run = kedge.adapters.jax.create_run(
        client, run_name, params=(jnp.array([8.0]),), optimizer=optimizer, aggregation=ALONE
    )
    with run.join() as worker:
        worker.pull()
        worker.step((jnp.array([2.0]),))
        held = run.snapshot()
        assert (held.step, float(held.fast[0][0]), float(held.slow[0][0])) == (1, 6.0, 8.0)
        assert run.snapshot("fast").slow is None
        worker.step((jnp.array([2.0]),))
        assert float(worker.pull("slow")[0][0]) == float(run.pull("slow")[0][0]) == 6.0


def test_groups_take_tensors_by_their_names(client, run_name):
    run = kedge.adapters.jax.create_run(
        client,
        run_name,
        params={"layers": [{"w": jnp.ones(1), "b": jnp.ones(1)}]},
        optimizer=SGD,
        aggregation=ALONE,
        groups=[optim.Group("layers.0.b", lr=0.5)],
    )
    with run.join() as worker:
        worker.pull()
        (layer,) = worker.step({"layers": [{"w": jnp.ones(1), "b": jnp.ones(1)}]})["layers"]

    assert (float(layer["w"][0]), float(layer["b"][0])) == (0.0, 0.5)


def test_gradient_of_another_structure_is_matched_by_name(client, run_name):
    model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    run = kedge.adapters.jax.create_run(
        client, run_name, params=nnx.state(model, nnx.Param), optimizer=SGD, aggregation=ALONE
    )
    with run.join() as worker:
        before = nnx.to_pure_dict(worker.pull())
        after = nnx.to_pure_dict(worker.step({"kernel": jnp.ones((2, 1)), "bias": jnp.full(1, 2.0)}))

    np.testing.assert_array_equal(after["kernel"], before["kernel"] - 1)
    np.testing.assert_array_equal(after["bias"], before["bias"] - 2)


def test_equinox_model_trains_by_its_filtered_half(client, run_name):
    model = eqx.nn.MLP(2, 1, 8, 1, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    inputs = jax.random.normal(jax.random.key(1), (64, 2))
    labels = inputs[:, :1] * inputs[:, 1:]

    @jax.jit
    @jax.value_and_grad
    def value_and_grad(params):
        return jnp.mean((jax.vmap(eqx.combine(params, static))(inputs) - labels) ** 2)

    run = kedge.adapters.jax.create_run(
        client, run_name, params=params, optimizer=optim.Adam(lr=0.03), aggregation=ALONE
    )
    losses = []
    with run.join() as worker:
        params = worker.pull()
        for _ in range(100):
            loss, grads = value_and_grad(params)
            losses.append(float(loss))
            params = worker.step(grads, loss=loss)

    assert losses[-1] < losses[0] / 3


def test_params_may_be_donated(client, run_name):
    step = jax.jit(lambda params: jax.tree.map(lambda w: w * 2, params), donate_argnums=0)
    params = {"w": jnp.arange(4096.0), "v": jnp.arange(64.0)}
    run = kedge.adapters.jax.create_run(client, run_name, params=params, optimizer=SGD, aggregation=ALONE)
    step(params)
    with run.join() as worker:
        first = worker.pull()
        doubled = step(first)
        second = worker.pull()

    np.testing.assert_array_equal(doubled["w"], 2 * np.arange(4096.0))
    np.testing.assert_array_equal(second["w"], np.arange(4096.0))
    np.testing.assert_array_equal(second["v"], np.arange(64.0))


def test_weights_that_were_pulled_do_not_change_with_later_steps(client, run_name):
    params = {"w": jnp.zeros((1024, 64))}
    run = kedge.adapters.jax.create_run(client, run_name, params=params, optimizer=SGD, aggregation=ALONE)
    with run.join() as worker:
        held = [worker.pull()]
        held += [worker.step(jax.tree.map(jnp.ones_like, params)) for _ in range(5)]

    for step, weights in enumerate(held):
        np.testing.assert_array_equal(weights["w"], np.full((1024, 64), -step, np.float32))


def test_push_says_what_became_of_the_gradient(client, run_name):
    params = {"w": jnp.zeros(2)}
    run = kedge.adapters.jax.create_run(client, run_name, params=params, optimizer=SGD, aggregation=ALONE)
    with run.join("worker-1") as worker:
        worker.pull()
        assert worker.push({"w": jnp.ones(2)}, loss=jnp.float32(3))[:4] == ("applied", "QUORUM_REACHED", 1, 0)
        assert worker.push({"w": jnp.ones(2)}).reason == "STALE_GRADIENT"
        assert worker.push({"w": jnp.full(2, jnp.nan)}, base_step=1).reason == "NON_FINITE_GRADIENT"
    worker.close()


def test_traced_gradient_is_refused_and_not_sent(fake_client):
    params = {"w": jnp.zeros(2)}
    run = kedge.adapters.jax.create_run(fake_client, "r", params=params, optimizer=SGD, aggregation=ALONE)
    with run.join() as worker:
        worker.pull()
        for use in (worker.push, worker.step):
            with pytest.raises(TypeError, match=r"'w' is traced.*outside"):
                jax.jit(use)({"w": jnp.ones(2)})
        with pytest.raises(InvalidInputError, match="'w' is missing"):
            worker.step({})
        assert run.run.status().applied_count == 0


def test_server_is_not_called_while_jax_compiles(fake_client):
    params = {"w": jnp.zeros(2)}
    run = kedge.adapters.jax.create_run(fake_client, "r", params=params, optimizer=SGD, aggregation=ALONE)
    grads = {"w": np.ones(2, np.float32)}
    with run.join() as worker:
        for use in (run.pull, worker.pull, lambda: run.snapshot().fast, lambda: worker.step(grads)):
            with pytest.raises(TypeError, match=r"is traced.*outside"):
                jax.jit(use)()
            with pytest.raises(TypeError, match=r"is traced.*outside"):
                jax.lax.scan(lambda carry, _, use=use: (carry, use()), 0, None, 2)
        worker.pull()
        for use in (worker.push, worker.step):
            with pytest.raises(TypeError, match=r"'loss' is traced.*outside"):
                jax.grad(lambda loss, use=use: use(grads, loss=loss))(1.0)
        assert run.run.status().applied_count == 0


def test_example_counts_weigh_the_gradients_of_their_round(client, run_name):
    run = kedge.adapters.jax.create_run(
        client, run_name, params={"w": jnp.zeros(2)}, optimizer=SGD, aggregation=kedge.Synchronous(quorum=2)
    )

    def work(worker, gradient, example_count):
        return worker.step({"w": jnp.array(gradient)}, example_count=example_count)

    with run.join() as one, run.join() as other, ThreadPoolExecutor(2) as pool:
        one.pull()
        other.pull()
        results = [pool.submit(work, one, [4.0, 0.0], 3), pool.submit(work, other, [0.0, 8.0], 1)]
        for result in results:
            np.testing.assert_array_equal(result.result(60)["w"], [-3.0, -2.0])


def test_run_is_found_by_params_whose_keys_jax_has_sorted(fake_client):
    params = {"z": jnp.array([1.0]), "a": {"y": jnp.array([2.0, 3.0]), "b": jnp.array([4.0])}}
    aggregation = kedge.Asynchronous()
    first = kedge.adapters.jax.create_run(fake_client, "r", params=params, optimizer=SGD, aggregation=aggregation)
    ordered = jax.jit(lambda tree: tree)(params)
    assert list(ordered) == ["a", "z"]
    second = kedge.adapters.jax.get_or_create_run(
        fake_client, "r", params=ordered, optimizer=SGD, aggregation=aggregation
    )
    assert second.run.manifest == first.run.manifest
    with second.join() as worker:
        worker.pull()
        stepped = worker.step({"a": {"b": jnp.array([1.0]), "y": jnp.array([2.0, 3.0])}, "z": jnp.array([0.5])})

    jax.tree.map(np.testing.assert_array_equal, stepped, {"z": [0.5], "a": {"y": [0, 0], "b": [3]}})


@pytest.mark.parametrize(
    ("params", "optimizer"),
    [
        ({"z": jnp.zeros(3), "a": jnp.zeros(2)}, SGD),
        ({"a": jnp.zeros(2), "z": jnp.zeros(2), "more": jnp.zeros(2)}, SGD),
        ({"a": jnp.zeros(2, jnp.bfloat16), "z": jnp.zeros(2)}, SGD),
        ({"a": jnp.zeros(2), "z": jnp.zeros(2)}, optim.SGD(lr=0.5)),
        ({"z": jnp.zeros(2), "a": jnp.zeros(2)}, optim.SGD(lr=0.5)),
    ],
    ids=["shape", "tensors", "dtype", "optimizer", "optimizer alone"],
)
def test_other_run_of_that_name_is_refused(fake_client, params, optimizer):
    held = {"z": jnp.zeros(2), "a": jnp.zeros(2)}
    kedge.adapters.jax.create_run(fake_client, "r", params=held, optimizer=SGD, aggregation=ALONE)
    with pytest.raises(kedge.KedgeError) as error:
        kedge.adapters.jax.get_or_create_run(fake_client, "r", params=params, optimizer=optimizer, aggregation=ALONE)
    assert error.value.reason == "RUN_MISMATCH"


@pytest.mark.parametrize("module", ["jax", "optax"])
def test_without_its_framework_the_import_says_what_to_install(module):
    code = f"""
        import sys
        sys.modules[{module!r}] = None
        try:
            import kedge.adapters.{module}
        except ImportError as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True, timeout=100
    )
    assert "pip install kedge[jax]" in done.stdout


def test_the_adapter_does_without_optax():
    code = "import sys; sys.modules['optax'] = None; import kedge.adapters.jax"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)
