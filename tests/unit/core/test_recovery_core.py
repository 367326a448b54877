"""A coordinator that is killed, and goes on from what was written: contributions, workers, clocks."""

import math
from collections.abc import Callable

import pytest
from coordinator_hand import reason_of, refused
from durable_hand import DurableHand

from kedge.policies import Admission, Asynchronous, BoundedStaleness, Buffered, Synchronous
from kedge_server.core.image import RunImage

# Contributions across a crash


def test_what_is_part_of_a_written_step_is_answered_alike_for_ever_and_not_taken_again() -> None:
    hand = DurableHand(Synchronous(2), "a", "b")
    hand.push("a")
    hand.push("b")
    hand.step()
    before = [hand.again(worker, epoch, 1, base_step=0).result for worker, epoch in (("a", 1), ("b", 2))]
    hand.crash()
    after = [hand.again(worker, epoch, 1, base_step=0).result for worker, epoch in (("a", 1), ("b", 2))]
    assert before == after
    assert [result.step for result in after if result] == [1, 1]
    assert (hand.coordinator.closed_step, hand.coordinator.applied_count, hand.step()) == (1, 2, [])


def test_step_that_was_not_written_never_was_and_its_contributions_come_again() -> None:
    hand = DurableHand(Synchronous(1), "a")
    hand.push("a")
    assert hand.coordinator.closed_step == 1
    hand.crash()
    assert (hand.coordinator.closed_step, hand.coordinator.held) == (0, [])
    hand.again("a", 1, 1)
    assert [closed.step for closed in hand.step()] == [1]
    assert hand.lease_state("a").applied_count == 1


def test_contribution_that_was_taken_and_not_answered_leaves_a_hole_behind_a_later_rejection() -> None:
    hand = DurableHand(Synchronous(2), "a", "b")
    hand.push("a")
    assert reason_of(hand.push("a")) == "ALREADY_CONTRIBUTED"
    hand.crash()
    assert (hand.lease_state("a").holes, hand.lease_state("a").last_sequence) == ((1,), 2)
    assert hand.coordinator.held == []
    assert hand.result_of("a", 1, 2) == ("rejected", "ALREADY_CONTRIBUTED", 0)
    again = hand.again("a", 1, 1)
    assert hand.coordinator.held == [again]
    hand.again("b", 2, 1)
    hand.step()
    assert hand.result_of("a", 1, 1) == ("applied", "QUORUM_REACHED", 1)
    assert (hand.lease_state("a").holes, hand.lease_state("a").last_sequence) == ((), 2)
    assert (hand.lease_state("a").applied_count, hand.lease_state("a").rejected_count) == (1, 1)


def test_next_sequence_after_a_hole_is_taken_before_it_is_filled() -> None:
    hand = DurableHand(Buffered(9), "a")
    hand.push("a")
    hand.push("a", norm=math.nan)
    hand.crash()
    third = hand.again("a", 1, 3, base_step=0)
    first = hand.again("a", 1, 1, base_step=0)
    assert hand.coordinator.held == [third, first]
    assert refused(lambda: hand.again("a", 1, 5)).reason == "SEQUENCE_GAP"


def test_held_contribution_waits_on_after_a_crash_and_is_in_one_step() -> None:
    hand = DurableHand(Synchronous(2), "a", "b")
    hand.hold(hand.push("a"))
    hand.crash()
    [held] = hand.coordinator.held
    assert (held.header.worker_id, held.header.sequence, held.is_held, held.result) == ("a", 1, True, None)
    assert hand.again("a", 1, 1) is held, "a repetition finds it"
    hand.again("b", 2, 1)
    [closed] = hand.step()
    assert [c.header.worker_id for c in closed.contributions] == ["a", "b"]
    assert (hand.state().held, hand.coordinator.held) == ((), [])
    hand.crash()
    assert (hand.coordinator.held, hand.state().applied_count) == ([], 2)
    assert hand.result_of("a", 1, 1) == ("applied", "QUORUM_REACHED", 1)


def test_buffer_keeps_several_held_ones_of_one_worker_in_their_order_and_loses_those_nobody_was_told_of() -> None:
    hand = DurableHand(Buffered(4), "a", "b")
    kept = [hand.push("a"), hand.push("b"), hand.push("a")]
    hand.hold(kept[2])
    hand.hold(kept[0])
    hand.crash()
    names = [(c.header.worker_id, c.header.sequence) for c in hand.coordinator.held]
    assert names == [("a", 2), ("a", 1)], "b's was not told, so b comes again"
    hand.again("b", 2, 1)
    hand.again("b", 2, 2)
    [closed] = hand.step()
    assert [(c.header.worker_id, c.header.sequence) for c in closed.in_order()] == [
        ("a", 1),
        ("a", 2),
        ("b", 1),
        ("b", 2),
    ]


