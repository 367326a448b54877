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
        # Of so many there is room to leave one out at each end, whoever sent it.
        ({"combine": "trimmed_mean", "trim_count": 2}, (1, 2, 3, 1000), 1, -2.5),
        ({"combine": "trimmed_mean", "trim_count": 2}, (1, 2, 6), 2, -2.0),
        ({"combine": "trimmed_mean", "trim_count": 1}, (0, 1, 2, 1000), 1, -1.5),
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
def test_round_with_more_bad_ones_than_can_be_borne_waits_for_good_ones(new_run, numbered_worker, combine):
    run = new_run(SGD, kedge.Synchronous(3, combine=combine), ZERO)
    a, b, c = (numbered_worker(run, name) for name in "abc")
    for worker in (b, c):
        worker.push(1, math.nan)
    assert a.push(1, 1)[:2] == ("deferred", "WAITING_FOR_COHORT")
    assert run.status().round == kedge.RoundStatus(contribution_count=1, required_count=3)

    assert b.push(2, 5)[:3] == ("applied", "ALL_LIVE_CONTRIBUTED", 1)
    assert run.pull()["w"] == [-3.0]


def test_after_a_batch_that_is_bad_everywhere_all_have_their_chance(new_run, numbered_worker):
    run = new_run(SGD, kedge.Synchronous(3), ZERO)
    workers = [numbered_worker(run, name) for name in "abc"]
    for worker in workers:
        worker.push(1, math.nan)
    results = [worker.push(2, value) for worker, value in zip(workers, (3, 6, 9), strict=True)]

    assert [result[:2] for result in results] == [
        *[("deferred", "WAITING_FOR_QUORUM")] * 2,
        ("applied", "QUORUM_REACHED"),
    ]
    assert run.pull()["w"] == [-6.0]


def test_nobody_is_excused_until_one_has_sent_nothing_but_good_ones(new_run, numbered_worker):
    run = new_run(SGD, kedge.Synchronous(3), ZERO)
    a, b, c = (numbered_worker(run, name) for name in "abc")
    a.push(1, math.nan)
    b.push(1, math.nan)
    assert a.push(2, 2).outcome == "deferred"
    assert run.status().round == kedge.RoundStatus(contribution_count=1, required_count=3)

    assert c.push(1, 4)[:3] == ("applied", "ALL_LIVE_CONTRIBUTED", 1)
    assert run.pull()["w"] == [-3.0]


def test_who_sent_a_bad_one_is_awaited_again_in_the_next_round(new_run, numbered_worker):
    run = new_run(SGD, kedge.Synchronous(2), ZERO)
    good, bad = numbered_worker(run, "good"), numbered_worker(run, "bad")
    bad.push(1, math.nan)
    assert good.push(1, 1).outcome == "applied"

    assert good.push(2, 1, base_step=1).outcome == "deferred"
    assert bad.push(2, 1, base_step=1)[:3] == ("applied", "QUORUM_REACHED", 2)


def test_worker_that_sent_a_bad_one_and_went_stands_for_no_contribution(new_run, numbered_worker):
    run = new_run(SGD, kedge.Synchronous(3, combine="median"), ZERO)
    a, b, c = (numbered_worker(run, name) for name in "abc")
    c.push(1, math.nan)
    a.push(1, 1)
    c.leave()

    assert b.push(1, 3)[:2] == ("deferred", "WAITING_FOR_COHORT")


def test_worker_that_sends_nan_after_all_others_have_mended_holds_nobody_up(new_run, numbered_worker):
    run = new_run(SGD, kedge.Synchronous(2), ZERO)
    good, bad = numbered_worker(run, "good"), numbered_worker(run, "bad")
    good.push(1, math.nan)
    bad.push(1, math.nan)
    assert good.push(2, 5).outcome == "deferred", "both have sent a bad one: both get their chance"
    bad.push(2, math.nan)
    assert run.pull(min_step=1, timeout_seconds=60)["w"] == [-5.0]
