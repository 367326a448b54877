"""Workers that send what no run takes: a synchronous round does not wait for them; they are among the bad ones."""

import math

import numpy as np
import pytest

import kedge
from kedge import optim

SGD = optim.SGD(lr=1.0)
ZERO = {"w": np.zeros(1, np.float32)}


def test_round_goes_on_without_a_worker_whose_gradient_is_nan(new_run, numbered_worker):
    run = new_run(SGD, kedge.Synchronous(2), ZERO)
    good, bad = numbered_worker(run, "good"), numbered_worker(run, "bad")
    assert bad.push(1, math.nan).reason == "NON_FINITE_GRADIENT"
    result = good.push(1, 4, wait_seconds=60)
    assert (result.outcome, result.reason) == ("applied", "ALL_LIVE_CONTRIBUTED")
    assert run.pull()["w"] == [-4.0]


def test_round_that_waits_for_a_worker_goes_on_when_its_gradient_is_nan(new_run, numbered_worker, in_background):
    run = new_run(SGD, kedge.Synchronous(2), ZERO)
    good, bad = numbered_worker(run, "good"), numbered_worker(run, "bad")
    assert good.push(1, 4).outcome == "deferred"
    waiting = in_background(good.push, 1, 4, wait_seconds=60)
    bad.push(1, math.inf)
    assert waiting.result(30).outcome == "applied"


def test_worker_may_still_send_a_good_one_for_the_same_round(new_run, numbered_worker):
    run = new_run(SGD, kedge.Synchronous(3), ZERO)
    workers = [numbered_worker(run, name) for name in "abc"]
    workers[0].push(1, math.nan)
    workers[0].push(2, 3)
    workers[1].push(1, 6)
    assert run.status().step == 0
    assert workers[2].push(1, 9, wait_seconds=60).reason == "QUORUM_REACHED"
    assert run.pull()["w"] == [-6.0]


@pytest.mark.parametrize(
    ("combine", "good", "bad_count", "expected"),
    [
        # One bad of three is what a median bears: what is left are two good ones.
        ({"combine": "median"}, (2, 4), 1, -3.0),
        ({"combine": "trimmed_mean"}, (2, 4), 1, -3.0),
        # One of the two bad ones that it bears is known: one more is left out at each end.
        ({"combine": "trimmed_mean", "trim_count": 2}, (1, 2, 3, 1000), 1, -2.5),
        ({"combine": "trimmed_mean", "trim_count": 2}, (1, 2, 6), 2, -3.0),
        ({"combine": "median"}, (1, 2, 6), 2, -2.0),
    ],
)
def test_bad_contribution_that_was_kept_out_is_one_that_the_combination_bears(
    new_run, numbered_worker, combine, good, bad_count, expected
):
    run = new_run(SGD, kedge.Synchronous(len(good) + bad_count, **combine), ZERO)
    workers = [numbered_worker(run, f"w{number}") for number in range(len(good) + bad_count)]
    for worker in workers[len(good) :]:
        worker.push(1, math.nan)
    for worker, value in zip(workers, good, strict=False):
        worker.push(1, value)
    assert run.pull(min_step=1)["w"].tolist() == pytest.approx([expected])


@pytest.mark.parametrize("combine", ["median", "trimmed_mean"])
def test_round_with_more_bad_ones_than_can_be_borne_is_refused(new_run, numbered_worker, combine):
    run = new_run(SGD, kedge.Synchronous(3, combine=combine), ZERO)
    workers = [numbered_worker(run, name) for name in "abc"]
    for worker in workers[1:]:
        worker.push(1, math.nan)
    assert workers[0].push(1, 1, wait_seconds=60).reason == "COHORT_TOO_SMALL"
    assert run.status().step == 0
