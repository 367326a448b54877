"""When a round closes, what a run waits for, and how contributions weigh: the pure functions, called."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kedge.policies import Asynchronous, BoundedStaleness, Buffered, Policy, Synchronous
from kedge_server.core.rounds import (
    Decision,
    PullFacts,
    RoundFacts,
    combination,
    decide,
    decide_at_change,
    factors,
    is_formed,
    may_pull,
    mean_loss,
    missing_workers,
    round_size,
    smallest_cohort,
    staleness_limit,
    waiting_for,
)
from kedge_server.core.values import MEAN, Combine

FOUR = Synchronous(quorum=4)
FOUR_IN_TEN_SECONDS = Synchronous(quorum=4, timeout_seconds=10)
MEDIAN_OF_FOUR = Synchronous(quorum=4, timeout_seconds=10, combine="median")
MEDIAN_OF_FOUR_PATIENT = Synchronous(quorum=4, combine="median")
TRIMMED_OF_SIX = Synchronous(quorum=6, combine="trimmed_mean", trim_count=2)
THREE_IN_A_BUFFER = Buffered(3)


def facts(count: int, *, live: int = 4, awaited: int | None = None, formed: bool = True, unfit: int = 0) -> RoundFacts:
    """A round that was opened at 100 and whose contributors all live, unless `awaited` says otherwise."""
    awaited = max(live - count, 0) if awaited is None else awaited
    return RoundFacts(count, 100.0 if count else None, live, awaited, formed, unfit)


@pytest.mark.parametrize(
    ("open_round", "policy", "want"),
    [
        # All live: as many as the quorum.
        (facts(0), FOUR, Decision(False, "WAITING_FOR_QUORUM", 4)),
        (facts(3), FOUR, Decision(False, "WAITING_FOR_QUORUM", 4)),
        (facts(4), FOUR, Decision(True, "QUORUM_REACHED", 4)),
        (facts(5), FOUR, Decision(True, "QUORUM_REACHED", 4)),
        # More workers than the quorum are backup workers.
        (facts(3, live=6), FOUR, Decision(False, "WAITING_FOR_QUORUM", 4)),
        (facts(4, live=6), FOUR, Decision(True, "QUORUM_REACHED", 4)),
        # A formed run does with those that live ...
        (facts(2, live=3), FOUR, Decision(False, "WAITING_FOR_QUORUM", 3)),
        (facts(3, live=3), FOUR, Decision(True, "ALL_LIVE_CONTRIBUTED", 3)),
        (facts(1, live=1), FOUR, Decision(True, "ALL_LIVE_CONTRIBUTED", 1)),
        # ... and never closes a round of nothing, even when nobody lives.
        (facts(0, live=1), FOUR, Decision(False, "WAITING_FOR_QUORUM", 1)),
        (facts(0, live=0, formed=False), FOUR, Decision(False, "WAITING_FOR_QUORUM", 4)),
        (facts(1, live=0), FOUR, Decision(True, "ALL_LIVE_CONTRIBUTED", 1)),
        # Who lives, but is not awaited, may be one more or not.
        (facts(1, live=3, awaited=0), FOUR, Decision(True, "ALL_LIVE_CONTRIBUTED", 1)),
        (facts(1, live=4, awaited=1), FOUR, Decision(False, "WAITING_FOR_QUORUM", 2)),
        # Contributors that died since count, but stand for nobody who is still awaited.
        (facts(2, live=2, awaited=2), FOUR, Decision(False, "WAITING_FOR_QUORUM", 4)),
        (facts(2, live=2, awaited=1), FOUR, Decision(False, "WAITING_FOR_QUORUM", 3)),
        (facts(3, live=2, awaited=0), FOUR, Decision(True, "ALL_LIVE_CONTRIBUTED", 3)),
        # A run that has not formed waits for its workers to come.
        (facts(1, live=1, formed=False), FOUR, Decision(False, "WAITING_FOR_QUORUM", 4)),
        (facts(3, live=3, formed=False), FOUR, Decision(False, "WAITING_FOR_QUORUM", 4)),
        (facts(4, live=3, formed=False), FOUR, Decision(True, "QUORUM_REACHED", 4)),
        # Quorum 1.
        (facts(1, live=1), Synchronous(quorum=1), Decision(True, "QUORUM_REACHED", 1)),
        # Asynchronous: each contribution, whoever lives.
        (facts(0), Asynchronous(), Decision(False, "EACH_CONTRIBUTION", 1)),
        (facts(1), Asynchronous(), Decision(True, "EACH_CONTRIBUTION", 1)),
        (facts(1, live=0, formed=False), Asynchronous(max_staleness=0), Decision(True, "EACH_CONTRIBUTION", 1)),
        # Bounded staleness: likewise; who is kept waiting is another question.
        (facts(0), BoundedStaleness(0), Decision(False, "EACH_CONTRIBUTION", 1)),
        (facts(1, live=8), BoundedStaleness(0), Decision(True, "EACH_CONTRIBUTION", 1)),
        # Buffered: a full buffer and nothing else, whoever lives.
        (facts(0), THREE_IN_A_BUFFER, Decision(False, "BUFFERED", 3)),
        (facts(2, live=1, awaited=0), THREE_IN_A_BUFFER, Decision(False, "BUFFERED", 3)),
        (facts(2, live=0, awaited=0, formed=False), THREE_IN_A_BUFFER, Decision(False, "BUFFERED", 3)),
        (facts(3, live=1, awaited=0), THREE_IN_A_BUFFER, Decision(True, "BUFFER_FULL", 3)),
        # Robust: enough for the quorum is enough; with too few from all that live it waits for others to join.
        (facts(4), MEDIAN_OF_FOUR_PATIENT, Decision(True, "QUORUM_REACHED", 4)),
        (facts(3, live=3), MEDIAN_OF_FOUR_PATIENT, Decision(True, "ALL_LIVE_CONTRIBUTED", 3)),
        (facts(2, live=2), MEDIAN_OF_FOUR_PATIENT, Decision(False, "WAITING_FOR_COHORT", 3)),
        (facts(1, live=1), MEDIAN_OF_FOUR_PATIENT, Decision(False, "WAITING_FOR_COHORT", 3)),
        (facts(1, live=0), MEDIAN_OF_FOUR_PATIENT, Decision(False, "WAITING_FOR_COHORT", 3)),
        (facts(5, live=5), TRIMMED_OF_SIX, Decision(True, "ALL_LIVE_CONTRIBUTED", 5)),
        (facts(4, live=4), TRIMMED_OF_SIX, Decision(False, "WAITING_FOR_COHORT", 5)),
        (facts(3, live=4), TRIMMED_OF_SIX, Decision(False, "WAITING_FOR_QUORUM", 5)),
        (facts(0, live=1), MEDIAN_OF_FOUR_PATIENT, Decision(False, "WAITING_FOR_QUORUM", 3)),
        # What admission kept out stands for contributions, up to as many as the combination bears.
        (facts(2, live=3, awaited=0, unfit=1), MEDIAN_OF_FOUR_PATIENT, Decision(True, "ALL_LIVE_CONTRIBUTED", 2)),
        (facts(1, live=3, awaited=0, unfit=2), MEDIAN_OF_FOUR_PATIENT, Decision(False, "WAITING_FOR_COHORT", 3)),
        (facts(1, live=2, awaited=0, unfit=1), MEDIAN_OF_FOUR_PATIENT, Decision(False, "WAITING_FOR_COHORT", 3)),
        (facts(4, live=5, awaited=0, unfit=1), TRIMMED_OF_SIX, Decision(True, "ALL_LIVE_CONTRIBUTED", 4)),
        (facts(3, live=5, awaited=0, unfit=2), TRIMMED_OF_SIX, Decision(True, "ALL_LIVE_CONTRIBUTED", 3)),
        (facts(3, live=4, awaited=0, unfit=1), TRIMMED_OF_SIX, Decision(False, "WAITING_FOR_COHORT", 4)),
        (facts(2, live=5, awaited=0, unfit=3), TRIMMED_OF_SIX, Decision(False, "WAITING_FOR_COHORT", 5)),
        (facts(1, live=5, awaited=0, unfit=4), FOUR, Decision(True, "ALL_LIVE_CONTRIBUTED", 1)),
    ],
)
def test_decision_without_timeout(open_round: RoundFacts, policy: Policy, want: Decision) -> None:
    assert decide(1e9, open_round, policy) == want


@pytest.mark.parametrize(
    ("now", "open_round", "want"),
    [
        (100.0, facts(1), Decision(False, "WAITING_FOR_QUORUM", 4, 110.0)),
        (109.9, facts(3), Decision(False, "WAITING_FOR_QUORUM", 4, 110.0)),
        (110.0, facts(1), Decision(True, "TIMEOUT", 4)),
        (999.0, facts(3), Decision(True, "TIMEOUT", 4)),
        (999.0, facts(1, live=1, formed=False), Decision(True, "TIMEOUT", 4)),
        # What is complete closes for that reason, however late it is.
        (999.0, facts(4), Decision(True, "QUORUM_REACHED", 4)),
        (999.0, facts(2, live=2), Decision(True, "ALL_LIVE_CONTRIBUTED", 2)),
        # Before the first contribution no time runs.
        (999.0, facts(0), Decision(False, "WAITING_FOR_QUORUM", 4)),
    ],
)
def test_decision_with_a_timeout_of_ten_seconds(now: float, open_round: RoundFacts, want: Decision) -> None:
    assert decide(now, open_round, FOUR_IN_TEN_SECONDS) == want


@pytest.mark.parametrize(
    ("now", "count", "want"),
    [
        (109.9, 2, Decision(False, "WAITING_FOR_QUORUM", 4, 110.0)),
        (110.0, 2, Decision(True, "COHORT_TOO_SMALL", 4, None, True)),
        (110.0, 3, Decision(True, "TIMEOUT", 4)),
    ],
)
def test_a_robust_round_that_runs_out_of_time_with_too_few_is_refused(now: float, count: int, want: Decision) -> None:
    assert decide(now, facts(count), MEDIAN_OF_FOUR) == want


@pytest.mark.parametrize(
    ("now", "want"),
    [
        (109.9, Decision(False, "WAITING_FOR_COHORT", 3, 110.0)),
        (110.0, Decision(True, "COHORT_TOO_SMALL", 3, None, True)),
    ],
)
def test_a_robust_round_waits_for_its_cohort_until_its_time_is_up(now: float, want: Decision) -> None:
    assert decide(now, facts(2, live=2), MEDIAN_OF_FOUR) == want


@pytest.mark.parametrize(
    ("count", "policy", "want"),
    [
        (1, FOUR, Decision(True, "POLICY_CHANGED", 1)),
        (3, FOUR, Decision(True, "POLICY_CHANGED", 3)),
        (2, THREE_IN_A_BUFFER, Decision(True, "POLICY_CHANGED", 2)),
        (2, MEDIAN_OF_FOUR, Decision(True, "COHORT_TOO_SMALL", 2, None, True)),
        (3, MEDIAN_OF_FOUR, Decision(True, "POLICY_CHANGED", 3)),
        (4, TRIMMED_OF_SIX, Decision(True, "COHORT_TOO_SMALL", 4, None, True)),
        (2, Buffered(5, combine="median"), Decision(True, "COHORT_TOO_SMALL", 2, None, True)),
    ],
)
def test_the_round_that_is_open_at_a_change_ends_as_its_own_policy_says(
    count: int, policy: Policy, want: Decision
) -> None:
    assert decide_at_change(facts(count), policy) == want


@pytest.mark.parametrize(
    ("clock", "slowest", "policy", "want"),
    [
        (9, 0, FOUR, (True, "UNBOUNDED")),
        (9, 0, Asynchronous(), (True, "UNBOUNDED")),
        (9, 0, THREE_IN_A_BUFFER, (True, "UNBOUNDED")),
        (0, 0, BoundedStaleness(0), (True, "WITHIN_BOUND")),
        (4, 4, BoundedStaleness(0), (True, "WITHIN_BOUND")),
        (5, 4, BoundedStaleness(0), (False, "WAITING_FOR_SLOWEST")),
        (6, 4, BoundedStaleness(2), (True, "WITHIN_BOUND")),
        (7, 4, BoundedStaleness(2), (False, "WAITING_FOR_SLOWEST")),
    ],
)
def test_a_worker_may_pull_as_long_as_its_lead_is_within_the_bound(
    clock: int, slowest: int, policy: Policy, want: tuple[bool, str]
) -> None:
    assert may_pull(PullFacts(clock, slowest), policy) == want


@pytest.mark.parametrize(
    ("policy", "size", "fewest", "limit", "combine"),
    [
        (FOUR, 4, 1, 0, MEAN),
        (MEDIAN_OF_FOUR, 4, 3, 0, Combine("median", 0)),
        (TRIMMED_OF_SIX, 6, 5, 0, Combine("trimmed_mean", 2)),
        (Asynchronous(), 1, 1, None, MEAN),
        (Asynchronous(max_staleness=2), 1, 1, 2, MEAN),
        (BoundedStaleness(3), 1, 1, None, MEAN),
        (THREE_IN_A_BUFFER, 3, 1, None, MEAN),
        (Buffered(5, max_staleness=4, combine="median"), 5, 3, 4, Combine("median", 0)),
    ],
)
def test_what_a_policy_asks_of_a_round(
    policy: Policy, size: int, fewest: int, limit: int | None, combine: Combine
) -> None:
    assert (round_size(policy), smallest_cohort(policy)) == (size, fewest)
    assert staleness_limit(policy) == limit
    assert combination(policy, size) == combine


@pytest.mark.parametrize(
    ("count", "trim_count"),
    [(6, 2), (5, 2), (4, 1), (3, 1), (2, 0), (1, 0)],
)
def test_a_trimmed_mean_trims_what_there_is_room_for(count: int, trim_count: int) -> None:
    assert combination(TRIMMED_OF_SIX, count) == Combine("trimmed_mean", trim_count)


@pytest.mark.parametrize("count", [2, 3])
def test_a_median_is_one_of_however_many(count: int) -> None:
    assert combination(MEDIAN_OF_FOUR, count) == Combine("median", 0)


open_rounds = st.builds(
    lambda count, others, awaited, formed, unfit: facts(
        count, live=min(others, count) + awaited + unfit, awaited=awaited, formed=formed, unfit=unfit
    ),
    st.integers(0, 9),
    st.integers(0, 9),
    st.integers(0, 9),
    st.booleans(),
    st.integers(0, 4),
)
policies = st.one_of(
    st.builds(Synchronous, quorum=st.integers(1, 9), timeout_seconds=st.none() | st.floats(0.1, 1e3)),
    st.builds(Asynchronous),
    st.builds(BoundedStaleness, st.integers(0, 4)),
    st.builds(Buffered, st.integers(1, 9)),
    st.builds(Buffered, st.integers(3, 9), combine=st.just("median")),
    st.builds(Synchronous, quorum=st.integers(3, 9), combine=st.just("trimmed_mean")),
)
times = st.floats(100, 1e6)


@given(times, open_rounds, policies)
def test_an_empty_round_never_closes(now: float, open_round: RoundFacts, policy: Policy) -> None:
    empty = open_round._replace(contribution_count=0, opened_at_seconds=None)
    assert not decide(now, empty, policy).close


@given(times, open_rounds, policies)
def test_another_contribution_never_opens_what_was_to_close(now: float, open_round: RoundFacts, policy: Policy) -> None:
    more = open_round._replace(
        contribution_count=open_round.contribution_count + 1, awaited_count=max(open_round.awaited_count - 1, 0)
    )
    assert decide(now, more, policy).close >= decide(now, open_round, policy).close


@given(times, open_rounds, policies)
def test_losing_a_worker_never_makes_a_round_wait_longer(now: float, open_round: RoundFacts, policy: Policy) -> None:
    before = decide(now, open_round, policy)
    contributor = open_round._replace(live_count=max(open_round.live_count - 1, 0))
    awaited = contributor._replace(awaited_count=max(open_round.awaited_count - 1, 0))
    for fewer in (contributor, awaited):
        assert decide(now, fewer, policy).close >= before.close
        assert decide(now, fewer, policy).required_count <= before.required_count


@given(times, open_rounds, policies)
def test_the_time_to_look_again_is_when_the_answer_changes(now: float, open_round: RoundFacts, policy: Policy) -> None:
    decision = decide(now, open_round, policy)
    later = decision.look_again_at_seconds
    if later is None:
        assert decide(now + 1e9, open_round, policy).close == decision.close
    else:
        assert not decision.close
        assert now < later
        assert decide(later, open_round, policy).reason == "TIMEOUT"


@pytest.mark.parametrize(
    ("open_round", "policy", "want"),
    [
        (
            facts(0, live=1, formed=False),
            FOUR,
            "3 more workers to join: the quorum is 4, 1 live",
        ),
        (
            facts(0, live=3, formed=False),
            FOUR,
            "1 more worker to join: the quorum is 4, 3 live",
        ),
        (facts(0, live=4, formed=False), FOUR, ""),
        (facts(2, live=3, formed=False), FOUR, "1 more worker to join: the quorum is 4, 3 live"),
        # A round that is open waits for contributions; a run without workers waits for nobody.
        (facts(1, live=4), FOUR, "3 more contributions to the round, which needs 4"),
        (facts(2, live=3), FOUR, "1 more contribution to the round, which needs 3"),
        (facts(0, live=0, formed=False), FOUR, ""),
        (facts(0, live=1, formed=True), FOUR, ""),
        (facts(0, live=0, formed=False), Asynchronous(), ""),
        (facts(1, live=2, formed=False), THREE_IN_A_BUFFER, ""),
        (facts(1, live=3, formed=True), MEDIAN_OF_FOUR, "2 more contributions to the round, which needs 3"),
        (
            facts(2, live=2, formed=True),
            MEDIAN_OF_FOUR,
            "1 more worker to join: a median needs 3 contributions, 2 live",
        ),
        (facts(2, live=0, formed=True), MEDIAN_OF_FOUR, ""),
    ],
)
def test_a_run_says_which_workers_it_waits_for(open_round: RoundFacts, policy: Policy, want: str) -> None:
    assert waiting_for(open_round, policy) == want


@pytest.mark.parametrize(
    ("open_round", "policy", "want"),
    [
        (facts(0, live=1, formed=False), FOUR, "3 more workers to join: the quorum is 4, 1 live"),
        (facts(0, live=1, formed=True), FOUR, ""),
        (facts(0, live=0, formed=False), FOUR, ""),
        (facts(0, live=5, formed=False), FOUR, ""),
        (facts(0, live=1, formed=False), BoundedStaleness(1), ""),
        (facts(0, live=3), MEDIAN_OF_FOUR, ""),
        (facts(0, live=1), MEDIAN_OF_FOUR, "2 more workers to join: a median needs 3 contributions, 1 live"),
        (facts(0, live=4), TRIMMED_OF_SIX, "1 more worker to join: a trimmed mean needs 5 contributions, 4 live"),
        # A bad one that was kept out stands for a contribution, but needs a good one beside it.
        (facts(2, live=3, awaited=0, unfit=1), MEDIAN_OF_FOUR, ""),
        (
            facts(3, live=4, awaited=0, unfit=1),
            TRIMMED_OF_SIX,
            "1 more worker to join: a trimmed mean needs 5 contributions, 4 live",
        ),
    ],
)
def test_workers_are_missing_only_while_some_wait_for_others(open_round: RoundFacts, policy: Policy, want: str) -> None:
    assert missing_workers(open_round, policy) == want


@pytest.mark.parametrize(
    ("example_counts", "staleness", "policy", "want"),
    [
        ([5], [0], FOUR, [1.0]),
        ([1, 1, 1, 1], [0, 0, 0, 0], FOUR, [0.25] * 4),
        ([3, 1, 4], [0, 0, 0], FOUR, [0.375, 0.125, 0.5]),
        ([7], [3], Asynchronous(), [1.0]),
        ([7], [0], Asynchronous(scaling="inverse"), [1.0]),
        ([7], [3], Asynchronous(scaling="inverse"), [0.25]),
        ([1, 3], [1, 0], Asynchronous(scaling="inverse"), [0.125, 0.75]),
        ([7], [3], BoundedStaleness(3), [1.0]),
        ([1, 3], [1, 0], THREE_IN_A_BUFFER, [0.125, 0.75]),
        ([1, 3], [1, 0], Buffered(2, scaling="none"), [0.25, 0.75]),
        # Where the mean is not what is made of them, example counts do not matter.
        ([1, 3, 9], [0, 0, 0], MEDIAN_OF_FOUR, [1.0, 1.0, 1.0]),
        ([1, 3, 9], [0, 1, 3], Buffered(3, combine="median"), [1.0, 0.5, 0.25]),
        ([1, 3, 9], [0, 1, 3], Buffered(3, combine="trimmed_mean", scaling="none"), [1.0, 1.0, 1.0]),
    ],
)
def test_contributions_weigh_by_examples_and_where_asked_by_staleness(
    example_counts: list[int], staleness: list[int], policy: Policy, want: list[float]
) -> None:
    assert factors(example_counts, staleness, policy) == want


counts = st.lists(st.integers(1, 2**62), min_size=1, max_size=64)


@given(counts, st.sampled_from([FOUR, Asynchronous()]))
def test_without_scaling_the_weights_are_the_shares_and_sum_to_one(example_counts: list[int], policy: Policy) -> None:
    weights = factors(example_counts, [1] * len(example_counts), policy)
    total = sum(example_counts)
    for weight, count in zip(weights, example_counts, strict=True):
        assert weight == pytest.approx(float(Fraction(count, total)), rel=2**-52)
    assert sum(map(Fraction, weights)) == pytest.approx(1, abs=2**-52)


@given(st.lists(st.tuples(st.integers(1, 2**31), st.integers(0, 1000)), min_size=1, max_size=32))
def test_inverse_scaling_only_takes_away(contributions: list[tuple[int, int]]) -> None:
    example_counts, staleness = (list(column) for column in zip(*contributions, strict=True))
    plain = factors(example_counts, staleness, Asynchronous())
    scaled = factors(example_counts, staleness, Asynchronous(scaling="inverse"))
    for whole, part, steps in zip(plain, scaled, staleness, strict=True):
        assert part * (1 + steps) == pytest.approx(whole, rel=1e-12)


def test_a_staleness_for_each_contribution_is_demanded() -> None:
    with pytest.raises(ValueError, match="zip"):
        factors([1, 1], [0], Asynchronous(scaling="inverse"))


@pytest.mark.parametrize(
    ("live_count", "policy", "want"),
    [
        (3, FOUR, False),
        (4, FOUR, True),
        (5, FOUR, True),
        (0, FOUR, False),
        (4, Asynchronous(), False),
        (4, BoundedStaleness(0), False),
        (4, THREE_IN_A_BUFFER, False),
    ],
)
def test_a_run_is_formed_once_its_quorum_is_alive(live_count: int, policy: Policy, want: bool) -> None:
    assert is_formed(live_count, policy) == want


@pytest.mark.parametrize(
    ("losses", "want"),
    [
        ([], None),
        ([(None, 3)], None),
        ([(2.5, 3)], 2.5),
        ([(1.0, 3), (5.0, 1)], 2.0),
        ([(1.0, 3), (None, 100), (5.0, 1)], 2.0),
        ([(0.0, 1)], 0.0),
    ],
)
def test_the_mean_loss_is_that_of_the_examples_whose_loss_is_known(
    losses: list[tuple[float | None, int]], want: float | None
) -> None:
    assert mean_loss(losses) == want
