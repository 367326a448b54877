"""Local steps against the fake server: what is exchanged and when, and what mistakes change."""

import math
import re
import weakref
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import kedge
from kedge import optim
from kedge.errors import KedgeError

PAGE = (Path(__file__).parents[3] / "docs" / "local_steps.md").read_text(encoding="utf-8")

SGD = optim.SGD(lr=1.0)
ALONE = kedge.Synchronous(quorum=1)
MEDIAN = kedge.Synchronous(quorum=3, combine="median")


@pytest.fixture
def client():
    with kedge.testing.FakeServer() as server, server.connect() as client:
        yield client


@pytest.fixture
def new_run(client):
    def create(optimizer=SGD, aggregation=ALONE, params=None):
        params = {"w": np.array([3.0], np.float32)} if params is None else params
        return client.create_run("r", params=params, optimizer=optimizer, aggregation=aggregation)

    return create


@pytest.fixture
def worker(new_run):
    with new_run().join("a") as worker:
        yield worker


def grad(value=1.0):
    return {"w": np.array([value], np.float32)}


def values(local, *gradients):
    return [local.step(grad(value))["w"].item() for value in gradients]


def test_every_kth_step_is_an_exchange(new_run):
    run = new_run(optim.SGD(lr=0.5))
    with run.join() as worker:
        local = worker.local_steps(SGD, sync_period=2)
        assert local.pull()["w"] == [3.0]
        # 3 -> 2 -> 1, whose pseudo-gradient is 2: 3 - 0.5 * 2 = 2. Then 2 -> 1 -> 0: 2 - 0.5 * 2 = 1.
        assert [(values(local, 1), local.pending_count, worker.step_number) for _ in range(4)] == [
            ([2.0], 1, 0),
            ([2.0], 0, 1),
            ([1.0], 1, 1),
            ([1.0], 0, 2),
        ]
    assert run.status().applied_count == 2


def test_flush_exchanges_the_rest_and_else_sends_nothing(new_run):
    run = new_run(optim.SGD(lr=0.5))
    with run.join() as worker:
        local = worker.local_steps(SGD, sync_period=5)
        local.pull()
        assert local.flush()["w"] == [3.0]
        assert run.status().applied_count == 0
        values(local, 1, 1, 1)
        assert local.flush()["w"] == [1.5]
        assert local.flush()["w"] == [1.5]
    assert run.status().applied_count == 1


def test_moments_and_schedule_of_the_local_optimizer_go_on_over_exchanges(worker):
    schedule = optim.StepLR(base_lr=1.0, step_size=3, gamma=0.5)
    local = worker.local_steps(optim.Momentum(lr=schedule, momentum=0.5), sync_period=2)
    local.pull()

    # The momentum is 1, 1.5, 1.75, 1.875; the rate 1, 1, 1, 0.5. The run itself goes all the way.
    assert values(local, 1, 1, 1, 1) == [2, 0.5, -1.25, -1.25 - 0.9375]


def test_server_gets_the_mean_loss_by_examples(new_run):
    run = new_run()
    with run.join() as worker:
        local = worker.local_steps(SGD, sync_period=3)
        local.pull()
        local.step(grad(), loss=1.0, example_count=1)
        local.step(grad(), example_count=100)
        local.step(grad(), loss=np.float32(3.0), example_count=3)
        assert run.status().loss == (1 * 1 + 3 * 3) / 4
        local.step(grad())
        local.flush()
        assert run.status().loss is None


def test_examples_of_all_local_steps_weigh_the_worker_in_its_round(new_run, in_background):
    run = new_run(aggregation=kedge.Synchronous(quorum=2))

    def train(name, gradient, counts):
        with run.join(name) as worker:
            local = worker.local_steps(SGD, sync_period=2)
            local.pull()
            return [local.step(grad(gradient), example_count=count) for count in counts][-1]["w"].item()

    futures = [in_background(train, "a", 1.0, (1, 2)), in_background(train, "b", 2.0, (1, 4))]
    # They move by 2 and 4, with 3 and 5 examples.
    assert [future.result(60) for future in futures] == [3 - (3 * 2 + 5 * 4) / 8] * 2


