"""Buffered: a step of so many contributions, and nobody waits."""

import numpy as np
import pytest

import kedge
from kedge import optim

SGD = optim.SGD(lr=1.0)


def grad(*values):
    return {"w": np.array(values, np.float32)}


def test_push_is_answered_at_once_until_one_fills_the_buffer(new_run):
    run = new_run(SGD, kedge.Buffered(3))
    with run.join("a") as a, run.join("b") as b:
        assert a.push(grad(1), base_step=0, wait_seconds=1000)[:4] == ("deferred", "BUFFERED", 0, 0)
        assert a.push(grad(2), base_step=0, wait_seconds=1000)[:4] == ("deferred", "BUFFERED", 0, 0)
        assert run.status().round == kedge.RoundStatus(contribution_count=2, required_count=3)
        assert run.status().waiting_for == ""
        assert b.push(grad(6), base_step=0)[:4] == ("applied", "BUFFER_FULL", 1, 0)

    assert run.pull()["w"] == [0.0]
    status = run.status()
    assert (status.step, status.applied_count, status.round) == (1, 3, None)


def test_buffered_push_learns_later_what_became_of_it(new_run, numbered_worker):
    run = new_run(SGD, kedge.Buffered(2))
    worker = numbered_worker(run, "a")
    for _ in range(2):
        assert worker.push(1, 1, wait_seconds=1000)[:4] == ("deferred", "BUFFERED", 0, 0)
    worker.push(2, 1)

    assert worker.push(1, 1)[:4] == ("applied", "BUFFER_FULL", 1, 0)
    assert run.status().applied_count == 2


def test_step_goes_on_with_the_weights_there_are(new_run):
    run = new_run(SGD, kedge.Buffered(2))
    with run.join() as worker:
        worker.pull()
        assert worker.step(grad(1))["w"] == [3.0]
        assert worker.last_result[:2] == ("deferred", "BUFFERED")
        assert worker.step_number == 0
        assert worker.step(grad(1))["w"] == [2.0]
        assert worker.last_result[:2] == ("applied", "BUFFER_FULL")
        assert worker.step_number == 1


def test_mean_is_weighted_by_example_count_and_scaled_by_staleness(new_run):
    run = new_run(SGD, kedge.Buffered(2))
    with run.join() as worker:
        worker.push(grad(1), base_step=0, example_count=1)
        worker.push(grad(4), base_step=0, example_count=3)
        assert run.pull()["w"] == [3 - (1 * 1 + 3 * 4) / 4]

        worker.push(grad(8), base_step=0, example_count=1)
        result = worker.push(grad(2), base_step=1, example_count=3)
        assert result[:4] == ("applied", "BUFFER_FULL", 2, 0)
        assert run.pull()["w"] == [-0.25 - (1 / 4 * 1 / 2 * 8 + 3 / 4 * 2)]


def test_without_scaling_staleness_does_not_matter(new_run):
    run = new_run(SGD, kedge.Buffered(1, scaling="none"))
    with run.join() as worker:
        for _ in range(3):
            worker.push(grad(1), base_step=0)

    assert run.pull()["w"] == [0.0]


def test_trimmed_mean_is_of_the_scaled_contributions(new_run):
    run = new_run(SGD, kedge.Buffered(3, combine="trimmed_mean"))
    with run.join() as worker:
        for _ in range(3):
            worker.push(grad(0), base_step=0)
        worker.push(grad(8), base_step=0)  # counts 4
        worker.push(grad(1), base_step=1)
        worker.push(grad(100), base_step=1)

    assert run.pull()["w"] == [3 - 4]


def test_over_the_bound_of_staleness_is_rejected_and_at_it_taken(new_run):
    run = new_run(SGD, kedge.Buffered(1, max_staleness=1, scaling="none"))
    with run.join() as worker:
        assert [worker.push(grad(1), base_step=0)[:4] for _ in range(3)] == [
            ("applied", "BUFFER_FULL", 1, 0),
            ("applied", "BUFFER_FULL", 2, 1),
            ("rejected", "STALE_GRADIENT", 2, 2),
        ]


@pytest.mark.parametrize("end", [lambda run, a: a.close(), lambda run, a: run.evict("a")], ids=["left", "evicted"])
def test_contributions_of_a_worker_that_is_gone_stay_in_the_buffer(new_run, end):
    run = new_run(SGD, kedge.Buffered(2))
    with run.join("a") as a, run.join("b") as b:
        a.push(grad(1), base_step=0)
        end(run, a)
        assert run.status().round == kedge.RoundStatus(contribution_count=1, required_count=2)
        b.push(grad(3), base_step=0)

    assert run.pull()["w"] == [1.0]
