"""Gradients far above what the workers have sent last: each worker has one vote on what is usual."""

import collections
import itertools
import math

import numpy as np
import pytest

import kedge
from kedge import optim

TAKEN, OUTLIER = "EACH_CONTRIBUTION", "NORM_OUTLIER"


@pytest.fixture
def begin(new_run, numbered_worker):
    """A run, its workers, and a function that lets one push gradients of these norms, and says what came of each."""

    def create(factor=3.0, **admission):
        params, admitted = {"w": np.zeros(1, np.float32)}, kedge.Admission(outlier_factor=factor, **admission)
        run = new_run(optim.SGD(lr=1.0), kedge.Asynchronous(), params, admission=admitted)
        workers, sequences = {}, collections.defaultdict(lambda: itertools.count(1))

        def push(name, *norms):
            if name not in workers:
                workers[name] = numbered_worker(run, name)
            return [workers[name].push(next(sequences[name]), norm).reason for norm in norms]

        return run, workers, push

    return create


def live(run):
    return {worker.name.split("/")[-1] for worker in run.status().workers}


def test_run_whose_gradients_have_grown_is_taken_again_when_half_of_the_last_sixteen_have(begin):
    _, _, push = begin()
    push("a", *[1] * 8)

    assert push("a", *[4] * 10) == [OUTLIER] * 8 + [TAKEN] * 2  # 3 times 1, then 3 times 2.5


def test_median_is_of_the_last_sixteen_of_a_worker(begin):
    _, _, push = begin(20.0)
    push("a", *[1] * 16, *[10] * 8)

    assert push("a", 111, 111) == [OUTLIER, TAKEN]  # 20 times 5.5, then 20 times 10


def test_worker_that_has_sent_nothing_is_judged_by_the_others(begin):
    _, _, push = begin()
    push("a", *[1] * 8)

    assert push("b", 100) == [OUTLIER]


def test_eight_norms_of_all_workers_together_are_enough(begin):
    _, _, push = begin()
    push("a", *[1] * 4)

    assert push("b", 1, 1, 1, 100, 100) == [TAKEN] * 4 + [OUTLIER]


def test_worker_that_sends_more_than_the_others_has_no_more_to_say(begin):
    _, _, push = begin()
    push("a", 1, 1, 1)
    push("b", 1, 1, 1)

    assert push("c", *[100] * 30) == [TAKEN] * 2 + [OUTLIER] * 28
    assert push("a", 3) == [TAKEN]
    assert push("b", 3.1) == [OUTLIER]


def test_limit_is_from_the_median_of_the_workers_medians(begin):
    _, _, push = begin(2.0)
    push("a", *[1] * 3)
    push("b", *[2] * 3)
    push("c", *[4] * 3)

    assert push("a", 4.1, 3.9) == [OUTLIER, TAKEN]  # 2 times 2
    push("d", *[4] * 4)
    assert push("b", 6.1, 5.9) == [OUTLIER, TAKEN]  # 2 times 3


@pytest.mark.parametrize("how", ["leaves", "is evicted", "joins again"])
def test_norms_of_a_worker_count_until_its_lease_ends(begin, numbered_worker, how):
    run, workers, push = begin()
    push("a", *[1] * 8)
    assert push("b", *[10] * 8) == [OUTLIER] + [TAKEN] * 7  # 3 times 1, then 3 times 5.5
    assert push("b", 17) == [OUTLIER]
    if how == "leaves":
        workers["a"].leave()
    elif how == "is evicted":
        run.evict("a")
    else:
        numbered_worker(run, "a")

    assert push("b", 29) == [TAKEN]  # 3 times 10


@pytest.mark.parametrize("unheard", [0.0, math.nan, math.inf, 1e30])
def test_what_has_no_norm_to_speak_of_is_not_remembered(begin, unheard):
    _, _, push = begin(max_norm=1000.0)
    push("a", *[1] * 7, *[unheard] * 8)
    assert push("a", 4, 5) == [TAKEN, OUTLIER]

    push("a", *[unheard] * 20)
    assert push("a", 5, 3) == [OUTLIER, TAKEN]


def test_zero_is_never_an_outlier(begin):
    _, _, push = begin()
    push("a", *[1] * 8)

    assert push("a", 0) == [TAKEN]


def test_norm_above_the_limit_is_remembered(begin):
    _, _, push = begin(max_norm=50.0)
    push("a", *[1] * 8)

    assert push("a", *[60] * 8) == ["NORM_ABOVE_LIMIT"] * 8
    assert push("a", 40) == [TAKEN]  # 3 times 30.5


def test_norms_are_known_before_outliers_are_asked_for(begin):
    run, _, push = begin(None)
    push("a", *[1] * 8)
    run.set_admission(kedge.Admission(outlier_factor=3.0))

    assert push("a", 4) == [OUTLIER]


def test_worker_whose_gradients_alone_are_far_out_is_sent_away(begin):
    run, _, push = begin(quarantine_after=3)
    for name in "abc":
        push(name, 1, 1, 1)

    assert push("c", 100, 100, 100) == [OUTLIER] * 3
    assert live(run) == {"a", "b"}


def test_nobody_is_sent_away_where_the_gradients_of_most_have_grown(begin):
    run, _, push = begin(quarantine_after=2)
    for name in "ab":
        push(name, *[1] * 4)

    assert [push(name, 10) for _ in range(5) for name in "ab"] == [[OUTLIER]] * 8 + [[TAKEN]] * 2
    assert live(run) == {"a", "b"}


def test_only_worker_is_not_sent_away_for_outliers_but_for_what_is_bad_in_itself(begin):
    run, _, push = begin(quarantine_after=2)
    push("a", *[1] * 8)
    push("a", math.nan)
    push("a", *[100] * 4)
    assert live(run) == {"a"}

    push("a", math.nan)
    assert live(run) == set()
