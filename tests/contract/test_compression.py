"""Compressed gradients against every server: weights are what the records say, and what is left out comes later."""

import numpy as np
import pytest

import kedge
from kedge import optim
from kedge.errors import KedgeError
from kedge.policies import Synchronous

ALONE = Synchronous(quorum=1)
WIRE_DTYPES = ["int8", "sign", kedge.TopK(0.25)]


def params(count=1030):
    return {"w": np.zeros(count, np.float32), "b": np.zeros((), np.float32)}


def grads(seed, count=1030):
    random = np.random.default_rng(seed)
    return {"w": random.normal(size=count).astype(np.float32), "b": np.float32(random.normal())}


@pytest.mark.parametrize(
    ("wire_dtype", "weights"),
    [
        # 127 is the greatest of a record and what it is sent as; 0.25 is rounded away, and 0.75 to 1.
        ("int8", [-127.0, 0.0, -1.0, 2.0]),
        # The mean magnitude is 32.5, with every element's sign.
        ("sign", [-32.5, -32.5, -32.5, 32.5]),
        (kedge.TopK(0.5), [-127.0, 0.0, 0.0, 2.0]),
    ],
    ids=str,
)
def test_weights_move_by_what_the_records_say(new_run, wire_dtype, weights):
    run = new_run(optim.SGD(lr=1.0), ALONE, {"w": np.zeros(4, np.float32)})
    with run.join(wire_dtype=wire_dtype, weights_dtype="float32") as worker:
        worker.pull()
        got = worker.step({"w": np.array([127.0, 0.25, 0.75, -2.0], np.float32)})["w"]
    assert got.tolist() == weights


@pytest.mark.parametrize("wire_dtype", WIRE_DTYPES, ids=str)
def test_what_is_left_out_comes_later(new_run, wire_dtype):
    run = new_run(optim.SGD(lr=1.0), ALONE, params())
    with run.join(wire_dtype=wire_dtype, weights_dtype="float32") as worker:
        worker.pull()
        worker.step(grads(1))
        assert worker.last_result.outcome == "applied"
        after_one = run.pull()
        for _ in range(60):
            weights = worker.step({"w": np.zeros(1030, np.float32), "b": np.float32(0)})
    rest = np.abs(weights["w"] + grads(1)["w"]).max()
    # Half a step of int8 is 0.5 / 127 of the greatest; nothing is left of top-k, and signs go around what is due.
    assert rest < {"int8": 1e-3, "sign": 1.5}.get(wire_dtype, 1e-5)
    assert rest < np.abs(after_one["w"] + grads(1)["w"]).max()


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("wire_dtype", WIRE_DTYPES, ids=str)
def test_gradient_that_is_not_finite_is_rejected(new_run, wire_dtype, value):
    run = new_run(optim.SGD(lr=1.0), ALONE, params())
    bad = grads(1)
    bad["w"][1027] = value
    with run.join(wire_dtype=wire_dtype) as worker:
        worker.pull()
        weights = worker.step(bad)
        assert (worker.last_result.outcome, worker.last_result.reason) == ("rejected", "NON_FINITE_GRADIENT")
        assert not weights["w"].any()
        assert worker.step(grads(2))["w"].any()


def test_gradient_of_zeros_may_take_no_bytes(new_run):
    run = new_run(optim.SGD(lr=1.0), ALONE, params())
    with run.join(wire_dtype=kedge.TopK(0.5)) as worker:
        worker.pull()
        worker.step({name: np.zeros_like(value) for name, value in params().items()})
        assert worker.last_result.outcome == "applied"


@pytest.mark.parametrize(("weights_dtype", "got"), [(None, 3.140625), ("float16", 3.140625), ("float32", 3.1415927)])
def test_weights_come_as_they_are_asked_for(new_run, weights_dtype, got):
    run = new_run(optim.SGD(lr=1.0), ALONE, {"w": np.array([np.pi], np.float32)})
    with run.join(wire_dtype="int8", weights_dtype=weights_dtype) as worker:
        assert worker.pull()["w"][0] == np.float32(got)
    with run.join(weights_dtype=weights_dtype) as worker:
        assert worker.pull()["w"][0] == np.float32(got if weights_dtype else np.pi)


@pytest.mark.parametrize("optimizer", [optim.AdaBelief(), optim.Lookahead(optim.AdaBelief())], ids=repr)
def test_signs_for_adabelief_without_a_greatest_direction_are_refused(new_run, optimizer):
    run = new_run(optimizer, ALONE)
    with pytest.raises(KedgeError, match="max_direction") as caught:
        run.join(wire_dtype="sign")
    assert caught.value.reason == "COMPRESSION_UNSAFE"
    assert run.status().workers == (), "nobody has joined"
    # An SDK that does not know better is refused by the server.
    run.optimizer = optim.SGD()
    with run.join(wire_dtype="sign") as worker:
        worker.pull()
        with pytest.raises(KedgeError, match="max_direction") as caught:
            worker.step({"w": np.ones(1, np.float32)})
    assert caught.value.reason == "COMPRESSION_UNSAFE"
    assert run.status().step == 0


@pytest.mark.parametrize("arguments", [{"wire_dtype": "top_k"}, {"wire_dtype": 8}, {"weights_dtype": "int8"}])
def test_what_is_no_dtype_is_refused(new_run, arguments):
    run = new_run(optim.SGD(), ALONE)
    with pytest.raises(ValueError, match=next(iter(arguments))):
        run.join(**arguments)
