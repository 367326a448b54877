"""The open round: when it closes, and what gradient its contributions become."""

from collections.abc import Collection
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
    unfit: set[str] = field(default_factory=set)
    """The workers that have sent nothing for it but what was rejected for its values."""

    @property
    def contributors(self) -> set[str]:
        """The workers that they are of."""
        return {entry.push.lease.worker for entry in self.entries}

    def add(self, entry: Entry, now: float) -> None:
        """Takes one more."""
        if not self.entries:
            self.began_at = now
        self.entries.append(entry)
        self.unfit.discard(entry.push.lease.worker)

    def note_unfit(self, worker: str) -> None:
        """Takes note that a worker sent what cannot be taken."""
        if worker not in self.contributors:
            self.unfit.add(worker)


class Circumstances(NamedTuple):
    """What decides on a round besides its contributions."""

    policy: Policy
    live: Collection[str]
    """The workers that hold a lease."""
    is_formed: bool
    """Whether a quorum of them has been there at one time since there were none."""


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


def required_count(held: Round, about: Circumstances) -> int:
    """How many contributions close the round."""
    match about.policy:
        case Asynchronous() | BoundedStaleness():
            return 1
        case Buffered(size=size):
            return size
        case Synchronous(quorum=quorum):
            awaited = set(about.live) - held.contributors - held.unfit
            return min(quorum, len(held.entries) + len(awaited)) if about.is_formed else quorum


def workers_awaited(about: Circumstances) -> str:
    """How many workers the run waits for, in words; empty if it does not."""
    if not isinstance(about.policy, Synchronous) or about.is_formed or not about.live:
        return ""
    quorum, live = about.policy.quorum, len(about.live)
    missing = quorum - live
    return f"{missing} more worker{'s' * (missing > 1)} to join: the quorum is {quorum}, {live} live"


def contributions_awaited(held: Round, about: Circumstances) -> str:
    """How many contributions a round that has some waits for, in words; empty where nobody waits for them."""
    if not isinstance(about.policy, Synchronous) or not held.entries or not about.live:
        return ""
    required = required_count(held, about)
    missing = required - len(held.entries)
    return f"{missing} more contribution{'s' * (missing > 1)} to the round, which needs {required}"


def lacking(held: Round, policy: Policy) -> int:
    """How many contributions the round is short of for a step; bad ones that were kept out may stand for some."""
    if not isinstance(policy, Synchronous | Buffered):
        return 0
    borne = policy.trim_count if policy.combine == "trimmed_mean" else len(held.entries) - 1
    counted = len(held.entries) + (len(held.unfit) if len(held.unfit) <= borne else 0)
    return max(0, fewest_contributions(policy.combine, policy.trim_count) - counted)


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
            trim = count - len(held.unfit) if len(held.unfit) <= count else count
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
