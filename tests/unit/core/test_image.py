"""What comes of a run's commits, and a coordinator that goes on from it."""

import math
from dataclasses import replace

import pytest
from coordinator_hand import reason_of, refused
from durable_hand import CONFIG, EPOCH_SECONDS, DurableHand

from kedge import optim
from kedge.optim.controls import Change, Controls
from kedge.policies import Admission, Asynchronous, Buffered, Synchronous
from kedge_server.core.commits import Created, Ended, Joined, Progress, Restored, RunConfig, Ticked, Updated
from kedge_server.core.contributions import Contribution
from kedge_server.core.image import EntryState, RunImage
from kedge_server.storage.plain import decode, encode

# Norms


def test_norms_outlive_the_server_and_are_those_of_live_workers() -> None:
    hand = DurableHand(Asynchronous(), "a", "b", admission=Admission(outlier_factor=3.0))
    for _ in range(4):
        hand.push("a", norm=2.0)
        hand.push("b", norm=4.0)
    hand.step()
    hand.crash()
    limited = hand.submit(hand.header("b", 2, 5), 9.1)
    assert reason_of(limited) == "NORM_OUTLIER", "3 times the median of 2 and 4 is 9"
    hand.crash()
    assert [(worker, is_outlier) for worker, _, is_outlier in hand.state().norms] == [("a", False), ("b", True)]
    hand.coordinator.leave("b", 2, hand.now)
    hand.crash()
    assert [worker for worker, _, _ in hand.state().norms] == ["a"]


def test_norm_of_a_held_contribution_counts_once() -> None:
    hand = DurableHand(Buffered(2), "a")
    hand.hold(hand.push("a", norm=2.0))
    hand.crash()
    hand.again("a", 1, 2, base_step=0)
    hand.step()
    assert hand.state().norms == (("a", (2.0, 1.0), False),)


def test_what_came_last_decides_whether_a_worker_sends_outliers_whatever_was_written_last() -> None:
    hand = DurableHand(Synchronous(3), "a", "b", "c", admission=Admission(outlier_factor=3.0))
    for _ in range(3):
        for worker in "abc":
            hand.push(worker)
        hand.step()
    hand.push("a")
    assert reason_of(hand.push("a", norm=50.0)) == "NORM_OUTLIER"
    hand.push("b")
    hand.push("c")
    hand.step()
    assert [is_outlier for worker, _, is_outlier in hand.state().norms if worker == "a"] == [True]


# The image itself


def new_image(config: RunConfig = CONFIG, progress: Progress | None = None) -> RunImage:
    return RunImage.create(Created(config, Asynchronous(), Admission(), (), progress))


def test_new_run_begins_with_step_0_and_the_second_commit() -> None:
    image = new_image()
    assert (image.step, image.applied_count, image.loss, image.next_index) == (0, 0, None, 2)


def test_run_that_goes_on_from_another_ones_checkpoint_begins_where_that_stood() -> None:
    controls = Controls.begin(CONFIG.optimizer.spec(), ()).changed("", Change(lr=0.5), step=3)
    image = new_image(progress=Progress(7, 12, 0.25, controls))
    assert (image.step, image.applied_count, image.loss, image.controls) == (7, 12, 0.25, controls)
    assert (image.cohort.barrier_step, image.next_index) == (7, 2)


def test_each_commit_is_counted() -> None:
    hand = DurableHand(Synchronous(2), "a", "b")
    hand.push("a")
    hand.push("a")
    hand.push("b")
    hand.step()
    assert hand.state().next_index == 2 + 2 + 1 + 1, "two joined, one was rejected, one step"


def test_hyperparameters_and_ticks_are_taken_over() -> None:
    by_hand = optim.SGD(lr=optim.StepLR(0.1, step_size=2, gamma=0.1, tick="manual"))
    image = new_image(replace(CONFIG, optimizer=by_hand))
    image.apply(Ticked("t", "", 4), EPOCH_SECONDS)
    assert image.ticks.find("t") == image.controls.rate_state("")
    assert image.controls.learning_rate == pytest.approx(0.001), "after two steps of the schedule"
    image.apply(Updated("x", 1, "", Change(lr=0.5)), EPOCH_SECONDS)
    assert (image.controls.learning_rate, image.updates.find("x")) == (0.5, 1)


def test_eviction_is_remembered_by_its_request() -> None:
    image = new_image()
    image.apply(Joined("a", 1, 10.0), EPOCH_SECONDS)
    image.apply(Ended("a", 1, "too hot", 60.0, "request"), EPOCH_SECONDS + 5)
    assert image.evictions.state() == (("request", None),)
    assert image.state().blocks == (("a", EPOCH_SECONDS + 65, "too hot"),)


