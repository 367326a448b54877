import logging

import ml_dtypes
import numpy as np
import pytest

import kedge
from kedge import optim
from kedge.errors import ConflictError, InvalidInputError, WaitTimeoutError

SGD = optim.SGD(lr=1.0)
ALONE = kedge.Synchronous(quorum=1)


def grad(*values):
    return {"w": np.array(values, np.float32)}


# Steps


def test_step_returns_the_weights_that_came_of_it(new_run):
    with new_run(SGD, ALONE).join() as worker:
        with pytest.raises(ValueError, match="pull the weights first"):
            worker.step_number  # noqa: B018  a property that refuses
        assert worker.pull()["w"] == [3.0]
        assert worker.step_number == 0
        assert worker.step(grad(1))["w"] == [2.0]
        assert worker.step(grad(1))["w"] == [1.0]
        assert worker.step_number == 2
        assert worker.last_result[:4] == ("applied", "QUORUM_REACHED", 2, 0)


def test_push_says_which_step_it_went_into_and_leaves_the_step_number_alone(new_run):
    run = new_run(SGD, ALONE)
    with run.join() as worker:
        worker.pull()
        assert worker.push(grad(1))[:4] == ("applied", "QUORUM_REACHED", 1, 0)
        assert worker.step_number == 0
        assert run.pull()["w"] == [2.0]


def test_round_is_the_mean_weighted_by_example_count(pair):
    run, a, b = pair
    a.push(grad(1), example_count=1)
    b.push(grad(4), example_count=3)

    assert run.pull()["w"] == [3 - (1 * 1 + 3 * 4) / 4]


def test_loss_of_a_step_is_the_mean_over_those_that_sent_one(new_run):
    run = new_run(SGD, kedge.Synchronous(quorum=3))
    workers = [run.join() for _ in range(3)]
    for worker, loss, count in zip(workers, (1.0, None, 4.0), (1, 5, 3), strict=True):
        worker.push(grad(0), loss=loss, example_count=count, base_step=0)

    assert run.status().loss == (1 * 1 + 3 * 4) / 4
    for worker in workers:
        worker.close()


def test_step_waits_for_its_quorum(pair, in_background, eventually):
    run, a, b = pair
    waiting = in_background(a.step, grad(1))
    eventually(lambda: run.status().round == kedge.RoundStatus(contribution_count=1, required_count=2))

    assert b.step(grad(2))["w"] == [1.5]
    assert waiting.result(30)["w"] == [1.5]
    assert a.step_number == b.step_number == 1


def test_many_workers_step_together(new_run, in_background):
    run = new_run(SGD, kedge.Synchronous(quorum=4), {"w": np.array([100.0], np.float32)})
    workers = [run.join() for _ in range(4)]

    def train(worker):
        worker.pull()
        for _ in range(10):
            weights = worker.step(grad(1))
        worker.close()
        return weights["w"]

    assert [future.result(60) for future in [in_background(train, worker) for worker in workers]] == [[90.0]] * 4


def test_asynchronous_contributions_are_a_step_each(new_run):
    run = new_run(SGD, kedge.Asynchronous())
    with run.join() as a, run.join() as b:
        a.pull()
        b.pull()
        assert a.push(grad(1))[:4] == ("applied", "EACH_CONTRIBUTION", 1, 0)
        assert b.push(grad(1))[:4] == ("applied", "EACH_CONTRIBUTION", 2, 1)
        assert a.step(grad(1))["w"] == [0.0]
        assert a.step_number == 3


def test_inverse_scaling_weighs_by_one_over_one_plus_staleness(new_run):
    run = new_run(SGD, kedge.Asynchronous(scaling="inverse"))
    with run.join() as worker:
        worker.pull()
        for _ in range(3):
            worker.push(grad(1), example_count=7)  # which means nothing to a step of one contribution

    assert run.pull()["w"] == pytest.approx([3 - 1 - 1 / 2 - 1 / 3], rel=1e-6)


def test_over_the_bound_of_staleness_is_rejected_and_at_it_applied(new_run):
    with new_run(SGD, kedge.Asynchronous(max_staleness=1)).join() as worker:
        worker.pull()
        assert [worker.push(grad(1))[:4] for _ in range(3)] == [
            ("applied", "EACH_CONTRIBUTION", 1, 0),
            ("applied", "EACH_CONTRIBUTION", 2, 1),
            ("rejected", "STALE_GRADIENT", 2, 2),
        ]


# What is sent


def test_gradients_are_matched_by_name_and_may_have_other_dtypes(new_run):
    run = new_run(SGD, ALONE, {"b": np.zeros(2, np.float32), "a": [np.zeros((), np.float16)]})
    with run.join() as worker:
        worker.pull()
        worker.step({"a": (np.float32(1),), "b": np.array([2, 3], ml_dtypes.bfloat16)})

    pulled = run.pull()
    assert list(pulled) == ["b", "a"]
    assert pulled["a"] == [-1.0]
    assert pulled["b"].tolist() == [-2, -3]


