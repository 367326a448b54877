"""Lookahead around a base optimizer, and the way from a flat `UpdateSpec` back to an optimizer."""

from dataclasses import dataclass

from kedge.optim._checks import (
    check,
    check_clips,
    check_count,
    check_flag,
    check_number,
    check_rate,
    set_floats,
    set_plain,
)
from kedge.optim.rules import Rule, check_lr
from kedge.optim.schedules import Schedule
from kedge.optim.spec import UpdateSpec

MAX_SYNC_PERIOD = 2**32 - 1


@dataclass(frozen=True)
class Lookahead:
    """Lookahead: every `sync_period` steps `slow += alpha (fast - slow)`, and fast is reset to slow.

    The options from `lr` to `grad_clip_value` take the place of the base optimizer's; weight decay or a clip that is
    set in both places is refused, and so is weight decay around a base optimizer whose own is decoupled.

    Attributes:
        base_optimizer: what makes the fast steps.
        sync_period: k, the fast steps from one lookahead sync to the next, >= 1.
        alpha: the slow step size, in [0, 1].
        lr: a rate that replaces the base optimizer's; None keeps that. (braintools: 0.001, which it then ignores.)
        weight_decay: coupled L2 decay, >= 0; 0 around AdamW and its like, which have their own.
        grad_clip_norm: the gradient's global norm is clipped to it.
        grad_clip_value: the gradient's elements are clipped to [-value, value].
        reset_state: whether a lookahead sync sets the base optimizer's moments back to those of step 0. By default they
            are kept.

    Source: arXiv:1907.08610, algorithm 1.
    """

    base_optimizer: Rule
    sync_period: int = 5
    alpha: float = 0.5
    lr: float | Schedule | None = None
    weight_decay: float = 0.0
    grad_clip_norm: float | None = None
    grad_clip_value: float | None = None
    reset_state: bool = False

    def __post_init__(self) -> None:
        """Checks every field."""
        if not isinstance(self.base_optimizer, Rule):
            raise TypeError(
                f"base_optimizer is {self.base_optimizer!r}: give an optimizer of kedge.optim other than Lookahead"
            )
        set_plain(self)
        check_count("sync_period", self.sync_period, minimum=1)
        check("sync_period", self.sync_period, self.sync_period <= MAX_SYNC_PERIOD, f"at most {MAX_SYNC_PERIOD}")
        check_number("alpha", self.alpha)
        check("alpha", self.alpha, 0 <= self.alpha <= 1, "in [0, 1]")
        if self.lr is not None:
            check_lr(self.lr)
        check_rate("weight_decay", self.weight_decay)
        check_clips(self.grad_clip_norm, self.grad_clip_value)
        check_flag("reset_state", self.reset_state)
        set_floats(self, "alpha", "lr", "weight_decay", "grad_clip_norm", "grad_clip_value")
        self._check_options()

    def _check_options(self) -> None:
        """Refuses what the base optimizer has too, or has of another kind."""
        name, base = type(self.base_optimizer).__name__, self.base_optimizer.spec().settings
        if self.weight_decay and self.base_optimizer.decouples_decay:
            given = self.weight_decay
            raise ValueError(f"weight_decay is {given!r}: {name} has its own, which is decoupled; set it on {name}")
        for field in ("weight_decay", "grad_clip_norm", "grad_clip_value"):
            if getattr(self, field) and getattr(base, field):
                raise ValueError(f"{field} is set on Lookahead and on its base optimizer: set it on one of them")

    def spec(self) -> UpdateSpec:
        """This optimizer laid flat."""
        flat = self.base_optimizer.spec()
        base = flat.settings
        settings = base._replace(
            lr=base.lr if self.lr is None else self.lr,
            weight_decay=self.weight_decay or base.weight_decay,
            grad_clip_norm=base.grad_clip_norm if self.grad_clip_norm is None else self.grad_clip_norm,
            grad_clip_value=base.grad_clip_value if self.grad_clip_value is None else self.grad_clip_value,
        )
        return UpdateSpec(flat.rule, settings, self.sync_period, self.alpha, self.reset_state)


Optimizer = Rule | Lookahead


def from_spec(spec: UpdateSpec) -> Optimizer:
    """An optimizer that lies flat as `spec` does, with every option on the base optimizer where that can hold it.

    Raises:
        ValueError, TypeError: for settings that cannot be, or that the rule cannot have; the text begins with the name.
    """
    settings = spec.settings
    check_rate("decoupled_weight_decay", settings.decoupled_weight_decay)
    base = spec.rule.with_settings(settings)
    name, held = type(base).__name__, base.spec().settings
    if held.decoupled_weight_decay != settings.decoupled_weight_decay:
        given = settings.decoupled_weight_decay
        raise ValueError(f"decoupled_weight_decay is {given!r}: {name} has no decay of its own; give weight_decay")
    outer_decay = 0.0 if held.weight_decay == settings.weight_decay else settings.weight_decay
    if spec.sync_period is not None:
        return Lookahead(base, spec.sync_period, spec.alpha, weight_decay=outer_decay, reset_state=spec.reset_state)
    if outer_decay:
        raise ValueError(
            f"weight_decay is {outer_decay!r}: it is coupled, and {name}'s is not; set that of {name} itself"
        )
    return base
