"""When a round ends, who may pull, and how contributions weigh: pure functions of what is known."""

from collections.abc import Sequence
from typing import NamedTuple

from kedge.policies import (
    Asynchronous,
    BoundedStaleness,
    Buffered,
    Policy,
    Synchronous,
    fewest_contributions,
)
from kedge_server.core.values import MEAN, Combine


class RoundFacts(NamedTuple):
    """What is known of an open round."""

    contribution_count: int
    opened_at_seconds: float | None
    """When its first contribution came; None before."""
    live_count: int
    """Workers that hold a lease."""
    awaited_count: int
    """Those of them that the round waits for."""
    is_formed: bool
    """Whether as many workers as the quorum have been alive at one time since the run was last empty."""
    unfit_count: int = 0
    """Live workers of which the round has nothing but contributions that were rejected for their values."""


class Decision(NamedTuple):
    """Whether a round ends now, and why."""

    close: bool
    reason: str
    required_count: int
    """The contributions that end it."""
    look_again_at_seconds: float | None = None
    """When time alone may change the answer."""
    refuse: bool = False
    """It ends, but with too few contributions for what is to be made of them: they are rejected."""


def decide(now_seconds: float, facts: RoundFacts, policy: Policy) -> Decision:
    """Decides on an open round."""
    if isinstance(policy, Synchronous):
        return _decide_synchronous(now_seconds, facts, policy)
    if isinstance(policy, Buffered):
        is_full = facts.contribution_count >= policy.size
        return Decision(is_full, "BUFFER_FULL" if is_full else "BUFFERED", policy.size)
    return Decision(facts.contribution_count > 0, "EACH_CONTRIBUTION", 1)


def _decide_synchronous(now_seconds: float, facts: RoundFacts, policy: Synchronous) -> Decision:
    required = _required_count(facts, policy)
    if facts.contribution_count >= policy.quorum:
        return Decision(True, "QUORUM_REACHED", required)
    if facts.contribution_count >= required:
        return Decision(True, "ALL_LIVE_CONTRIBUTED", required)
    is_short = facts.is_formed and not facts.awaited_count
    reason = "WAITING_FOR_COHORT" if is_short else "WAITING_FOR_QUORUM"
    if policy.timeout_seconds is None or facts.opened_at_seconds is None:
        return Decision(False, reason, required)
    ends_at = facts.opened_at_seconds + policy.timeout_seconds
    if now_seconds >= ends_at:
        return _ended(facts, policy, "TIMEOUT", required)
    return Decision(False, reason, required, ends_at)


def decide_at_change(facts: RoundFacts, policy: Policy) -> Decision:
    """Decides on the round that is open when its policy is replaced: it ends with what it holds."""
    return _ended(facts, policy, "POLICY_CHANGED", facts.contribution_count)


def _ended(facts: RoundFacts, policy: Policy, reason: str, required_count: int) -> Decision:
    """A round that ends before it is whole."""
    if cohort_count(facts, policy) < smallest_cohort(policy):
        return Decision(True, "COHORT_TOO_SMALL", required_count, refuse=True)
    return Decision(True, reason, required_count)


class PullFacts(NamedTuple):
    """What is known of a live worker that wants to pull."""

    clock: int
    slowest_clock: int
    """Of the live workers."""


class PullGate(NamedTuple):
    """What a pull of fast weights by a worker has to wait for."""

    is_open: bool
    min_step: int = 0
    """The weights must be of this step at least."""
    is_exact: bool = False
    """They must be of exactly `min_step`."""
    facts: PullFacts | None = None
    bound: int = 0


def may_pull(facts: PullFacts, policy: Policy) -> tuple[bool, str]:
    """Whether a worker may have fast weights now, and why (not)."""
    if not isinstance(policy, BoundedStaleness):
        return True, "UNBOUNDED"
    lead = facts.clock - facts.slowest_clock
    return (True, "WITHIN_BOUND") if lead <= policy.bound else (False, "WAITING_FOR_SLOWEST")


def round_size(policy: Policy) -> int:
    """The contributions that a round holds at most."""
    if isinstance(policy, Synchronous):
        return policy.quorum
    return policy.size if isinstance(policy, Buffered) else 1


def smallest_cohort(policy: Policy) -> int:
    """The fewest contributions that may be made one step."""
    if isinstance(policy, Synchronous | Buffered):
        return fewest_contributions(policy.combine, policy.trim_count)
    return 1


