"""Whom a round waits for, and when it has enough: the coordinator called by hand."""

import math

import pytest
from coordinator_hand import Hand, reason_of

from kedge.policies import Synchronous

# Who is awaited


def test_last_worker_that_goes_leaves_a_step_behind_if_the_run_was_formed() -> None:
    hand = Hand(Synchronous(2), "a", "b")
    hand.push("a")
    hand.coordinator.leave("a", 1, hand.now)
    assert hand.closed() == []
    hand.coordinator.leave("b", 2, hand.now)
    assert hand.closed() == [("ALL_LIVE_CONTRIBUTED", ["a"])]
    hand.join("a")
    hand.push("a")
    assert hand.closed() == [], "it gathers anew"


def test_round_ends_when_all_leases_run_out_at_once() -> None:
    hand = Hand(Synchronous(3), "a", "b", "c")
    hand.push("a")
    hand.wait(100)
    assert (hand.clocks(), hand.closed()) == ({}, [("ALL_LIVE_CONTRIBUTED", ["a"])])


def test_join_after_all_leases_ran_out_finds_the_round_ended() -> None:
    hand = Hand(Synchronous(2), "a", "b")
    hand.push("a")
    hand.now = 100.0
    hand.join("b")
    assert hand.closed() == [("ALL_LIVE_CONTRIBUTED", ["a"])]


@pytest.mark.parametrize(("seconds_later", "is_awaited"), [(0.0, True), (0.1, False)])
def test_worker_that_joined_after_the_round_was_opened_is_not_awaited(seconds_later: float, is_awaited: bool) -> None:
    hand = Hand(Synchronous(3), "a", "b", "c", now=1.0)
    hand.coordinator.leave("c", 3, hand.now)
    hand.push("a")
    hand.now += seconds_later
    hand.join("d")
    hand.push("b")
    assert bool(hand.closed()) != is_awaited


def test_worker_that_joined_before_the_round_was_opened_is_awaited() -> None:
    hand = Hand(Synchronous(3), "a", "b", "c")
    hand.coordinator.leave("c", 3, hand.now)
    hand.now = 1.0
    hand.join("d")
    hand.now = 2.0
    hand.push("a")
    hand.push("b")
    assert hand.closed() == []
    hand.push("d")
    assert hand.closed() == [("QUORUM_REACHED", ["a", "b", "d"])]


def test_worker_that_joined_late_may_contribute() -> None:
    hand = Hand(Synchronous(4), "a", "b", "c", "x")
    hand.coordinator.leave("x", 4, hand.now)
    hand.push("a")
    hand.now = 1.0
    hand.join("d")
    assert hand.push("d").is_held
    hand.push("b")
    assert hand.closed() == []
    hand.push("c")
    assert hand.closed() == [("QUORUM_REACHED", ["a", "d", "b", "c"])]


def test_workers_are_awaited_that_joined_before_the_run_was_formed() -> None:
    hand = Hand(Synchronous(3), "a")
    hand.push("a")
    hand.now = 1.0
    hand.join("b")
    hand.now = 2.0
    hand.join("c")
    hand.coordinator.leave("c", 3, hand.now)
    assert hand.closed() == []
    hand.push("b")
    assert hand.closed() == [("ALL_LIVE_CONTRIBUTED", ["a", "b"])]


def test_worker_in_a_crash_loop_is_awaited_no_longer_than_until_it_joins_again() -> None:
    hand = Hand(Synchronous(2), "a", "b")
    hand.push("a")
    hand.now = 1.0
    hand.join("b")
    assert hand.closed() == [("ALL_LIVE_CONTRIBUTED", ["a"])]


def test_bad_one_excuses_its_worker_once_another_has_sent_nothing_but_good_ones() -> None:
    hand = Hand(Synchronous(3), "a", "b", "c")
    for worker in "abc":
        hand.push(worker, norm=math.nan)
    hand.push("a")
    hand.push("b")
    assert hand.closed() == []
    hand.push("c")
    assert hand.closed() == [("QUORUM_REACHED", ["a", "b", "c"])]
    hand.push("a", norm=math.nan)
    hand.push("b", norm=math.nan)
    hand.push("b")
    assert hand.closed() == [], "c has not been heard of"
    hand.push("c")
    assert hand.closed() == [("ALL_LIVE_CONTRIBUTED", ["b", "c"])]