@pytest.mark.parametrize(
    ("grads", "reason", "tensor"),
    [
        ({}, "TENSOR_MISSING", "w"),
        ({"w": np.zeros(1, np.float32), "v": np.zeros(1, np.float32)}, "TENSOR_UNEXPECTED", "v"),
        ({"w": np.zeros(2, np.float32)}, "TENSOR_SHAPE_MISMATCH", "w"),
        ({"w": np.zeros(1)}, "UNSUPPORTED_DTYPE", "w"),
        ({"w": "x"}, "UNSUPPORTED_STRUCTURE", "w"),
    ],
)
def test_gradient_that_does_not_fit_is_not_sent(new_run, grads, reason, tensor):
    run = new_run(SGD, ALONE)
    with run.join() as worker:
        worker.pull()
        for use in (worker.push, worker.step):
            with pytest.raises(InvalidInputError) as error:
                use(grads)
            assert (error.value.reason, error.value.metadata["tensor"]) == (reason, tensor)
        assert run.status().workers[0].last_sequence == 0


@pytest.mark.parametrize(("dtype", "step"), [("bfloat16", 2**-7), ("float16", 2**-10)])
def test_wire_dtype_rounds_what_is_pushed_and_pulled(new_run, dtype, step):
    near = 1 + step + step / 8  # the nearest that the dtype has is 1 + step
    run = new_run(SGD, ALONE, {"w": np.array([near], np.float32)})
    with run.join(wire_dtype=dtype) as worker:
        assert worker.pull()["w"] == [1 + step]
        worker.push(grad(near))

    assert run.pull()["w"] == [np.float32(near) - np.float32(1 + step)]


def test_gradients_of_many_chunks_arrive_whole(new_run):
    given = np.random.default_rng(1).standard_normal(2_500_000).astype(np.float32)
    run = new_run(SGD, ALONE, {"w": given})
    with run.join() as worker:
        worker.pull()
        assert not worker.step({"w": given})["w"].any()


@pytest.mark.parametrize("count", [0, -1])
def test_example_count_below_one_is_refused(new_run, count):
    with new_run(SGD, ALONE).join() as worker:
        worker.pull()
        with pytest.raises(InvalidInputError) as error:
            worker.push(grad(1), example_count=count)

    assert error.value.reason == "INVALID_EXAMPLE_COUNT"


def test_push_before_any_pull_asks_for_the_base_step(new_run):
    with new_run(SGD, ALONE).join() as worker:
        for use in (worker.push, worker.step):
            with pytest.raises(ValueError, match="pull"):
                use(grad(1))
        assert worker.push(grad(1), base_step=0).outcome == "applied"


# What is not applied


def test_contribution_to_an_open_round_is_deferred(pair):
    run, a, b = pair

    assert a.push(grad(1))[:4] == ("deferred", "WAITING_FOR_QUORUM", 0, 0)
    assert run.pull()["w"] == [3.0]
    assert b.push(grad(1)).outcome == "applied"
    assert run.pull()["w"] == [2.0]


def test_second_contribution_to_a_round_is_rejected(pair):
    run, a, b = pair
    a.push(grad(1))

    assert a.push(grad(100))[:4] == ("rejected", "ALREADY_CONTRIBUTED", 0, 0)
    b.push(grad(1))
    assert run.pull()["w"] == [2.0]


def test_step_after_a_deferred_push_goes_on_with_the_next_step(pair, in_background, eventually):
    run, a, b = pair
    a.push(grad(1))
    waiting = in_background(a.step, grad(100))
    eventually(lambda: run.status().rejected_counts == {"ALREADY_CONTRIBUTED": 1})
    b.push(grad(1))

    assert waiting.result(30)["w"] == [2.0]
    assert a.step_number == 1


def test_stale_gradient_is_rejected_with_the_runs_step(new_run):
    run = new_run(SGD, ALONE)
    with run.join() as worker:
        worker.pull()
        worker.push(grad(1))
        result = worker.push(grad(1))

        assert result[:4] == ("rejected", "STALE_GRADIENT", 1, 1)
        assert result.message
        assert run.pull()["w"] == [2.0]


def test_step_with_a_stale_gradient_returns_the_newer_weights(new_run, caplog):
    run = new_run(SGD, ALONE)
    with run.join() as slow, run.join() as fast:
        slow.pull()
        fast.pull()
        fast.step(grad(1))

        assert slow.step(grad(100))["w"] == [2.0]
        assert slow.step_number == 1
        assert slow.last_result.reason == "STALE_GRADIENT"
        assert slow.step(grad(1))["w"] == [1.0]
    assert not caplog.records