def test_stale_pseudo_gradient_is_left_out_and_the_moments_stay(new_run):
    run = new_run()
    with run.join("a") as worker, run.join("b") as other:
        local = worker.local_steps(optim.Momentum(lr=1.0, momentum=0.5), sync_period=2)
        local.pull()
        other.pull()
        other.step(grad(10))

        assert values(local, 1, 1) == [2, -7]  # the second is the other's 3 - 10
        assert worker.last_result.reason == "STALE_GRADIENT"
        assert (local.pending_count, worker.step_number) == (0, 1)
        assert values(local, 1, 1) == [-7 - 1.75, -7 - 1.75 - 1.875]
        assert run.pull()["w"] == [-7 - 1.75 - 1.875]


def test_local_gradient_that_is_not_finite_is_left_out(worker, caplog):
    local = worker.local_steps(optim.Momentum(lr=1.0, momentum=0.5), sync_period=2)
    local.pull()

    assert values(local, 1, math.nan, math.inf) == [2, 2, 2]
    assert local.pending_count == 1
    assert caplog.text.count("a local gradient was left out") == 2
    assert values(local, 1) == [0.5]


def test_weights_that_leave_float32_are_left_out(worker):
    local = worker.local_steps(optim.SGD(lr=1e3), sync_period=2)
    local.pull()

    assert values(local, 3e38) == [-math.inf]
    assert values(local, 0) == [3]
    assert worker.last_result.reason == "NON_FINITE_GRADIENT"
    assert values(local, 1e-3, 1e-3) == [2, 1]


def test_what_the_user_does_to_the_weights_changes_nothing(worker):
    local = worker.local_steps(SGD, sync_period=2)
    for weights in (local.pull(), local.step(grad()), local.step(grad()), local.flush()):
        weights["w"][...] = 99
    assert values(local, 1, 1) == [0, -1]


def test_pull_drops_what_is_pending(worker):
    local = worker.local_steps(SGD, sync_period=3)
    local.pull()
    values(local, 1, 1)
    assert local.pull()["w"] == [3.0]
    assert local.pending_count == 0
    assert values(local, 1, 1, 1) == [2, 1, 0]


def test_groups_hold_for_the_local_steps(new_run):
    params = {"w": np.ones(1, np.float32), "b": np.ones(1, np.float32), "fixed": np.ones(1, np.float32)}
    groups = [optim.Group("b", lr=0.25), optim.Group("fixed", frozen=True)]
    with new_run(params=params).join() as worker:
        local = worker.local_steps(SGD, sync_period=2, groups=groups)
        local.pull()
        for _ in range(2):
            weights = local.step(params)
    assert {name: array.item() for name, array in weights.items()} == {"w": -1, "b": 0.5, "fixed": 1}


def test_sixteen_bit_weights_move_by_less_than_they_can_hold(new_run):
    with new_run(params={"w": np.ones(1, ml_dtypes.bfloat16)}).join() as worker:
        local = worker.local_steps(optim.SGD(lr=2.0**-10), sync_period=8)
        local.pull()
        path = [local.step({"w": np.ones(1, ml_dtypes.bfloat16)})["w"] for _ in range(8)]
    assert {array.dtype for array in path} == {np.dtype(ml_dtypes.bfloat16)}
    assert path[0].astype(np.float32) == [1]  # 1 - 2**-10 rounds to 1
    assert path[-1].astype(np.float32) == [1 - 2**-7]


