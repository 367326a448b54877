"""The coordinator called by hand: who contributes to what, what becomes of it, and what is told."""

import math
from dataclasses import replace
from typing import Any

import pytest
from coordinator_hand import Hand, reason_of, refused

from kedge.policies import Admission, Asynchronous, BoundedStaleness, Buffered, Policy, Synchronous
from kedge_server.core.coordinator import PullGate

# Buffered


def test_buffer_takes_several_of_one_worker_and_closes_when_full() -> None:
    hand = Hand(Buffered(3), "a", "b")
    first, second = hand.push("a"), hand.push("a")
    assert hand.closed() == []
    assert hand.coordinator.decide(0.0).reason == "BUFFERED"
    third = hand.push("b", base_step=0)
    assert hand.closed() == [("BUFFER_FULL", ["a", "a", "b"])]
    assert not any(contribution.is_held for contribution in (first, second, third))


def test_buffer_that_nobody_fills_is_held_when_its_workers_have_gone() -> None:
    hand = Hand(Buffered(3), "a")
    held = hand.push("a")
    hand.wait(100)
    assert (hand.clocks(), hand.coordinator.held, held.result) == ({}, [held], None)


# Bounded staleness


def test_clock_ticks_with_what_is_recorded_but_not_with_what_was_ahead_of_the_bound() -> None:
    hand = Hand(BoundedStaleness(1), "a", "b")
    assert [hand.push("a").result, hand.push("a", norm=math.nan).result.reason] == [None, "NON_FINITE_GRADIENT"]
    assert hand.clocks() == {"a": 2, "b": 0}
    assert reason_of(hand.push("a")) == "AHEAD_OF_BOUND"
    assert hand.clocks() == {"a": 2, "b": 0}
    hand.push("b", norm=math.nan)
    assert hand.clocks() == {"a": 2, "b": 1}, "a poisoned worker delays nobody"
    assert hand.push("a").result is None


def test_gate_holds_who_is_ahead_and_names_the_facts_and_never_the_slowest() -> None:
    hand = Hand(BoundedStaleness(1), "a", "b")
    hand.push("a")
    assert hand.coordinator.pull_gate("a").is_open
    hand.push("a")
    gate = hand.coordinator.pull_gate("a")
    assert (gate.is_open, gate.facts, gate.bound) == (False, (2, 0), 1)
    assert hand.coordinator.pull_gate("b").is_open
    assert hand.coordinator.waiting_for() == (
        "runs/r/workers/b to contribute: it is at clock 0, others wait at 2, the bound is 1"
    )
    hand.push("b")
    assert hand.coordinator.pull_gate("a").is_open
    assert hand.coordinator.waiting_for() == ""


@pytest.mark.parametrize("how", ["leaves", "expires", "is evicted"])
def test_slowest_worker_that_goes_frees_those_who_wait(how: str) -> None:
    hand = Hand(BoundedStaleness(0), "a")
    hand.join("b", lease_seconds=2)
    hand.push("a")
    assert not hand.coordinator.pull_gate("a").is_open
    if how == "leaves":
        hand.coordinator.leave("b", 2, hand.now)
    elif how == "expires":
        hand.wait(2)
    else:
        hand.coordinator.evict("b", "slow", block_seconds=None, now_seconds=hand.now)
    assert hand.coordinator.pull_gate("a") == PullGate(True, 1, True, (1, 1), 0)


def test_barrier_is_the_step_at_which_the_slowest_clock_rose() -> None:
    hand = Hand(BoundedStaleness(2), "a", "b")
    barriers = []
    for worker in "aabab":
        hand.push(worker)
        barriers.append(hand.coordinator.barrier_step)
    assert hand.clocks() == {"a": 3, "b": 2}
    assert barriers == [0, 0, 3, 3, 5]
    gate = hand.coordinator.pull_gate("a")
    assert (gate.is_open, gate.min_step, gate.is_exact) == (True, 5, False)


def test_newcomer_begins_beside_the_slowest_and_a_takeover_where_the_worker_was() -> None:
    hand = Hand(BoundedStaleness(1), "a", "b")
    hand.push("a")
    hand.push("b")
    hand.push("a")
    hand.join("c")
    hand.join("a")
    assert hand.clocks() == {"a": 2, "b": 1, "c": 1}


def test_who_comes_when_all_have_gone_begins_at_zero_with_all_that_was_made() -> None:
    hand = Hand(BoundedStaleness(0), "a", "b")
    hand.push("a")
    hand.wait(100)
    hand.join("c")
    assert hand.clocks() == {"c": 0}
    assert hand.coordinator.pull_gate("c") == PullGate(True, 1, True, (0, 0), 0)


