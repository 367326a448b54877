"""Where pulled weights lie, on a host with several devices: JAX makes four of a CPU if told so before it starts."""

import os
import subprocess
import sys

import pytest

SETUP = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P, SingleDeviceSharding
import kedge, kedge.adapters.jax
from kedge import optim

mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 2), ("data", "model"))

def placed(array, *spec):
    return jax.device_put(array, NamedSharding(mesh, P(*spec)))

def joined(client, params):
    run = kedge.adapters.jax.create_run(
        client, "r", params=params, optimizer=optim.SGD(lr=1.0), aggregation=kedge.Synchronous(1)
    )
    return run, run.join()
"""


def run_on_four_devices(body: str) -> None:
    code = SETUP + "with kedge.testing.FakeServer() as server, server.connect() as client:\n" + body
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_leaves_come_back_with_the_sharding_that_they_had(dtype):
    run_on_four_devices(f"""
    values = jnp.arange(32, dtype=jnp.{dtype}).reshape(8, 4)
    params = {{
        "split": placed(values, "data", "model"),
        "rows": placed(values, ("data", "model")),
        "replicated": placed(values),
        "on one": jax.device_put(values, jax.devices()[3]),
    }}
    run, worker = joined(client, params)
    grads = jax.tree.map(jnp.ones_like, params)
    with worker:
        for weights, moved in ((worker.pull(), 0), (worker.step(grads), 1), (run.pull(), 1)):
            for name, leaf in weights.items():
                assert leaf.sharding == params[name].sharding, name
                assert leaf.committed, name
                np.testing.assert_array_equal(np.asarray(leaf), np.asarray(values) - moved)
                assert [shard.device for shard in leaf.addressable_shards] == [
                    shard.device for shard in params[name].addressable_shards
                ]
""")


def test_array_that_nobody_placed_goes_where_the_others_are():
    run_on_four_devices("""
    params = {"placed": jax.device_put(jnp.ones(4), jax.devices()[2]), "free": jnp.ones(4)}
    _, worker = joined(client, params)
    with worker:
        weights = worker.pull()
    assert weights["placed"].committed and not weights["free"].committed
    total = jax.jit(lambda w: w["placed"] + w["free"])(weights)
    assert total.devices() == {jax.devices()[2]}
""")


def test_shapes_with_a_sharding_place_what_is_pulled():
    run_on_four_devices("""
    joined(client, {"w": jnp.ones((4, 4))})[1].close()
    sharding = NamedSharding(mesh, P("model"))
    like = {"w": jax.ShapeDtypeStruct((4, 4), jnp.float32, sharding=sharding)}
    assert kedge.adapters.jax.get_run(client, "r", like=like).pull()["w"].sharding == sharding
""")


def test_gradient_may_lie_elsewhere_than_the_weights():
    run_on_four_devices("""
    params = {"w": placed(jnp.ones((4, 4)), "data")}
    _, worker = joined(client, params)
    with worker:
        worker.pull()
        stepped = worker.step({"w": placed(jnp.ones((4, 4)), None, "model")})
    assert stepped["w"].sharding == params["w"].sharding
    assert not stepped["w"].any()
""")


def test_remote_keeps_the_placement():
    run_on_four_devices("""
    import optax
    params = {"w": placed(jnp.ones((4, 4)), "data")}
    run = kedge.adapters.jax.create_run(
        client, "r", params=params, optimizer=optim.SGD(lr=1.0), aggregation=kedge.Synchronous(1)
    )
    with kedge.adapters.jax.remote(run) as tx:
        updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    applied = optax.apply_updates(params, updates)
    assert applied["w"].sharding == params["w"].sharding
    assert not applied["w"].any()
""")
