"""When a round closes, and how its contributions weigh: pure functions of what is known."""

from collections.abc import Sequence
from typing import NamedTuple

from kedge.policies import Asynchronous, Policy, Synchronous


class RoundFacts(NamedTuple):
    """What is known of an open round."""

    contribution_count: int
    opened_at_seconds: float | None
    """When its first contribution came; None before."""
    live_count: int
    """Workers that hold a lease."""
    awaited_count: int
    """Those of them that have not contributed to the round."""
    is_formed: bool
    """Whether as many workers as the quorum have been alive at one time since the run was last empty."""


class Decision(NamedTuple):
    """Whether a round closes now, and why."""

    close: bool
    reason: str
    required_count: int
    """The contributions that close it."""
    look_again_at_seconds: float | None = None
    """When time alone may change the answer."""


def decide(now_seconds: float, facts: RoundFacts, policy: Policy) -> Decision:
    """Decides on an open round."""
    if isinstance(policy, Asynchronous):
        return Decision(facts.contribution_count > 0, "EACH_CONTRIBUTION", 1)
    required = _required_count(facts, policy)
    if facts.contribution_count >= policy.quorum:
        return Decision(True, "QUORUM_REACHED", required)
    if facts.contribution_count >= required:
        return Decision(True, "ALL_LIVE_CONTRIBUTED", required)
    if policy.timeout_seconds is None or facts.opened_at_seconds is None:
        return Decision(False, "WAITING_FOR_QUORUM", required)
    ends_at = facts.opened_at_seconds + policy.timeout_seconds
    if now_seconds >= ends_at:
        return Decision(True, "TIMEOUT", required)
    return Decision(False, "WAITING_FOR_QUORUM", required, ends_at)


def waiting_for(facts: RoundFacts, policy: Policy) -> str:
    """What the run waits for, in words; empty when it keeps nobody waiting."""
    if isinstance(policy, Asynchronous) or not facts.live_count:
        return ""
    missing = policy.quorum - facts.live_count
    if missing > 0 and not facts.is_formed:
        return f"{_count(missing, 'more worker')} to join: the quorum is {policy.quorum}, {facts.live_count} live"
    if not facts.contribution_count:
        return ""
    required = _required_count(facts, policy)
    return f"{_count(required - facts.contribution_count, 'more contribution')} to the round, which needs {required}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _required_count(facts: RoundFacts, policy: Synchronous) -> int:
    if not facts.is_formed:
        return policy.quorum
    return max(1, min(policy.quorum, facts.contribution_count + facts.awaited_count))


def mean_weights(example_counts: Sequence[int], staleness: Sequence[int], policy: Policy) -> list[float]:
    """The factor of each contribution: its share of the examples, scaled by staleness where the policy says so."""
    total = sum(example_counts)
    shares = [count / total for count in example_counts]
    if isinstance(policy, Asynchronous) and policy.scaling == "inverse":
        return [share / (1 + steps) for share, steps in zip(shares, staleness, strict=True)]
    return shares


def mean_loss(losses: Sequence[tuple[float | None, int]]) -> float | None:
    """The mean of (loss, example_count) pairs, over those that have a loss."""
    known = [(loss, count) for loss, count in losses if loss is not None]
    return sum(loss * count for loss, count in known) / sum(count for _, count in known) if known else None


def is_formed(was_formed: bool, live_count: int, policy: Policy) -> bool:
    """Whether the quorum has been alive at one time since the run was last empty."""
    if isinstance(policy, Asynchronous) or live_count == 0:
        return False
    return was_formed or live_count >= policy.quorum