def test_round_that_has_closed_knows_how_many_bad_ones_stood_for_contributions() -> None:
    hand = Hand(Synchronous(5, combine="trimmed_mean", trim_count=2), *"abcde")
    for worker in "de":
        hand.push(worker, norm=math.nan)
    for worker in "eabc":
        hand.push(worker)
    (closed,) = hand.coordinator.take_closed()
    assert (len(closed.contributions), closed.unfit_count) == (4, 1)


def test_bad_one_of_a_worker_that_has_gone_stands_for_nothing() -> None:
    hand = Hand(Synchronous(3, combine="median"), "a", "b", "c")
    hand.push("c", norm=math.nan)
    hand.push("a")
    hand.coordinator.leave("c", 3, hand.now)
    hand.push("b")
    assert (hand.closed(), hand.coordinator.decide(hand.now).reason) == ([], "WAITING_FOR_COHORT")


def test_names_that_come_and_go_with_a_bad_one_each_do_not_pile_up() -> None:
    hand = Hand(Synchronous(3), "a", "b")
    for number in range(100):
        epoch = hand.join(f"w{number}")
        hand.push(f"w{number}", norm=math.nan)
        hand.coordinator.leave(f"w{number}", epoch, hand.now)
    assert len(hand.coordinator._round.unfit_worker_ids) <= 9, "the limit of workers is 8"


# Robust combinations


def test_round_too_small_for_its_median_waits_until_another_worker_completes_it() -> None:
    hand = Hand(Synchronous(3, combine="median"), "a", "b", "c")
    hand.push("a")
    hand.push("b")
    hand.coordinator.leave("c", 3, hand.now)
    assert hand.coordinator.decide(hand.now).reason == "WAITING_FOR_COHORT"
    said = "1 more worker to join: a median needs 3 contributions, 2 live"
    assert hand.coordinator.waiting_for() == hand.facts_of("waiting")[-1]["message"] == said
    hand.join("d")
    assert hand.closed() == []
    hand.push("d")
    assert hand.closed() == [("QUORUM_REACHED", ["a", "b", "d"])]


def test_round_too_small_for_its_median_is_kept_when_everyone_has_gone() -> None:
    hand = Hand(Synchronous(3, combine="median"), "a", "b", "c")
    hand.push("a")
    hand.push("b")
    hand.wait(100)
    assert (hand.clocks(), hand.closed(), len(hand.coordinator.held)) == ({}, [], 2)
    hand.join("c")
    hand.push("c")
    assert hand.closed() == [("QUORUM_REACHED", ["a", "b", "c"])]


def test_round_that_runs_out_of_time_too_small_for_its_median_is_refused_and_the_next_begins() -> None:
    hand = Hand(Synchronous(3, combine="median", timeout_seconds=1), "a", "b", "c")
    pair = [hand.push("a"), hand.push("b")]
    hand.coordinator.leave("c", 3, hand.now)
    hand.wait(1)
    assert [reason_of(contribution) for contribution in pair] == ["COHORT_TOO_SMALL"] * 2
    assert "2 of the 3" in pair[0].result.message
    assert (hand.coordinator.closed_step, hand.closed()) == (0, [])
    assert hand.coordinator.rejected_counts == {"COHORT_TOO_SMALL": 2}
    assert [lease.rejected_count for lease in hand.coordinator.leases.live] == [1, 1]
    hand.join("c")
    for name in "abc":
        hand.push(name)
    assert hand.closed() == [("QUORUM_REACHED", ["a", "b", "c"])]


def test_refused_round_frees_the_queue_and_keeps_its_sequences_used_up() -> None:
    hand = Hand(Synchronous(3, combine="median", timeout_seconds=1), "a", contribution_limit=3)
    first = hand.push("a")
    hand.wait(1)
    assert reason_of(first) == "COHORT_TOO_SMALL"
    again = hand.submit(hand.header("a", 1, 1))
    assert again is first
    for _ in range(4):
        hand.push("a")
        hand.wait(1)
    assert hand.coordinator.rejected_counts == {"COHORT_TOO_SMALL": 5}