def test_held_contribution_of_a_cohort_that_is_too_small_is_rejected_and_stays_so() -> None:
    hand = DurableHand(Synchronous(3, combine="median", timeout_seconds=5.0), "a", "b", "c")
    hand.hold(hand.push("a"))
    hand.crash()
    hand.wait(5.0)
    assert hand.result_of("a", 1, 1) == ("rejected", "COHORT_TOO_SMALL", 0)
    hand.crash()
    assert hand.coordinator.held == []
    assert hand.result_of("a", 1, 1) == ("rejected", "COHORT_TOO_SMALL", 0)
    assert hand.coordinator.rejected_counts == {"COHORT_TOO_SMALL": 1}
    assert hand.lease_state("a").rejected_count == 1


def test_held_contributions_beyond_what_a_ledger_keeps_are_kept_none_the_less() -> None:
    hand = DurableHand(Buffered(200), "a", contribution_limit=256)
    for _ in range(100):
        hand.hold(hand.push("a"))
    assert len(RunImage.of(hand.state()).held) == 100
    hand.crash()
    for sequence in range(101, 201):
        hand.again("a", 1, sequence, base_step=0)
    [closed] = hand.step()
    assert [c.header.sequence for c in closed.contributions] == list(range(1, 201))
    assert hand.state().held == ()


def test_held_contribution_that_later_rejections_push_out_of_the_ledger_is_kept() -> None:
    hand = DurableHand(Synchronous(2), "a", "b")
    hand.hold(hand.push("a"))
    for _ in range(64):
        hand.push("a")
    hand.crash()
    assert refused(lambda: hand.again("a", 1, 1)).reason == "SEQUENCE_FORGOTTEN"
    hand.again("b", 2, 1)
    [closed] = hand.step()
    assert [c.header.worker_id for c in closed.contributions] == ["a", "b"]


def test_held_contribution_whose_lease_is_forgotten_is_kept() -> None:
    hand = DurableHand(Buffered(2), "a")
    hand.hold(hand.push("a"))
    hand.coordinator.leave("a", 1, hand.now)
    for _ in range(1100):  # more than are remembered
        hand.coordinator.leave("b", hand.join("b"), hand.now)
    hand.crash()
    hand.join("c")
    hand.push("c")
    [closed] = hand.step()
    assert [c.header.worker_id for c in closed.contributions] == ["a", "c"]


def test_contribution_of_a_lease_that_has_ended_becomes_part_of_a_step_that_is_written() -> None:
    hand = DurableHand(Synchronous(2), "a", "b")
    hand.push("a")
    hand.coordinator.leave("a", 1, hand.now)
    hand.push("b")
    hand.step()
    hand.crash()
    assert (hand.coordinator.closed_step, hand.coordinator.applied_count) == (1, 2)
    assert hand.result_of("a", 1, 1)[0] == "applied"


def test_worker_superseded_between_taking_and_step_keeps_both_ledgers() -> None:
    hand = DurableHand(Buffered(3), "a")
    hand.push("a")
    second = hand.join("a")
    hand.push("a")
    hand.push("a")
    hand.step()
    hand.crash()
    assert [hand.result_of("a", 1, 1), hand.result_of("a", second, 2)] == [("applied", "BUFFER_FULL", 1)] * 2
    assert refused(lambda: hand.again("a", 1, 2)).reason == "WORKER_SUPERSEDED"
    assert hand.lease_state("a").applied_count == 2


# Membership across a crash


def test_live_epochs_stay_valid_and_are_renewed_by_a_clock_that_begins_anew() -> None:
    hand = DurableHand(Asynchronous(), "a")
    hand.now = 9.0
    hand.crash(now=5.0, down_seconds=3600.0)
    [lease] = hand.coordinator.leases.live
    assert (lease.epoch, lease.joined_at_seconds, lease.expires_at_seconds) == (1, 5.0, 15.0)
    assert hand.coordinator.due_at_seconds == 15.0
    hand.wait(10.0)
    assert hand.clocks() == {}


def end_by_leaving(hand: DurableHand) -> None:
    hand.coordinator.leave("a", 1, hand.now)


def end_by_expiry(hand: DurableHand) -> None:
    hand.wait(10.0)


def end_by_eviction(hand: DurableHand) -> None:
    hand.coordinator.evict("a", "too hot", block_seconds=None, now_seconds=hand.now)


def end_by_takeover(hand: DurableHand) -> None:
    hand.join("a")


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        (end_by_leaving, "LEASE_EXPIRED"),
        (end_by_expiry, "LEASE_EXPIRED"),
        (end_by_eviction, "WORKER_EVICTED"),
        (end_by_takeover, "WORKER_SUPERSEDED"),
    ],
)
def test_ended_epochs_stay_refused_for_the_same_reason(end: Callable[[DurableHand], None], reason: str) -> None:
    hand = DurableHand(Asynchronous(), "a")
    end(hand)
    hand.crash()
    assert refused(lambda: hand.again("a", 1, 1)).reason == reason
    assert refused(lambda: hand.coordinator.heartbeat("a", 1, hand.now)).reason == reason