def test_gate_is_open_without_a_bound_and_without_a_lease() -> None:
    hand = Hand(BoundedStaleness(0), "a")
    assert hand.coordinator.pull_gate("nobody") == PullGate(True)
    hand.set_policy(Asynchronous())
    assert hand.coordinator.pull_gate("a") == PullGate(True)


# The policy changes


@pytest.mark.parametrize("policy", [Asynchronous(), BoundedStaleness(1), Buffered(2), Synchronous(2)])
def test_change_makes_a_step_of_what_is_held_under_the_old_policy(policy: Policy) -> None:
    hand = Hand(Synchronous(3), "a", "b", "c")
    hand.push("a")
    hand.push("b")
    hand.set_policy(policy)
    assert hand.closed() == [("POLICY_CHANGED", ["a", "b"])]
    assert (hand.coordinator.policy, hand.coordinator.closed_step, hand.coordinator.held) == (policy, 1, [])
    assert hand.facts_of("aggregation_changed") == [{"policy": policy}]


def test_change_to_the_same_policy_does_nothing() -> None:
    hand = Hand(Synchronous(3), "a", "b", "c")
    held, told = hand.push("a"), hand.kinds()
    hand.set_policy(Synchronous(3))
    assert (hand.coordinator.held, hand.closed(), hand.kinds()) == ([held], [], told)


def test_change_refuses_what_is_too_little_for_the_old_combination() -> None:
    hand = Hand(Buffered(5, combine="median"), "a")
    pair = [hand.push("a"), hand.push("a")]
    hand.set_policy(Asynchronous())
    assert [reason_of(contribution) for contribution in pair] == ["COHORT_TOO_SMALL"] * 2
    assert (hand.coordinator.closed_step, hand.closed()) == (0, [])
    assert hand.kinds()[-3:] == ["rejected", "rejected", "aggregation_changed"]


def test_what_arrives_after_a_change_is_judged_by_the_new_policy() -> None:
    hand = Hand(Asynchronous(), "a", "b")
    hand.push("a")
    assert hand.push("b", base_step=0).result is None
    hand.set_policy(Synchronous(2))
    assert reason_of(hand.push("b", base_step=0)) == "STALE_GRADIENT"


def test_gathering_begins_anew_with_a_change() -> None:
    hand = Hand(Synchronous(2), "a", "b")
    hand.coordinator.leave("b", 2, hand.now)
    hand.set_policy(Synchronous(3))
    hand.push("a")
    assert hand.closed() == [], "it waits for three to join"
    assert hand.coordinator.waiting_for() == "2 more workers to join: the quorum is 3, 1 live"
    hand.set_policy(Synchronous(1))
    assert hand.closed() == [("POLICY_CHANGED", ["a"])]
    hand.push("a")
    assert hand.closed() == [("QUORUM_REACHED", ["a"])]


def test_clocks_begin_at_zero_with_a_change_and_the_weights_at_its_step() -> None:
    hand = Hand(BoundedStaleness(5), "a", "b")
    for _ in range(3):
        hand.push("a")
    hand.set_policy(BoundedStaleness(0))
    assert hand.clocks() == {"a": 0, "b": 0}
    assert hand.coordinator.pull_gate("a") == PullGate(True, 3, True, (0, 0), 0)


# Admission


def test_quarantine_sends_a_worker_away_at_the_kth_bad_gradient_in_a_row() -> None:
    hand = Hand(Asynchronous(0), "a", admission=Admission(quarantine_after=2, quarantine_seconds=60, max_norm=5.0))
    assert reason_of(hand.push("a", norm=math.nan)) == "NON_FINITE_GRADIENT"
    assert hand.push("a").result is None
    assert reason_of(hand.push("a", norm=9.0)) == "NORM_ABOVE_LIMIT", "the good one between them begins the count anew"
    assert reason_of(hand.push("a", base_step=0)) == "STALE_GRADIENT"
    last = hand.push("a", norm=1e30)
    assert reason_of(last) == "GRADIENT_TOO_LARGE"
    cause = "quarantined: 2 gradients in a row were rejected, the last as GRADIENT_TOO_LARGE"
    assert hand.kinds()[-2:] == ["rejected", "evicted"]
    assert hand.facts_of("evicted") == [
        {"worker_id": "a", "epoch": 1, "reason": "WORKER_EVICTED", "message": cause},
    ]
    for attempt in (lambda: hand.push("a", epoch=1), lambda: hand.join("a")):
        assert refused(attempt).metadata == {"worker": "runs/r/workers/a", "cause": cause}
    assert hand.submit(hand.header("a", 1, 5)) is last, "what was recorded is still answered"
    hand.wait(60)
    hand.join("a")
    assert hand.push("a").result is None


