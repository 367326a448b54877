"""What must be true of a simulated server, whatever has happened."""

from collections.abc import Collection
from typing import TYPE_CHECKING

from kedge.policies import Synchronous

from . import facts
from .history import SimulatedContribution, gradient_of
from .likeness import check_likeness

if TYPE_CHECKING:
    from .server import Server


def settle(server: "Server") -> None:
    """Settles the accounts, when everything that closed has been applied."""
    assert not server.is_applying
    assert server.disk.is_idle
    server.told.finish()
    recorded = {c.gradient.value for c in server.recorded.values()}
    rejected = {c.gradient.value for c in server.recorded.values() if c.result and c.result.outcome == "rejected"}
    applied, held = server.rounds.step_of.keys(), {gradient_of(c).value for c in server.coordinator.held}
    assert recorded == applied | rejected | held
    assert len(recorded) == len(applied) + len(rejected) + len(held), "a contribution has two fates"
    assert server.coordinator._pending_count == len(held)
    assert server.weights == server.disk.weights
    server.promises.check(server.model.fates)
    _check_journal(server, applied)
    for contribution in server.recorded.values():
        _check_fate(server, contribution)
    check_likeness(server.coordinator, server.disk.image)


def check_what_is_said(server: "Server") -> None:
    """Nobody waits in silence."""
    model, coordinator = server.model, server.coordinator
    if not isinstance(model.policy, Synchronous) or not model.live:
        return
    said = coordinator.waiting_for()
    assert said or not (model.held or model.lacks_workers)
    if model.held:
        reason = "WAITING_FOR_COHORT" if model.waits_for_cohort else "WAITING_FOR_QUORUM"
        assert coordinator.decide(server.loop.now).reason == reason


def _check_journal(server: "Server", applied: Collection[int]) -> None:
    """What is written says of each contribution at most once that it is in a step, and of none that was rejected."""
    stepped = [j.entry for fact in server.disk.written if isinstance(fact, facts.Stepped) for j in fact.judged]
    rejected = {fact.judged.entry.key for fact in server.disk.written if isinstance(fact, facts.Rejected)}
    assert sorted(entry.gradient.value for entry in stepped) == sorted(applied)
    assert not rejected & {entry.key for entry in stepped}


def _check_fate(server: "Server", contribution: SimulatedContribution) -> None:
    fate, result = server.model.fates[contribution.key], contribution.result
    if fate == "held":
        assert result is None
    elif fate.startswith("step"):
        assert result is not None
        assert (result.outcome, f"step {result.step}") == ("applied", fate)
    else:
        assert result is not None
        assert (result.outcome, result.reason) == ("rejected", fate)