def test_step_to_takes_what_any_optimizer_came_to(new_run):
    run = new_run(optim.SGD(lr=0.5), params={"a": [np.float32(1), np.float32(2)], "b": np.zeros((1, 2), np.float32)})
    with run.join() as worker:
        local = worker.local_steps()
        weights = local.pull()
        weights["b"] += 4  # in place, as torch does
        weights = local.step_to({"a": [np.float32(3), np.float32(2)], "b": weights["b"]}, loss=7.0, example_count=5)
        assert (weights["a"], weights["b"].tolist()) == ([2, 2], [[2, 2]])
        assert run.status().loss == 7
        assert local.flush()["a"] == [2, 2]
    assert run.status().applied_count == 1


def test_difference_of_sixteen_bit_weights_is_not_rounded_to_sixteen_bits(new_run):
    with new_run(params={"w": np.full(1, 256, ml_dtypes.bfloat16)}).join() as worker:
        local = worker.local_steps()
        local.pull()
        near_one = np.full(1, 1 + 2.0**-7, ml_dtypes.bfloat16)  # bfloat16 has no 255 - 2**-7
        assert local.step_to({"w": near_one})["w"] == near_one


def test_step_to_of_weights_that_are_not_finite_is_left_out(worker):
    local = worker.local_steps()
    local.pull()
    for bad in (math.nan, math.inf):
        assert local.step_to(grad(bad))["w"] == [3.0]
        assert worker.last_result.reason == "NON_FINITE_GRADIENT"


def test_step_to_may_follow_local_steps(new_run):
    run = new_run()
    with run.join() as worker:
        local = worker.local_steps(SGD, sync_period=5)
        local.pull()
        local.step(grad(), loss=1.0, example_count=3)
        assert local.step_to(grad(10.0), loss=5.0)["w"] == [10.0]
        assert run.status().loss == (3 * 1 + 5) / 4
        assert values(local, 1) == [9]


def test_local_steps_stay_where_an_exchange_fails(worker, monkeypatch):
    def fail(*_, **__):
        raise KedgeError("SERVER_UNAVAILABLE", "as the test wants it")

    local = worker.local_steps(SGD, sync_period=2)
    local.pull()
    values(local, 1)
    with monkeypatch.context() as patch:
        patch.setattr(worker, "step", fail)
        for call in (lambda: values(local, 1), local.flush, lambda: local.step_to(grad(5.0))):
            with pytest.raises(KedgeError, match="as the test wants it"):
                call()
            assert local.pending_count == 2
    assert local.flush()["w"] == [1.0]


def refuse_the_round(run, flushing, eventually):
    """Lets an exchange fail for want of others, and leaves the run with a policy that needs none."""
    eventually(lambda: run.status().round is not None)
    run.set_aggregation(ALONE)
    return flushing.result(60)["w"].item()


def test_local_steps_stay_where_their_round_is_refused(new_run, in_background, eventually):
    run = new_run(aggregation=MEDIAN)
    with run.join("a") as worker:
        local = worker.local_steps(optim.Momentum(lr=1.0, momentum=0.5), sync_period=3)
        local.pull()
        assert values(local, 1, 1) == [2, 0.5]  # the momentum is 1, 1.5, and then 1.75
        assert refuse_the_round(run, in_background(local.flush), eventually) == 0.5
        assert worker.last_result.reason == "COHORT_TOO_SMALL"
        assert (local.pending_count, worker.step_number, run.status().step) == (2, 0, 0)

        assert local.step(grad(), loss=2.0, example_count=4)["w"] == [0.5 - 1.75]
        assert (local.pending_count, worker.step_number) == (0, 1)
        assert run.pull()["w"] == [0.5 - 1.75]
        assert run.status().loss == 2.0


