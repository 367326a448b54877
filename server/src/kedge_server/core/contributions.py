"""A contribution from its arrival to its result, and the round that it becomes part of."""

from dataclasses import dataclass, field

from kedge.policies import Policy
from kedge_server.core.commits import Judgement
from kedge_server.core.rounds import mean_loss
from kedge_server.core.values import ContributionHeader, PushResult


@dataclass(eq=False, slots=True)
class Contribution:
    """One pushed gradient. Whoever has to know overrides `on_closed` and `on_result`."""

    header: ContributionHeader
    staleness: int = 0
    """The closed step when it was judged, less its base_step."""
    result: PushResult | None = None
    is_held: bool = False
    """Whether it is in a round that is open."""
    judgement: Judgement | None = None
    """Until it is settled."""

    def on_closed(self) -> None:
        """Its round has closed: a result follows, and can no longer be a rejection."""

    def on_result(self, result: PushResult) -> None:
        """What became of it is known."""

    def settle(self, result: PushResult) -> None:
        """Says what became of it."""
        self.result, self.is_held, self.judgement = result, False, None
        self.on_result(result)


@dataclass(eq=False)
class Round:
    """The contributions that become one step, in the order of their arrival."""

    policy: Policy
    """The one that it was opened under."""
    contributions: list[Contribution] = field(default_factory=list)
    worker_ids: set[str] = field(default_factory=set)
    """Who has contributed."""
    unfit_worker_ids: set[str] = field(default_factory=set)
    """Who has sent for it what was rejected for its values."""
    late_unfit_worker_ids: set[str] = field(default_factory=set)
    """Those of them who have done so since it holds a contribution."""
    unfit_count: int = 0
    """When it has closed: the live ones of those that had not contributed after all."""
    opened_at_seconds: float | None = None
    close_reason: str = ""
    step: int = 0
    """The step that it becomes; 0 while it is open."""

    def add(self, contribution: Contribution, now_seconds: float) -> None:
        """Takes a contribution."""
        if not self.contributions:
            self.opened_at_seconds = now_seconds
        self.contributions.append(contribution)
        self.worker_ids.add(contribution.header.worker_id)
        contribution.is_held = True

    def note_unfit(self, worker_id: str) -> None:
        """Takes note that a worker has sent what cannot be taken."""
        self.unfit_worker_ids.add(worker_id)
        if self.contributions:
            self.late_unfit_worker_ids.add(worker_id)

    def forget_unfit_but(self, worker_ids: set[str]) -> None:
        """Forgets all others that have sent what cannot be taken: names that come and go are not to pile up."""
        self.unfit_worker_ids &= worker_ids
        self.late_unfit_worker_ids &= worker_ids

    @property
    def excused_worker_ids(self) -> set[str]:
        """Whom nobody waits for.

        Who has sent a bad one need not send another, once someone has sent nothing but good ones: after a batch that
        was bad everywhere all get their chance. Who has sent one since the round holds a good one has had it.
        """
        return self.unfit_worker_ids if self.worker_ids - self.unfit_worker_ids else self.late_unfit_worker_ids

    def close(self, reason: str, step: int, *, unfit_count: int) -> None:
        """Ends it as a step."""
        self.close_reason, self.step, self.unfit_count = reason, step, unfit_count
        for contribution in self.contributions:
            contribution.is_held = False
            contribution.on_closed()

    def in_order(self) -> list[Contribution]:
        """The contributions as they are summed up: by worker and sequence, unless the policy says otherwise."""
        if not getattr(self.policy, "deterministic", True):
            return list(self.contributions)
        return sorted(self.contributions, key=_by_worker)

    def loss(self) -> tuple[float | None, int]:
        """The mean loss of the contributions that sent one, None if none did, and the examples that it is of."""
        told = [(c.header.loss, c.header.example_count) for c in self.in_order() if c.header.loss is not None]
        return mean_loss(told), sum(count for _, count in told)


def _by_worker(contribution: Contribution) -> tuple[str, int, int]:
    header = contribution.header
    return header.worker_id, header.epoch, header.sequence
