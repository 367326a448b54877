"""An optimizer laid flat: what the wire carries and what the arithmetic reads.

The rule keeps what compiled code depends on; `Settings` holds what may change while a run goes on.
"""

from typing import TYPE_CHECKING, NamedTuple

from kedge.optim.schedules import Schedule

if TYPE_CHECKING:
    from kedge.optim.rules import Rule


class Settings(NamedTuple):
    """The hyperparameters that may differ between parameter groups, and change while the run goes on."""

    lr: float | Schedule
    weight_decay: float
    """Coupled L2 decay, added to the gradient as weight_decay * weights."""
    decoupled_weight_decay: float
    """The decay that is part of the rule (AdamW and its like); 0 for rules that have none."""
    grad_clip_norm: float | None
    """Clip by global norm; None: not."""
    grad_clip_value: float | None
    """Clip every element; None: not."""


class UpdateSpec(NamedTuple):
    """Everything that happens to an averaged gradient: clip by norm, clip by value, decay, rule, rate, Lookahead."""

    rule: "Rule"
    """The base optimizer, without what `settings` says: two that compile to the same code are equal."""
    settings: Settings
    sync_period: int | None
    """Lookahead's k; None: no slow weights."""
    alpha: float
    """Lookahead's slow step size."""
    reset_state: bool
    """Whether a lookahead sync sets the rule's state back to that of step 0."""

    def ends_sync_period(self, step: int) -> bool:
        """Whether the step of this number (the first is 1) ends with a lookahead sync."""
        return self.sync_period is not None and step % self.sync_period == 0

    def rule_step(self, step: int) -> int:
        """The number of the step (from 1) as the rule counts: since its state was last that of step 0."""
        if self.sync_period is None or not self.reset_state:
            return step
        return (step - 1) % self.sync_period + 1
