"""What all base optimizers share: a base optimizer turns an averaged gradient into a step.

Each has the options around its rule too (`lr`, `weight_decay`, clips), which `kedge.optim.spec` lays flat.
"""

from dataclasses import fields, replace
from typing import Any, ClassVar

from kedge.optim._checks import check_clips, check_rate, set_floats, set_plain
from kedge.optim.schedules import Schedule
from kedge.optim.spec import Settings, UpdateSpec


def check_lr(lr: object) -> None:
    """Refuses what is neither a rate nor a schedule of ours."""
    if isinstance(lr, Schedule):
        return
    if callable(lr) or callable(getattr(lr, "step", None)):
        raise TypeError(f"lr is {lr!r}: only the schedules of kedge.optim can travel to the server")
    check_rate("lr", lr)


class Rule:
    """The base of all base optimizers, which are frozen dataclasses: checked, comparable and hashable.

    Numbers become floats, so that two that mean the same are equal.

    Attributes:
        lr: the rate, a number >= 0 or a schedule.
        weight_decay: >= 0.
        grad_clip_norm: the gradient's global norm is clipped to it, > 0; None: not.
        grad_clip_value: the gradient's elements are clipped to [-value, value], > 0; None: not.
    """

    decouples_decay: ClassVar[bool] = False
    """Whether `weight_decay` is part of the rule (decoupled, as AdamW's) and not added to the gradient (L2)."""

    lr: float | Schedule
    weight_decay: float
    grad_clip_norm: float | None
    grad_clip_value: float | None

    def __post_init__(self) -> None:
        """Checks every field."""
        set_plain(self)
        check_lr(self.lr)
        check_rate("weight_decay", self.weight_decay)
        check_clips(self.grad_clip_norm, self.grad_clip_value)
        self._check_rule()
        set_floats(self, *(field.name for field in fields(self)))  # type: ignore[arg-type]  # every subclass is one

    def spec(self) -> UpdateSpec:
        """This optimizer laid flat."""
        decays = (0.0, self.weight_decay) if self.decouples_decay else (self.weight_decay, 0.0)
        settings = Settings(self.lr, *decays, self.grad_clip_norm, self.grad_clip_value)
        return UpdateSpec(self.without_settings(), settings, sync_period=None, alpha=0.0, reset_state=False)

    def without_settings(self) -> "Rule":
        """The rule alone, with everything that `Settings` holds at zero or off."""
        return self.with_settings(Settings(0.0, 0.0, 0.0, None, None))

    def with_settings(self, settings: Settings) -> "Rule":
        """This rule with those options around it; of the two decays, the one that it has."""
        options: dict[str, Any] = {
            "lr": settings.lr,
            "weight_decay": settings.decoupled_weight_decay if self.decouples_decay else settings.weight_decay,
            "grad_clip_norm": settings.grad_clip_norm,
            "grad_clip_value": settings.grad_clip_value,
        }
        return replace(self, **options)  # type: ignore[type-var]  # every subclass is a dataclass

    def _check_rule(self) -> None:
        """Refuses what the rule's own fields must not hold."""

    def _set(self, field: str, value: object) -> None:
        object.__setattr__(self, field, value)
