"""What a run takes, and pulls of what is newer only, through the adapter."""

import jax.numpy as jnp
import numpy as np

import kedge
from kedge import optim
from kedge.adapters import jax as kj
from kedge.client import Client

PARAMS = {"w": jnp.array([3.0])}
STRICT = kedge.Admission(max_norm=2.0)


def test_run_is_created_with_an_admission(client: Client, run_name: str) -> None:
    settings = {"params": PARAMS, "optimizer": optim.SGD(lr=1.0), "aggregation": kedge.Asynchronous()}
    run = kj.create_run(client, run_name, **settings, admission=STRICT)
    assert run.run.admission == STRICT
    assert kj.get_or_create_run(client, run_name, **settings, admission=STRICT).run.info().admission == STRICT
    other = kj.get_or_create_run(client, f"{run_name}-other", **settings, admission=STRICT)
    with other.join() as worker:
        worker.pull()
        assert worker.push({"w": jnp.array([2.5])}).reason == "NORM_ABOVE_LIMIT"
        assert worker.push({"w": jnp.array([1.5])}).outcome == "applied"


def test_pull_of_nothing_newer_is_none(client: Client, run_name: str) -> None:
    run = kj.create_run(client, run_name, params=PARAMS, optimizer=optim.SGD(lr=1.0), aggregation=kedge.Asynchronous())
    with run.join() as worker:
        worker.pull()
        worker.step({"w": jnp.array([1.0])})
        for puller in (run, worker):
            assert puller.pull(if_newer_than=1) is None
            np.testing.assert_array_equal(puller.pull(if_newer_than=0)["w"], [2.0])