def cohort_count(facts: RoundFacts, policy: Policy) -> int:
    """The contributions that a combination has to do with.

    Those that admission kept out count, as long as they are no more than the bad ones that it would have borne: they
    are borne already.
    """
    borne = facts.contribution_count - 1
    if isinstance(policy, Synchronous | Buffered) and policy.combine == "trimmed_mean":
        borne = policy.trim_count
    return facts.contribution_count + (facts.unfit_count if facts.unfit_count <= borne else 0)


def combination(policy: Policy, contribution_count: int) -> Combine:
    """How so many contributions become one gradient.

    A trimmed mean trims what its contributions leave room for, `trim_count` at most. It is less only where bad ones
    were kept out and count to the cohort: then it still bears the rest of those that it was chosen to bear.
    """
    if not isinstance(policy, Synchronous | Buffered):
        return MEAN
    if policy.combine != "trimmed_mean":
        return Combine(policy.combine)
    return Combine("trimmed_mean", min(policy.trim_count, (contribution_count - 1) // 2))


def is_mean(policy: Policy) -> bool:
    """Whether contributions are averaged by their example counts."""
    return not isinstance(policy, Synchronous | Buffered) or policy.combine == "mean"


def staleness_limit(policy: Policy) -> int | None:
    """The staleest contribution taken; None: any."""
    if isinstance(policy, Synchronous):
        return 0
    return None if isinstance(policy, BoundedStaleness) else policy.max_staleness


def missing_workers(facts: RoundFacts, policy: Policy) -> str:
    """How many workers have to join before the run can go on, in words; empty if none."""
    if not isinstance(policy, Synchronous) or not facts.live_count:
        return ""
    if not facts.is_formed:
        missing, needs = policy.quorum - facts.live_count, f"the quorum is {policy.quorum}"
    else:
        least, fit_count = smallest_cohort(policy), facts.live_count - facts.unfit_count
        if fit_count >= least:
            return ""
        missing = next(
            more
            for more in range(least + 1)
            if cohort_count(facts._replace(contribution_count=fit_count + more), policy) >= least
        )
        needs = f"a {policy.combine.replace('_', ' ')} needs {least} contributions"
    return f"{_count(missing, 'more worker')} to join: {needs}, {facts.live_count} live" if missing > 0 else ""


def waiting_for(facts: RoundFacts, policy: Policy) -> str:
    """What a round waits for, in words; empty when it keeps nobody waiting."""
    if not isinstance(policy, Synchronous) or not facts.live_count:
        return ""
    missing = missing_workers(facts, policy)
    if missing or not facts.contribution_count:
        return missing
    required = _required_count(facts, policy)
    return f"{_count(required - facts.contribution_count, 'more contribution')} to the round, which needs {required}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _required_count(facts: RoundFacts, policy: Synchronous) -> int:
    if not facts.is_formed:
        return policy.quorum
    return max(_fewest_left(facts, policy), min(policy.quorum, facts.contribution_count + facts.awaited_count))


def _fewest_left(facts: RoundFacts, policy: Synchronous) -> int:
    """The fewest contributions that will do, given the unfit ones that stand for some."""
    return max(1, smallest_cohort(policy) - (cohort_count(facts, policy) - facts.contribution_count))


def factors(example_counts: Sequence[int], staleness: Sequence[int], policy: Policy) -> list[float]:
    """What each contribution is multiplied with before they are combined.

    For a mean its share of the examples, scaled by staleness where the policy says so; otherwise the scale alone.
    """
    is_scaled = isinstance(policy, Asynchronous | Buffered) and policy.scaling == "inverse"
    total = sum(example_counts)
    shares = [count / total for count in example_counts] if is_mean(policy) else [1.0] * len(staleness)
    return [share / (1 + steps) for share, steps in zip(shares, staleness, strict=True)] if is_scaled else shares


def mean_loss(losses: Sequence[tuple[float | None, int]]) -> float | None:
    """The mean of (loss, example_count) pairs, over those that have a loss."""
    known = [(loss, count) for loss, count in losses if loss is not None]
    return sum(loss * count for loss, count in known) / sum(count for _, count in known) if known else None


def is_formed(live_count: int, policy: Policy) -> bool:
    """Whether the quorum is alive, so that the run is formed until the last worker goes."""
    return isinstance(policy, Synchronous) and live_count >= policy.quorum