def test_state_does_not_change_with_what_comes_later_and_its_image_does_not_either() -> None:
    hand = DurableHand(Buffered(2), "a", "b")
    hand.hold(hand.push("a"))
    before, bytes_before = hand.state(), encode(hand.state())
    other = RunImage.of(before)
    hand.push("b")
    hand.step()
    hand.coordinator.evict("b", "", block_seconds=9.0, now_seconds=hand.now)
    assert encode(before) == bytes_before == encode(other.state())
    assert decode(bytes_before) == before


def test_coordinator_that_goes_on_leaves_the_image_alone_until_something_is_written() -> None:
    hand = DurableHand(Buffered(3), "a")
    hand.hold(hand.push("a"))
    hand.crash()
    before = encode(hand.state())
    hand.again("a", 1, 2, base_step=0)
    hand.wait(1.0)
    assert encode(hand.state()) == before


def test_ledger_entries_of_an_image_say_what_a_repetition_is_told() -> None:
    hand = DurableHand(Buffered(2), "a")
    hand.hold(hand.push("a"))
    hand.push("a", norm=math.nan)
    first, second = hand.lease_state("a").entries
    assert first == EntryState(1, 0, 1, None, 0, None)
    assert second.result is not None
    assert (second.sequence, second.result.reason) == (2, "NON_FINITE_GRADIENT")


# Going back


def gone_back(hand: DurableHand, to: RunImage) -> None:
    hand.coordinator.begin_at(to, hand.now)
    hand.image.go_back(Restored("request", "1-2", to.step), to)


def test_run_that_goes_back_has_its_earlier_counts_and_no_worker_but_remembers_who_was_one() -> None:
    hand = DurableHand(Synchronous(2), "a", "b", admission=Admission(outlier_factor=3.0))
    hand.push("a")
    hand.push("b")
    hand.step()
    earlier = RunImage.of(hand.state())
    hand.push("a", norm=math.nan)
    hand.push("a")
    hand.push("b")
    hand.step()
    held = hand.hold(hand.push("a"))
    gone_back(hand, earlier)
    assert reason_of(held) == "STALE_GRADIENT"
    for _ in range(2):
        state, coordinator = hand.state(), hand.coordinator
        assert (state.step, state.applied_count, state.rejected_counts, state.held) == (1, 2, {}, ())
        assert (coordinator.closed_step, coordinator.applied_count, coordinator.rejected_counts) == (1, 2, {})
        assert (state.live, state.norms, state.is_formed, hand.clocks()) == ((), (), False, {})
        assert hand.result_of("a", 1, 3) == ("applied", "QUORUM_REACHED", 2), "what was said stays said"
        assert hand.result_of("a", 1, 4)[:2] == ("rejected", "STALE_GRADIENT")
        assert refused(lambda: hand.again("b", 2, 3)).reason == "LEASE_EXPIRED"
        assert hand.image.restores.state() == (("request", 1),)
        hand.crash()
    hand.join("a")
    hand.join("b")
    hand.push("a")
    hand.push("b")
    assert [closed.step for closed in hand.step()] == [2]


def test_results_of_contributions_are_the_very_ones_that_waiters_were_told() -> None:
    hand = DurableHand(Synchronous(1), "a")
    told: list[Contribution] = [hand.push("a"), hand.push("a", base_step=0)]
    hand.step()
    hand.crash()
    for contribution in told:
        again = hand.again("a", 1, contribution.header.sequence)
        assert again.result == contribution.result
        assert again.staleness == contribution.staleness


def test_bad_ones_in_a_row_that_a_takeover_hands_on_do_not_depend_on_what_is_written_when() -> None:
    hand = DurableHand(Buffered(9), "a")
    hand.push("a", norm=math.nan)
    good = hand.push("a")
    hand.join("a")
    hand.hold(good)
    assert (hand.lease_state("a").epoch, hand.lease_state("a").bad_count) == (2, 0)


def test_epochs_that_are_no_longer_remembered_are_known_to_have_been() -> None:
    hand = DurableHand(Asynchronous())
    first = hand.join("a")
    hand.coordinator.leave("a", first, hand.now)
    for _ in range(4200):
        hand.coordinator.leave("b", hand.join("b"), hand.now)
    hand.crash()
    assert refused(lambda: hand.again("a", first, 1)).reason == "EPOCH_FORGOTTEN"
    assert refused(lambda: hand.again("a", 50_000, 1)).reason == "WORKER_NOT_FOUND"


def test_going_back_leaves_nobody_and_nothing_held_whatever_was_written_before_it() -> None:
    hand = DurableHand(Buffered(3), "a")
    hand.hold(hand.push("a"))
    image = RunImage.of(hand.state())
    image.go_back(Restored("", "0-2", 0), new_image())
    assert (image.state().live, image.state().held) == ((), ())
    assert [lease.worker_id for lease in image.state().ended] == ["a"]