def test_block_holds_for_what_remains_of_it_and_the_time_that_the_server_was_down_counts() -> None:
    hand = DurableHand(Asynchronous(), "a")
    hand.now = 100.0
    hand.join("a")
    hand.coordinator.evict("a", "too hot", block_seconds=60.0, now_seconds=100.0)
    hand.now = 110.0
    hand.crash(now=0.0, down_seconds=20.0)
    for now, is_blocked in ((0.0, True), (29.0, True), (31.0, False)):
        hand.now = now
        if is_blocked:
            assert refused(lambda: hand.join("a")).metadata["cause"] == "too hot"
        else:
            assert hand.join("a")
    assert hand.state().blocks == ()


def test_quarantine_is_remembered_and_so_are_bad_ones_in_a_row() -> None:
    hand = DurableHand(Asynchronous(), "a", admission=Admission(quarantine_after=3, quarantine_seconds=30.0))
    hand.push("a", norm=math.nan)
    hand.crash()
    hand.again("a", 1, 2)
    hand.step()
    assert hand.lease_state("a").bad_count == 0, "one that was taken ends the row"
    for _ in range(2):
        hand.submit(hand.header("a", 1, hand.lease_state("a").last_sequence + 1), math.nan)
        hand.crash()
    assert hand.lease_state("a").bad_count == 2
    hand.submit(hand.header("a", 1, 5), math.nan)
    hand.crash()
    assert refused(lambda: hand.join("a")).reason == "WORKER_EVICTED"
    assert "quarantined: 3 gradients in a row" in hand.state().blocks[0][2]


def test_run_that_was_formed_waits_for_lost_workers_no_longer_than_their_leases() -> None:
    hand = DurableHand(Synchronous(3), "a", "b", "c")
    hand.hold(hand.push("a"))
    hand.crash(now=1.0)
    assert hand.step() == []
    hand.now = 9.0
    hand.coordinator.heartbeat("a", 1, 9.0)
    hand.wait(2.0)
    assert [closed.close_reason for closed in hand.step()] == ["ALL_LIVE_CONTRIBUTED"]


def test_run_that_was_not_formed_yet_waits_for_its_quorum() -> None:
    hand = DurableHand(Synchronous(3), "a", "b")
    hand.hold(hand.push("a"))
    hand.hold(hand.push("b"))
    hand.crash()
    assert (hand.step(), hand.state().is_formed) == ([], False)
    assert hand.coordinator.waiting_for() == "1 more worker to join: the quorum is 3, 2 live"


def test_run_that_everybody_has_left_is_formed_no_longer() -> None:
    hand = DurableHand(Synchronous(1), "a")
    assert hand.state().is_formed
    hand.coordinator.leave("a", 1, hand.now)
    assert not hand.state().is_formed


def test_round_whose_last_worker_went_ends_at_once_when_only_its_step_was_not_written() -> None:
    hand = DurableHand(Synchronous(3), "a", "b", "c")
    hand.hold(hand.push("a"))
    hand.hold(hand.push("b"))
    hand.coordinator.leave("c", 3, hand.now)
    assert hand.coordinator.closed_step == 1
    hand.crash()
    assert [closed.close_reason for closed in hand.step()] == ["ALL_LIVE_CONTRIBUTED"]


# Clocks


def test_clocks_and_the_bound_outlive_the_server() -> None:
    hand = DurableHand(BoundedStaleness(1), "a", "b")
    hand.push("a")
    hand.push("a", norm=math.nan)
    hand.step()
    hand.crash()
    assert hand.clocks() == {"a": 2, "b": 0}
    gate = hand.coordinator.pull_gate("a")
    assert (gate.is_open, gate.facts) == (False, (2, 0))
    hand.again("b", 2, 1, base_step=0)
    hand.step()
    assert hand.coordinator.pull_gate("a").is_open
    assert (hand.coordinator.slowest_clock, hand.coordinator.barrier_step) == (1, 2)
    hand.crash()
    assert (hand.coordinator.slowest_clock, hand.coordinator.barrier_step) == (1, 2)
    hand.join("c")
    assert hand.clocks() == {"a": 2, "b": 1, "c": 1}


def test_clock_of_a_step_that_was_not_written_is_not_counted() -> None:
    hand = DurableHand(BoundedStaleness(0), "a", "b")
    hand.push("a")
    hand.crash()
    assert hand.clocks() == {"a": 0, "b": 0}
    assert hand.again("a", 1, 1).result is None


def test_new_policy_lets_all_begin_side_by_side_after_the_round_that_it_ended() -> None:
    hand = DurableHand(BoundedStaleness(2), "a", "b")
    hand.push("a")
    hand.push("a")
    hand.update(Buffered(5), "first")
    hand.push("b")
    hand.update(BoundedStaleness(1), "second")
    hand.crash()
    assert (hand.clocks(), hand.coordinator.closed_step) == ({"a": 0, "b": 0}, 3)
    assert (hand.coordinator.slowest_clock, hand.coordinator.barrier_step) == (0, 3)
    assert hand.coordinator.policy == BoundedStaleness(1)
    assert hand.image.updates.state() == (("first", 3), ("second", 4))


def test_same_policy_again_changes_no_clock() -> None:
    hand = DurableHand(BoundedStaleness(2), "a", "b")
    hand.push("a")
    hand.step()
    hand.update(BoundedStaleness(2))
    assert [lease.clock for lease in hand.state().live] == [1, 0]
