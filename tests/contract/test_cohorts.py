"""Rounds with too few contributions for a trimmed mean or a median: they wait for more workers, and say so."""

import numpy as np
import pytest

import kedge
from kedge import optim

SGD = optim.SGD(lr=1.0)
ZERO = {"w": np.zeros(1, np.float32)}
MEDIAN = kedge.Synchronous(3, combine="median")
TRIMMED = kedge.Synchronous(5, combine="trimmed_mean", trim_count=2)


@pytest.fixture
def short(new_run, numbered_worker):
    """A median's run that had three workers, and the two that are left; their contributions are held."""
    run = new_run(SGD, MEDIAN, ZERO)
    a, b, c = (numbered_worker(run, name) for name in "abc")
    a.push(1, 1)
    c.leave()
    assert b.push(1, 5).outcome == "deferred"
    return run, a, b


def test_round_of_all_live_workers_waits_where_they_are_too_few(short):
    run, a, b = short

    for worker in (a, b):
        assert worker.push(1, 1)[:4] == ("deferred", "WAITING_FOR_COHORT", 0, 0)
    status = run.status()
    assert status.round == kedge.RoundStatus(contribution_count=2, required_count=3)
    assert (status.step, status.rejected_counts) == (0, {})
    assert status.waiting_for == "1 more worker to join: a median needs 3 contributions, 2 live"


def test_worker_that_joins_completes_it(short, numbered_worker):
    run, a, _ = short
    c = numbered_worker(run, "c")
    assert a.push(1, 1)[:2] == ("deferred", "WAITING_FOR_COHORT")

    assert c.push(1, 2)[:3] == a.push(1, 1)[:3] == ("applied", "QUORUM_REACHED", 1)
    assert run.pull()["w"] == [-2.0]


def test_step_waits_for_the_worker_that_completes_it(new_run, in_background, eventually):
    run = new_run(SGD, MEDIAN, ZERO)
    with run.join("a") as a, run.join("b") as b, run.join("c") as c:
        for worker in (a, b):
            worker.pull()
        waiting = [in_background(worker.step, {"w": np.ones(1, np.float32)}) for worker in (a, b)]
        c.close()
        eventually(lambda: (run.status().round or kedge.RoundStatus(0, 0)).contribution_count == 2)
        assert not any(future.done() for future in waiting)
        with run.join("d") as d:
            d.push({"w": np.full(1, 7, np.float32)}, base_step=0)

            assert [future.result(30)["w"] for future in waiting] == [[-1.0], [-1.0]]


def test_round_that_everyone_has_left_keeps_what_it_has(short, numbered_worker):
    run, a, b = short
    a.leave()
    b.leave()
    assert run.status().round == kedge.RoundStatus(contribution_count=2, required_count=3)
    assert run.status().waiting_for == ""

    c = numbered_worker(run, "c")
    assert c.push(1, 2)[:3] == ("applied", "QUORUM_REACHED", 1)
    assert run.pull()["w"] == [-2.0]


def test_change_of_policy_refuses_it(short):
    run, a, b = short
    assert run.set_aggregation(kedge.Synchronous(2)) == 1

    for worker in (a, b):
        refused = worker.push(1, 1)
        assert refused[:4] == ("rejected", "COHORT_TOO_SMALL", 0, 0)
        assert refused.message
    assert run.status().rejected_counts == {"COHORT_TOO_SMALL": 2}
    assert run.pull()["w"] == [0.0]


def test_time_limit_refuses_it(new_run, numbered_worker):
    run = new_run(SGD, kedge.Synchronous(3, combine="median", timeout_seconds=0.1), ZERO)
    a, b, c = (numbered_worker(run, name) for name in "abc")
    c.leave()
    a.push(1, 1)

    assert a.push(1, 1, wait_seconds=60)[:2] == ("rejected", "COHORT_TOO_SMALL")
    assert b.push(1, 1, wait_seconds=60)[:2] == ("rejected", "COHORT_TOO_SMALL")
    assert run.status().step == 0


@pytest.mark.parametrize(
    ("policy", "live", "said"),
    [
        (MEDIAN, 1, "2 more workers to join: a median needs 3 contributions, 1 live"),
        (TRIMMED, 4, "1 more worker to join: a trimmed mean needs 5 contributions, 4 live"),
        (TRIMMED, 2, "3 more workers to join: a trimmed mean needs 5 contributions, 2 live"),
    ],
)
def test_run_says_that_workers_are_missing_before_anyone_has_contributed(new_run, numbered_worker, policy, live, said):
    run = new_run(SGD, policy, ZERO)
    workers = [numbered_worker(run, f"w{number}") for number in range(policy.quorum)]
    for worker in workers[live:]:
        worker.leave()

    assert run.status().waiting_for == said


def test_workers_that_are_missing_are_told_each_time_that_they_are_others(new_run, numbered_worker, take):
    run = new_run(SGD, MEDIAN, ZERO)
    a, b, c = (numbered_worker(run, name) for name in "abc")
    with run.watch() as watch:
        c.leave()
        a.push(1, 1)
        b.leave()
        numbered_worker(run, "d")
        numbered_worker(run, "e")
        events = take(watch, 7)

    joining = "to join: a median needs 3 contributions"
    assert [(event.kind, event.message) for event in events] == [
        ("left", ""),
        ("waiting", f"1 more worker {joining}, 2 live"),
        ("left", ""),
        ("waiting", f"2 more workers {joining}, 1 live"),
        ("joined", ""),
        ("waiting", f"1 more worker {joining}, 2 live"),
        ("joined", ""),
    ]


def test_as_many_as_are_needed_do_though_the_quorum_is_larger(new_run, numbered_worker):
    run = new_run(SGD, kedge.Synchronous(4, combine="median"), ZERO)
    a, b, c, d = (numbered_worker(run, name) for name in "abcd")
    a.push(1, 1)
    b.push(1, 9)
    d.leave()

    assert c.push(1, 2)[:3] == ("applied", "ALL_LIVE_CONTRIBUTED", 1)
    assert run.pull()["w"] == [-2.0]
