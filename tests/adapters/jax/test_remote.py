"""A run in the shape of an optax transformation."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kedge
import kedge.adapters.jax
from kedge import optim

ALONE = kedge.Synchronous(quorum=1)


def loss_of(params, inputs):
    return jnp.mean(jnp.tanh(inputs @ params["w"] + params["b"]) ** 2)


def initial():
    generator = np.random.default_rng(3)
    return {"w": jnp.asarray(generator.normal(size=(4, 3)), jnp.float32), "b": jnp.zeros(3)}


def new_run(client, name="r", *, params=None, lr=1.0, aggregation=ALONE):
    params = initial() if params is None else params
    return kedge.adapters.jax.create_run(
        client, name, params=params, optimizer=optim.SGD(lr=lr), aggregation=aggregation
    )


def test_optax_loop_goes_where_optax_goes(client, run_name):
    optimizer = optim.SGD(lr=0.05, momentum=0.9)
    run = kedge.adapters.jax.create_run(client, run_name, params=initial(), optimizer=optimizer, aggregation=ALONE)
    value_and_grad = jax.jit(jax.value_and_grad(loss_of))
    inputs = jax.random.normal(jax.random.key(0), (32, 4))

    def train(tx):
        params = initial()
        state = tx.init(params)
        for _ in range(20):
            value, grads = value_and_grad(params, inputs)
            updates, state = tx.update(grads, state, params, value=value)
            params = optax.apply_updates(params, updates)
        return params, state

    with kedge.adapters.jax.remote(run) as tx:
        got, state = train(tx)
        assert state.step == 20
    expected, _ = train(optax.with_extra_args_support(optax.sgd(0.05, momentum=0.9)))
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6), got, expected)
    # The bias begins at zero, so that some of its elements change by more than a factor of two in a step.
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=2e-7, atol=1e-8), got, run.pull())


def test_it_is_an_optax_transformation_and_may_end_a_chain(fake_client):
    run = new_run(fake_client, params={"w": jnp.array([3.0, 4.0])})
    with kedge.adapters.jax.remote(run) as tx:
        assert isinstance(tx, optax.GradientTransformation)
        chained = optax.chain(optax.clip_by_global_norm(1.0), tx)
        params = {"w": jnp.array([3.0, 4.0])}
        state = chained.init(params)
        updates, _ = chained.update({"w": jnp.array([30.0, 40.0])}, state, params, value=1.5, example_count=3)
        assert run.run.status().loss == 1.5

    np.testing.assert_allclose(updates["w"], [-0.6, -0.8], rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_applied_updates_are_the_servers_weights_to_the_bit_where_steps_are_small(fake_client, dtype):
    generator = np.random.default_rng(4)
    params = {"w": jnp.asarray(generator.uniform(1, 2, 10_000), dtype)}
    run = new_run(fake_client, params=params, lr=0.01)
    with kedge.adapters.jax.remote(run) as tx:
        state = tx.init(params)
        for _ in range(10):
            grads = {"w": jnp.asarray(generator.normal(size=10_000), dtype)}
            updates, state = tx.update(grads, state, params)
            assert updates["w"].dtype == dtype
            params = optax.apply_updates(params, updates)
        np.testing.assert_array_equal(np.asarray(params["w"]), np.asarray(run.pull()["w"]))


def test_applied_updates_are_within_one_unit_in_the_last_place_wherever_they_lead(fake_client):
    generator = np.random.default_rng(5)
    wild = lambda: generator.normal(size=100_000) * 10.0 ** generator.integers(-3, 3, 100_000)  # noqa: E731
    params = {"w": jnp.asarray(wild(), jnp.float32)}
    run = new_run(fake_client, params=params)
    with kedge.adapters.jax.remote(run) as tx:
        state = tx.init(params)
        for _ in range(5):
            before = np.asarray(params["w"])
            updates, state = tx.update({"w": jnp.asarray(wild(), jnp.float32)}, state, params)
            params = optax.apply_updates(params, updates)
            held = np.asarray(run.pull()["w"])
            unit = np.spacing(np.maximum(np.abs(before), np.abs(held)))
            assert (np.abs(np.asarray(params["w"]) - held) <= unit).all()


def test_gradient_that_came_too_late_leads_to_the_newer_weights(fake_client):
    run = new_run(fake_client, params={"w": jnp.array([3.0])})
    with kedge.adapters.jax.remote(run) as tx, run.join() as other:
        params = tx.pull()
        state = tx.init(params)
        other.pull()
        other.step({"w": jnp.array([1.0])})
        updates, state = tx.update({"w": jnp.array([100.0])}, state, params)
        assert tx.worker.last_result.reason == "STALE_GRADIENT"

    assert (float(updates["w"][0]), state.step) == (-1.0, 1)


def test_params_that_are_not_the_runs_weights_are_refused(fake_client):
    run = new_run(fake_client)
    with kedge.adapters.jax.remote(run) as tx, pytest.raises(ValueError, match=r"'w' differs.*tx\.pull\(\)"):
        tx.init(initial() | {"w": jnp.zeros((4, 3))})
    with kedge.adapters.jax.remote(run) as tx:
        assert tx.init(initial()).step == 0


def test_state_of_another_step_is_refused_and_nothing_is_pushed(fake_client):
    run = new_run(fake_client)
    grads = jax.tree.map(jnp.ones_like, initial())
    with kedge.adapters.jax.remote(run) as tx:
        first = tx.init(initial())
        tx.update(grads, first, initial())
        with pytest.raises(ValueError, match="state is of step 0 and the worker's weights are of step 1"):
            tx.update(grads, first, initial())
        assert run.run.status().step == 1


def test_params_have_to_be_given(fake_client):
    run = new_run(fake_client)
    with kedge.adapters.jax.remote(run) as tx:
        state = tx.init(initial())
        with pytest.raises(ValueError, match="params is None"):
            tx.update(jax.tree.map(jnp.ones_like, initial()), state)
        assert run.run.status().step == 0


@pytest.mark.parametrize(
    "transform",
    [
        jax.jit,
        lambda update: jax.jit(jax.vmap(update, in_axes=(-1, None, None))),
        lambda update: jax.vmap(update, in_axes=(-1, None, None)),
        lambda update: jax.grad(lambda *arguments: update(*arguments)[0]["b"].sum()),
        lambda update: lambda *arguments: jax.lax.scan(lambda carry, _: (update(*carry)[0], None), arguments, None, 2),
    ],
    ids=["jit", "jit of vmap", "vmap", "grad", "scan"],
)
def test_tracing_is_refused_and_nothing_is_pushed(fake_client, transform):
    run = new_run(fake_client)
    with kedge.adapters.jax.remote(run) as tx:
        state = tx.init(initial())
        with pytest.raises(TypeError, match=r"is traced.*outside"):
            transform(tx.update)(initial(), state, initial())
        assert run.run.status().step == 0


def test_run_of_the_sdk_is_refused_before_it_is_joined(fake_client):
    run = new_run(fake_client).run
    with pytest.raises(TypeError, match=r"run is .*kedge\.adapters\.jax\.get_run\(client, name, like=params\)"):
        kedge.adapters.jax.remote(run)
    assert run.status().workers == ()


def test_closing_gives_the_lease_back(fake_client):
    run = new_run(fake_client)
    tx = kedge.adapters.jax.remote(run, "optax-1")
    assert [worker.name for worker in run.run.status().workers] == ["runs/r/workers/optax-1"]
    tx.close()
    tx.close()
    assert run.run.status().workers == ()