def test_outliers_are_judged_by_the_median_of_what_was_sent_once_eight_were() -> None:
    hand = Hand(Asynchronous(), "a", admission=Admission(outlier_factor=3.0))
    assert all(hand.push("a", norm=norm).result is None for norm in (1, 1, 1, 2, 2, 2, 50))
    assert hand.push("a", norm=70).result is None, "seven are too few to judge by"
    assert reason_of(hand.push("a", norm=6.1)) == "NORM_OUTLIER"  # the median of the eight is 2
    assert hand.push("a", norm=5.9).result is None


@pytest.mark.parametrize("sent", [math.nan, 1e30, 0.0])
def test_norm_that_says_nothing_is_not_remembered(sent: float) -> None:
    hand = Hand(Asynchronous(), "a", admission=Admission(outlier_factor=3.0))
    for norm in [1.0] * 8 + [sent] * 16:
        hand.push("a", norm=norm)
    assert reason_of(hand.push("a", norm=3.1)) == "NORM_OUTLIER"


@pytest.mark.parametrize("how", ["leaves", "expires", "is evicted", "joins again"])
def test_norms_of_a_worker_are_forgotten_with_its_lease(how: str) -> None:
    hand = Hand(Asynchronous(), "b", admission=Admission(outlier_factor=3.0))
    epoch = hand.join("a", lease_seconds=2)
    for worker, norm in (("b", 10), ("a", 1)):
        for _ in range(8):
            hand.push(worker, norm=norm)
    assert reason_of(hand.push("b", norm=17)) == "NORM_OUTLIER"  # 3 times 5.5
    match how:
        case "leaves":
            hand.coordinator.leave("a", epoch, hand.now)
        case "expires":
            hand.wait(2)
        case "is evicted":
            hand.coordinator.evict("a", "", block_seconds=None, now_seconds=hand.now)
        case "joins again":
            hand.join("a")
    assert hand.push("b", norm=29).result is None  # 3 times 10


def test_bad_ones_in_a_row_are_counted_on_under_the_next_lease() -> None:
    hand = Hand(Asynchronous(), "a", admission=Admission(quarantine_after=3, quarantine_seconds=60))
    hand.push("a", norm=math.nan)
    hand.coordinator.leave("a", 1, hand.now)
    hand.join("a")
    hand.push("a", norm=math.nan)
    hand.join("a")
    hand.push("a", norm=math.nan)
    assert hand.facts_of("evicted")[-1]["reason"] == "WORKER_EVICTED"
    hand.wait(60)
    hand.join("a")
    assert hand.push("a").result is None
    hand.push("a", norm=math.nan)
    assert hand.clocks() == {"a": 0}, "the good one has ended the row"


def test_outliers_do_not_count_as_bad_where_most_workers_send_them() -> None:
    hand = Hand(Asynchronous(), "a", "b", "c", admission=Admission(outlier_factor=3.0, quarantine_after=2))
    for worker in "aaabbbccc":
        hand.push(worker)
    for worker in "abcabc":
        assert reason_of(hand.push(worker, norm=50)) == "NORM_OUTLIER"
    assert hand.clocks().keys() == {"a", "b", "c"}


def test_outliers_count_as_bad_where_one_worker_sends_them() -> None:
    hand = Hand(Asynchronous(), "a", "b", "c", admission=Admission(outlier_factor=3.0, quarantine_after=2))
    for worker in "aaabbbcccc":
        hand.push(worker, norm=1 if worker != "c" else 50)
    assert hand.clocks().keys() == {"a", "b"}


def test_rejected_contribution_uses_its_sequence_up_and_changes_nothing_else() -> None:
    hand = Hand(Synchronous(2), "a", "b")
    first = hand.push("a", norm=math.nan)
    assert hand.submit(hand.header("a", 1, 1)) is first
    assert (hand.coordinator.held, hand.coordinator.closed_step) == ([], 0)
    assert hand.push("a").is_held, "it may still contribute to the round"


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ({"sequence": 3}, "SEQUENCE_GAP"),
        ({"sequence": 0}, "SEQUENCE_GAP"),
        ({"base_step": 1}, "BASE_STEP_AHEAD"),
        ({"manifest_digest": b"another"}, "MANIFEST_MISMATCH"),
        ({"example_count": 0}, "INVALID_EXAMPLE_COUNT"),
        ({"epoch": 7}, "WORKER_NOT_FOUND"),
        ({"worker_id": "b"}, "WORKER_NOT_FOUND"),
    ],
)
def test_what_breaks_the_protocol_is_refused_and_leaves_the_sequence_free(header: dict[str, Any], reason: str) -> None:
    hand = Hand(Asynchronous(), "a")
    broken = replace(hand.header("a", 1, 1), **header)
    assert refused(lambda: hand.submit(broken)).reason == reason
    assert refused(lambda: hand.coordinator.check(broken, 0.0)).reason == reason
    assert hand.coordinator.rejected_counts == {}
    assert hand.push("a").header.sequence == 1