def test_weights_of_another_optimizer_stay_where_their_round_is_refused(new_run, in_background, eventually):
    run = new_run(aggregation=MEDIAN)
    with run.join("a") as worker:
        local = worker.local_steps()
        local.pull()
        stepping = in_background(local.step_to, grad(2.0), loss=4.0, example_count=1)
        assert refuse_the_round(run, stepping, eventually) == 2
        assert (local.pending_count, worker.step_number) == (1, 0)

        # What is sent now is of both parts: 3 - 1, and the mean of the losses over the examples of both.
        assert local.step_to(grad(1.0), loss=1.0, example_count=3)["w"] == [1.0]
        assert run.status().loss == (4.0 * 1 + 1.0 * 3) / 4


def test_local_optimizer_goes_on_from_the_weights_of_a_refused_round(new_run, in_background, eventually):
    run = new_run(aggregation=MEDIAN)
    with run.join("a") as worker:
        local = worker.local_steps(SGD, sync_period=2)
        local.pull()
        assert refuse_the_round(run, in_background(local.step_to, grad(2.5)), eventually) == 2.5
        assert values(local, 1) == [1.5]  # the second of two: an exchange
        assert run.pull()["w"] == [1.5]


def test_local_steps_of_a_refused_round_go_where_there_are_newer_weights(worker, monkeypatch):
    local = worker.local_steps(SGD, sync_period=5)
    local.pull()
    values(local, 1)
    step = worker.step

    def refused(grads, **options):
        weights = step(grads, **options)
        worker.last_result = worker.last_result._replace(outcome="rejected", reason="COHORT_TOO_SMALL")
        return weights

    monkeypatch.setattr(worker, "step", refused)
    assert local.flush()["w"] == [2.0]
    assert (local.pending_count, worker.step_number) == (0, 1)
    assert values(local, 1) == [1.0]


def test_local_steps_that_were_rejected_for_their_values_are_dropped(worker):
    local = worker.local_steps()
    local.pull()
    assert local.step_to(grad(math.nan))["w"] == [3.0]
    assert (worker.last_result.reason, local.pending_count) == ("NON_FINITE_GRADIENT", 0)


@pytest.mark.parametrize(
    ("grads", "reason"),
    [
        ({}, "TENSOR_MISSING"),
        ({"w": None}, "TENSOR_MISSING"),
        (grad() | {"v": np.zeros(1, np.float32)}, "TENSOR_UNEXPECTED"),
        ({"w": np.zeros(2, np.float32)}, "TENSOR_SHAPE_MISMATCH"),
        ({"w": np.zeros(1)}, "UNSUPPORTED_DTYPE"),
        ({"w": "much"}, "UNSUPPORTED_STRUCTURE"),
    ],
)
def test_arrays_that_do_not_fit_change_nothing(worker, grads, reason):
    local = worker.local_steps(optim.Momentum(lr=1.0, momentum=0.5), sync_period=2)
    local.pull()
    values(local, 1)
    for call in (local.step, local.step_to):
        with pytest.raises(KedgeError) as error:
            call(grads)
        assert error.value.reason == reason
    assert local.pending_count == 1
    assert values(local, 1) == [0.5]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"loss": "low"}, TypeError, "^loss is 'low'"),
        ({"loss": np.zeros(2)}, TypeError, "^loss is"),
        ({"example_count": 0}, KedgeError, "^example_count is 0"),
        ({"example_count": -1}, KedgeError, "^example_count is -1"),
        ({"example_count": 1.5}, TypeError, "^example_count is 1.5"),
        ({"example_count": 2**63 - 1}, KedgeError, "^example_count is 9223372036854775808"),
    ],
)
def test_loss_and_example_count_that_cannot_be_change_nothing(worker, arguments, error, message):
    local = worker.local_steps(optim.Momentum(lr=1.0, momentum=0.5), sync_period=2)
    local.pull()
    values(local, 1)
    for call in (local.step, local.step_to):
        with pytest.raises(error, match=message):
            call(grad(), **arguments)
    assert local.pending_count == 1
    assert values(local, 1) == [0.5]


