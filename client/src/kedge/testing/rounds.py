"""The open round: when it closes, and what gradient its contributions become."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from kedge.policies import Asynchronous, BoundedStaleness, Buffered, Policy, Synchronous, fewest_contributions
from kedge.testing.ledger import Entry


@dataclass
class Round:
    """The contributions held."""

    entries: list[Entry] = field(default_factory=list)
    began_at: float = 0.0
    """When the first came."""
    unfit: set[str] = field(default_factory=set)
    """The workers that have sent for it what was rejected for its values."""
    late_unfit: set[str] = field(default_factory=set)
    """Those that did so when it held a contribution."""

    @property
    def contributors(self) -> set[str]:
        """The workers that they are of."""
        return {entry.push.lease.worker for entry in self.entries}

    def note_unfit(self, worker: str) -> None:
        """Takes note of who sent what cannot be taken."""
        self.unfit.add(worker)
        if self.entries:
            self.late_unfit.add(worker)

    def add(self, entry: Entry, now: float) -> None:
        """Takes one more."""
        if not self.entries:
            self.began_at = now
        self.entries.append(entry)


class Circumstances(NamedTuple):
    """What decides on a round besides its contributions."""

    policy: Policy
    joined_at: Mapping[str, float]
    """When each worker that holds a lease took it."""
    formed_at: float | None
    """When a quorum of them was there at one time; None if it was not since there were none."""


def closing_reason(held: Round, about: Circumstances, now: float) -> str | None:
    """Why the round closes now; None if it does not."""
    count = len(held.entries)
    if not count:
        return None
    match about.policy:
        case Asynchronous() | BoundedStaleness():
            return "EACH_CONTRIBUTION"
        case Buffered(size=size):
            return "BUFFER_FULL" if count >= size else None
        case Synchronous(quorum=quorum, timeout_seconds=timeout):
            if count >= quorum:
                return "QUORUM_REACHED"
            if count >= required_count(held, about):
                return "ALL_LIVE_CONTRIBUTED"
            return "TIMEOUT" if timeout is not None and now >= held.began_at + timeout else None


def holding_reason(held: Round, about: Circumstances) -> str:
    """Why a round that has contributions does not close."""
    if isinstance(about.policy, Buffered):
        return "BUFFERED"
    is_waited_for = about.formed_at is None or _awaited(held, about)
    return "WAITING_FOR_QUORUM" if is_waited_for else "WAITING_FOR_COHORT"


def required_count(held: Round, about: Circumstances) -> int:
    """How many contributions close the round."""
    match about.policy:
        case Asynchronous() | BoundedStaleness():
            return 1
        case Buffered(size=size):
            return size
        case Synchronous(quorum=quorum):
            if about.formed_at is None:
                return quorum
            return max(_fewest(held, about), min(quorum, len(held.entries) + len(_awaited(held, about))))


def lacking(held: Round, about: Circumstances) -> int:
    """How many contributions the round is short of for a step."""
    return max(0, _fewest(held, about) - len(held.entries))


def workers_awaited(held: Round, about: Circumstances) -> str:
    """How many workers the run waits for, in words; empty if it does not."""
    live = len(about.joined_at)
    if not isinstance(about.policy, Synchronous) or not live:
        return ""
    if about.formed_at is None:
        missing, why = about.policy.quorum - live, f"the quorum is {about.policy.quorum}"
    else:
        missing, fewest = _short_of(held, about), fewest_contributions(about.policy.combine, about.policy.trim_count)
        why = f"a {about.policy.combine.replace('_', ' ')} needs {fewest} contributions"
    return f"{missing} more worker{'s' * (missing > 1)} to join: {why}, {live} live" if missing > 0 else ""


def contributions_awaited(held: Round, about: Circumstances) -> str:
    """How many contributions a round that has some waits for, in words; empty where nobody waits for them."""
    if not isinstance(about.policy, Synchronous) or not held.entries or not about.joined_at:
        return ""
    required = required_count(held, about)
    missing = required - len(held.entries)
    return f"{missing} more contribution{'s' * (missing > 1)} to the round, which needs {required}"


def _awaited(held: Round, about: Circumstances) -> set[str]:
    """The workers that the round of a run that has formed waits for.

    Whoever joined later may contribute, but may as well never do. Whoever sent a bad gradient need not send another,
    unless all have; whoever did so when the round held a good one had its chance.
    """
    assert about.formed_at is not None
    since = max(held.began_at, about.formed_at)
    there = {worker for worker, joined_at in about.joined_at.items() if joined_at <= since}
    excused = held.unfit if held.contributors - held.unfit else held.late_unfit
    return there - held.contributors - excused


def _fewest(held: Round, about: Circumstances) -> int:
    """How many contributions make a step at least."""
    policy = about.policy
    if not isinstance(policy, Synchronous | Buffered):
        return 1
    fewest = fewest_contributions(policy.combine, policy.trim_count)
    return max(1, fewest - _stand_ins(_kept_out(held, about), len(held.entries), policy))


def _short_of(held: Round, about: Circumstances) -> int:
    """How many good workers have to join before those who live can make a step, if the bad ones stay so."""
    policy, kept_out = about.policy, _kept_out(held, about)
    assert isinstance(policy, Synchronous)
    fewest, good = fewest_contributions(policy.combine, policy.trim_count), len(about.joined_at) - kept_out
    enough = (more for more in range(fewest) if good + more + _stand_ins(kept_out, good + more, policy) >= fewest)
    return next(enough, fewest)


def _kept_out(held: Round, about: Circumstances) -> int:
    """The live workers of which the round has nothing but bad gradients."""
    is_counted = isinstance(about.policy, Synchronous)
    return len((held.unfit & about.joined_at.keys()) - held.contributors) if is_counted else 0


def _stand_ins(kept_out: int, count: int, policy: Synchronous | Buffered) -> int:
    """The bad gradients kept out that stand for contributions: no more than the combination of so many had borne."""
    borne = policy.trim_count if policy.combine == "trimmed_mean" else count - 1
    return kept_out if kept_out <= borne else 0


def staleness_limit(policy: Policy) -> int | None:
    """The staleness above which a contribution is rejected; None: there is none."""
    match policy:
        case Synchronous():
            return 0
        case Asynchronous() | Buffered():
            return policy.max_staleness
        case BoundedStaleness():
            return None


def combined(held: Round, policy: Policy) -> np.ndarray:
    """The gradient that a round becomes, float64 of shape [n]."""
    ordered = entries = held.entries
    if isinstance(policy, Synchronous | Buffered) and policy.deterministic:
        ordered = sorted(
            entries, key=lambda entry: (entry.push.lease.worker, entry.push.lease.epoch, entry.push.sequence)
        )
    scaled = [entry.gradient * _scale(entry, policy) for entry in ordered]
    match policy:
        case Synchronous(combine="median") | Buffered(combine="median"):
            return np.asarray(np.median(scaled, axis=0))
        case Synchronous(combine="trimmed_mean", trim_count=count) | Buffered(combine="trimmed_mean", trim_count=count):
            trim = min(count, (len(scaled) - 1) // 2)  # fewer if bad ones, which were kept out, stand for the rest
            return np.asarray(np.sort(scaled, axis=0)[trim : len(scaled) - trim].mean(axis=0))
    counts = [entry.push.example_count for entry in ordered]
    return sum((g * n for g, n in zip(scaled, counts, strict=True)), np.zeros(())) / sum(counts)


def mean_loss(entries: list[Entry]) -> tuple[float | None, int]:
    """The mean loss of the contributions that have one, weighted by their examples; and the number of those."""
    told = [(entry.push.loss, entry.push.example_count) for entry in entries if entry.push.loss is not None]
    count = sum(n for _, n in told)
    return (sum(loss * n for loss, n in told) / count if told else None), count


def _scale(entry: Entry, policy: Policy) -> float:
    is_inverse = isinstance(policy, Asynchronous | Buffered) and policy.scaling == "inverse"
    return 1 / (1 + entry.staleness) if is_inverse else 1.0