def test_gradient_ahead_of_the_run_is_an_error_and_keeps_its_sequence(new_run):
    run = new_run(SGD, ALONE)
    with run.join() as worker:
        with pytest.raises(InvalidInputError) as error:
            worker.push(grad(1), base_step=1)
        assert error.value.reason == "BASE_STEP_AHEAD"
        assert error.value.metadata == {"base_step": "1", "step": "0"}

        epoch = worker.epoch
        assert worker.push(grad(1), base_step=0).outcome == "applied"
        assert worker.epoch == epoch
        assert run.status().workers[0].last_sequence == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_gradient_changes_nothing(new_run, bad):
    run = new_run(optim.Lookahead(optim.Adam(), sync_period=1), ALONE, {"w": np.array([3.0, 4.0], np.float32)})
    with run.join() as worker:
        worker.pull()
        assert worker.push(grad(1, bad))[:4] == ("rejected", "NON_FINITE_GRADIENT", 0, 0)
        assert worker.push(grad(0, 0)).outcome == "applied"

    assert run.pull()["w"].tolist() == run.pull("slow")["w"].tolist() == [3, 4]
    assert run.status().rejected_counts == {"NON_FINITE_GRADIENT": 1}


def test_gradient_whose_squares_float32_cannot_hold_changes_nothing(new_run):
    run = new_run(SGD, ALONE, {"w": np.array([3.0, 4.0], np.float32)})
    with run.join() as worker:
        worker.pull()
        assert worker.push(grad(1.5e19, 1.5e19))[:4] == ("rejected", "GRADIENT_TOO_LARGE", 0, 0)

    assert run.pull()["w"].tolist() == [3, 4]


def test_step_with_a_non_finite_gradient_warns_and_returns_the_weights_there_are(new_run, caplog):
    with new_run(SGD, ALONE).join() as worker, caplog.at_level(logging.WARNING, "kedge"):
        worker.pull()

        assert worker.step(grad(np.nan))["w"] == [3.0]
        assert worker.last_result.outcome == "rejected"
        assert worker.step(grad(1))["w"] == [2.0]
    assert [record.name for record in caplog.records] == ["kedge"]
    assert "NON_FINITE_GRADIENT" in caplog.text


def test_float16_overflow_on_the_wire_is_found(new_run):
    with new_run(SGD, ALONE).join(wire_dtype="float16") as worker:
        worker.pull()
        assert worker.push(grad(1e6)).reason == "NON_FINITE_GRADIENT"


# Reading


def test_without_lookahead_there_are_no_slow_weights(new_run):
    run = new_run(SGD, ALONE)
    with run.join() as worker:
        for use in (run, worker):
            with pytest.raises(ConflictError) as error:
                use.pull("slow")
            assert error.value.reason == "NO_SLOW_WEIGHTS"
        assert worker.pull()["w"] == [3.0]
    assert run.snapshot().slow is None


def test_waiting_for_a_step_ends_in_an_error(new_run):
    run = new_run(SGD, ALONE)
    with run.join() as worker:
        for use in (run, worker):
            with pytest.raises(WaitTimeoutError) as error:
                use.pull(min_step=1, timeout_seconds=0.05)
            assert error.value.reason == "STEP_NOT_REACHED"
            assert error.value.metadata == {"step": "0", "min_step": "1"}
        worker.pull()
        assert worker.step(grad(1))["w"] == [2.0]


def test_pull_waits_for_its_step(new_run, in_background):
    run = new_run(SGD, ALONE)
    reader, waiting = run.join(), None
    with run.join() as worker, reader:
        worker.pull()
        waiting = [in_background(reader.pull, min_step=2), in_background(run.pull, min_step=2)]
        worker.step(grad(1))
        worker.step(grad(1))

        assert [future.result(30)["w"] for future in waiting] == [[1.0], [1.0]]
        assert reader.step_number == 2


@pytest.mark.parametrize("weights", ["both", "", None])
def test_other_weights_than_fast_and_slow_are_a_misuse(new_run, weights):
    with pytest.raises(ValueError, match="fast"):
        new_run(SGD, ALONE).pull(weights)


def test_status_counts_what_became_of_contributions(pair):
    run, a, b = pair
    a.push(grad(1), loss=2.5)
    a.push(grad(1))
    b.push(grad(1))
    b.push(grad(np.nan))
    status = run.status()

    assert (status.step, status.applied_count) == (1, 2)
    assert status.rejected_counts == {"ALREADY_CONTRIBUTED": 1, "NON_FINITE_GRADIENT": 1}
    assert status.round is None
    assert [worker.name for worker in status.workers] == [f"{run.name}/workers/a", f"{run.name}/workers/b"]
    assert [(w.last_sequence, w.applied_count, w.rejected_count) for w in status.workers] == [(2, 1, 1), (2, 1, 1)]