def test_full_queue_refuses_with_a_delay_until_a_step_is_applied() -> None:
    hand = Hand(Asynchronous(), "a", contribution_limit=2)
    hand.push("a")
    hand.push("a")
    error = refused(lambda: hand.push("a"))
    assert (error.reason, error.retry_after_seconds) == ("QUEUE_FULL", 0.5)
    hand.coordinator.applied(hand.coordinator.take_closed()[0], is_lookahead_sync=False)
    assert hand.push("a").header.sequence == 3


# Membership and time


def test_old_epoch_is_fenced_but_learns_what_became_of_its_own() -> None:
    hand = Hand(Asynchronous(), "a")
    first = hand.push("a")
    hand.join("a")
    assert refused(lambda: hand.push("a", epoch=1)).reason == "WORKER_SUPERSEDED"
    assert hand.submit(hand.header("a", 1, 1)) is first
    assert hand.kinds() == ["joined", "evicted", "joined"]
    assert hand.facts_of("evicted")[0]["reason"] == "WORKER_SUPERSEDED"


def test_what_an_evicted_worker_contributed_stays_in_the_round() -> None:
    hand = Hand(Synchronous(2), "a", "b")
    hand.push("a")
    hand.coordinator.evict("a", "why not", block_seconds=None, now_seconds=0.0)
    hand.push("b")
    assert hand.closed() == [("QUORUM_REACHED", ["a", "b"])]


def test_evicting_nobody_is_refused() -> None:
    hand = Hand(Asynchronous(), "a")
    error = refused(lambda: hand.coordinator.evict("b", "", block_seconds=5, now_seconds=0.0))
    assert (error.reason, error.metadata) == ("WORKER_NOT_FOUND", {"worker": "runs/r/workers/b"})
    assert hand.join("b") == 2, "nothing was blocked"


def test_call_that_comes_after_a_lease_ended_finds_it_ended_even_before_the_timer() -> None:
    hand = Hand(Synchronous(2), "a", "b")
    hand.push("a")
    hand.now = 11.0
    assert refused(lambda: hand.coordinator.heartbeat("b", 2, hand.now)).reason == "LEASE_EXPIRED"
    assert [about["worker_id"] for about in hand.facts_of("evicted")] == ["a", "b"]


def test_it_says_when_to_look_again() -> None:
    hand = Hand(Synchronous(2, timeout_seconds=3))
    assert hand.coordinator.due_at_seconds is None
    hand.join("a", lease_seconds=10)
    assert hand.coordinator.due_at_seconds == 10
    hand.now = 1.0
    hand.push("a")
    assert hand.coordinator.due_at_seconds == 4
    hand.wait(3)
    assert hand.closed() == [("TIMEOUT", ["a"])]
    assert hand.coordinator.due_at_seconds == 11, "the contribution was a sign of life"


def test_waiting_for_workers_is_told_whenever_it_changes_and_not_again() -> None:
    hand = Hand(Synchronous(3), "a")
    hand.push("a")
    hand.join("b")
    hand.coordinator.advance(1.0)
    hand.join("c")
    assert [about["message"] for about in hand.facts_of("waiting")] == [
        "2 more workers to join: the quorum is 3, 1 live",
        "1 more worker to join: the quorum is 3, 2 live",
    ]
    hand.wait(100)
    hand.join("a")
    assert hand.facts_of("waiting")[-1]["message"] == "2 more workers to join: the quorum is 3, 1 live"


def test_applied_round_settles_its_contributions_and_tells_the_step_before_the_lookahead_sync() -> None:
    hand = Hand(Synchronous(2), "a", "b")
    pair = [hand.push("a"), hand.push("b")]
    assert [contribution.result for contribution in pair] == [None, None], "closed is not yet applied"
    hand.coordinator.applied(hand.coordinator.take_closed()[0], is_lookahead_sync=True)
    assert [(c.result.outcome, c.result.reason, c.result.step) for c in pair] == [("applied", "QUORUM_REACHED", 1)] * 2
    assert hand.coordinator.applied_count == 2
    assert [lease.applied_count for lease in hand.coordinator.leases.live] == [1, 1]
    assert hand.kinds()[-2:] == ["step", "lookahead_sync"]
    assert hand.facts_of("step") == [{"reason": "QUORUM_REACHED", "contribution_count": 2, "loss": None}]