def test_nothing_is_done_before_the_first_pull(worker):
    local = worker.local_steps(SGD, sync_period=1)
    for call in (local.flush, lambda: local.step(grad()), lambda: local.step_to(grad())):
        with pytest.raises(ValueError, match="call pull"):
            call()
    local.pull()
    assert values(local, 1) == [2]


def test_step_without_a_local_optimizer_says_what_to_do(worker):
    local = worker.local_steps()
    local.pull()
    with pytest.raises(ValueError, match=r"no local optimizer.*step_to"):
        local.step(grad())


def test_weights_that_the_worker_pulled_itself_are_no_base(worker):
    local = worker.local_steps(SGD, sync_period=2)
    local.pull()
    values(local, 1)
    worker.step(grad(10))
    for call in (local.flush, lambda: local.step(grad()), lambda: local.step_to(grad())):
        with pytest.raises(ValueError, match=r"of step 1, the local steps began at 0"):
            call()
    assert local.pending_count == 1
    local.pull()
    assert values(local, 1, 1) == [-8, -9]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"optimizer": SGD}, TypeError, "^sync_period is None"),
        ({"optimizer": SGD, "sync_period": 0}, ValueError, "^sync_period is 0: it must be at least 1"),
        ({"optimizer": SGD, "sync_period": -3}, ValueError, "^sync_period is -3"),
        ({"optimizer": SGD, "sync_period": 2.5}, TypeError, "^sync_period is 2.5"),
        ({"optimizer": SGD, "sync_period": True}, TypeError, "^sync_period is True"),
        ({"sync_period": 20}, ValueError, "^sync_period is 20: it is for a local optimizer"),
        ({"groups": [optim.Group("w")]}, ValueError, "^groups is .* it is for a local optimizer"),
        ({"optimizer": optim.Lookahead(SGD, alpha=0.25), "sync_period": 2}, TypeError, r"base optimizer.*SGD\(lr=0.25"),
        ({"optimizer": optim.Optax("adan"), "sync_period": 2}, TypeError, r"optimizer is Optax.*step_to"),
        ({"optimizer": "adam", "sync_period": 2}, TypeError, "^optimizer is 'adam'"),
        ({"optimizer": optim.SGD(lr=optim.StepLR(1.0, 2, tick="manual")), "sync_period": 2}, ValueError, "tick="),
        (
            {
                "optimizer": SGD,
                "sync_period": 2,
                "groups": [optim.Group("w", lr=optim.StepLR(1.0, 2, tick="manual"))],
            },
            ValueError,
            "tick=",
        ),
        ({"optimizer": SGD, "sync_period": 2, "groups": [optim.Group("v")]}, ValueError, "'v'"),
        ({"optimizer": SGD, "sync_period": 2, "groups": ["w"]}, TypeError, "kedge.optim.Group"),
    ],
)
def test_local_optimizer_that_cannot_be_is_refused(worker, arguments, error, message):
    with pytest.raises(error, match=message):
        worker.local_steps(**arguments)


def test_sync_period_may_be_a_number_of_numpy(worker):
    local = worker.local_steps(SGD, sync_period=np.int64(1))
    local.pull()
    assert values(local, 1) == [2]


def test_plain_worker_keeps_nothing_of_the_weights(worker):
    weights = worker.pull()
    kept = weakref.ref(weights["w"].base)
    del weights
    assert kept() is None


def test_documented_programs_train(monkeypatch):
    programs = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    with kedge.testing.FakeServer() as server:
        monkeypatch.setenv("KEDGE_ADDRESS", server.address)
        names = {}
        for program in programs:
            exec(program, names)
        with kedge.connect() as client:
            runs = {info.name: info.status for info in client.list_runs()}
    assert len(programs) == 2
    # 100 batches in exchanges of 20 each; the loss is about 11 at weights of zero.
    assert {name: (status.step, status.loss < 5) for name, status in runs.items()} == {
        "runs/few-messages": (5, True),
        "runs/own-optimizer": (5, True),
    }
