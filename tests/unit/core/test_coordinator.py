"""The coordinator called by hand: who contributes to what, what becomes of it, and what is told."""

import math
from typing import Any

import pytest

from kedge.policies import Admission, Asynchronous, BoundedStaleness, Buffered, Policy, Synchronous
from kedge.wire.errors import KedgeError
from kedge_server.core.admission import Inspection
from kedge_server.core.contributions import Contribution
from kedge_server.core.coordinator import Bounds, Coordinator, PullGate
from kedge_server.core.values import ContributionHeader

DIGEST = b"digest"


class Hand:
    """A coordinator, what it was told to tell, and short ways to call it. Time stands still until `now` is set."""

    def __init__(
        self, policy: Policy, *workers: str, admission: Admission | None = None, contribution_limit: int = 64
    ) -> None:
        self.told: list[tuple[str, dict[str, Any]]] = []
        self.now = 0.0
        self.coordinator = Coordinator(
            "runs/r",
            digest=DIGEST,
            policy=policy,
            admission=admission or Admission(),
            bounds=Bounds(8, contribution_limit),
            first_epoch=1,
            tell=lambda kind, **about: self.told.append((kind, about)),
        )
        self._epoch = 0
        self._sequences: dict[tuple[str, int], int] = {}
        for worker in workers:
            self.join(worker)

    def join(self, worker: str, lease_seconds: float = 10.0) -> int:
        self._epoch += 1
        self.coordinator.join(worker, epoch=self._epoch, duration_seconds=lease_seconds, now_seconds=self.now)
        return self._epoch

    def push(
        self, worker: str, *, norm: float = 1.0, base_step: int | None = None, epoch: int | None = None
    ) -> Contribution:
        if epoch is None:
            epoch = self.coordinator.leases.of_worker(worker).epoch
        sequence = self._sequences.get((worker, epoch), 0) + 1
        contribution = self.submit(self.header(worker, epoch, sequence, base_step=base_step), norm)
        self._sequences[worker, epoch] = sequence
        return contribution

    def header(self, worker: str, epoch: int, sequence: int, *, base_step: int | None = None) -> ContributionHeader:
        return ContributionHeader(
            worker_id=worker,
            epoch=epoch,
            sequence=sequence,
            base_step=self.coordinator.closed_step if base_step is None else base_step,
            manifest_digest=DIGEST,
            example_count=1,
            loss=None,
        )

    def submit(self, header: ContributionHeader, norm: float = 1.0) -> Contribution:
        inspection = Inspection()
        inspection.sum_of_squares = norm**2
        inspection.non_finite_element = 0 if math.isnan(norm) else None
        return self.coordinator.submit(Contribution(header), inspection, self.now)

    def set_policy(self, policy: Policy) -> None:
        self.coordinator.set_policy(policy, self.now)

    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.coordinator.advance(self.now)

    def closed(self) -> list[tuple[str, list[str]]]:
        """The rounds that have closed since: why, and of whom."""
        return [
            (closed.close_reason, [c.header.worker_id for c in closed.contributions])
            for closed in self.coordinator.take_closed()
        ]

    def clocks(self) -> dict[str, int]:
        return {lease.worker_id: lease.clock for lease in self.coordinator.leases.live}

    def kinds(self) -> list[str]:
        return [kind for kind, _ in self.told]

    def facts_of(self, kind: str) -> list[dict[str, Any]]:
        return [about for told, about in self.told if told == kind]


def reason_of(contribution: Contribution) -> str:
    assert contribution.result is not None
    assert contribution.result.outcome == "rejected"
    return contribution.result.reason


def refused(do: Any) -> KedgeError:
    with pytest.raises(KedgeError) as caught:
        do()
    return caught.value


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


# Robust combinations


def test_round_that_ends_too_small_for_its_median_is_refused_and_the_next_begins() -> None:
    hand = Hand(Synchronous(3, combine="median"), "a", "b", "c")
    pair = [hand.push("a"), hand.push("b")]
    hand.wait(9)
    for name, epoch in (("a", 1), ("b", 2)):
        hand.coordinator.heartbeat(name, epoch, hand.now)
    hand.wait(1)
    assert hand.clocks().keys() == {"a", "b"}
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


def test_outliers_are_judged_by_the_median_of_what_was_taken_once_eight_were() -> None:
    hand = Hand(Asynchronous(), "a", admission=Admission(outlier_factor=3.0))
    assert all(hand.push("a", norm=norm).result is None for norm in (1, 1, 1, 2, 2, 2, 50))
    assert hand.push("a", norm=70).result is None, "seven are too few to judge by"
    assert reason_of(hand.push("a", norm=6.1)) == "NORM_OUTLIER"  # the median of the eight is 2
    assert hand.push("a", norm=5.9).result is None


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
    broken = ContributionHeader(**(vars(hand.header("a", 1, 1)) | header))
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
