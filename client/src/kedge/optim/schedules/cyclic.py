"""Schedules that go up and down."""

from collections.abc import Callable
from dataclasses import KW_ONLY, InitVar, dataclass, field
from typing import Literal

from kedge.optim._checks import FLOAT32_MAX, check, check_number
from kedge.optim.schedules.base import (
    Schedule,
    Tick,
    TickingSchedule,
    blend,
    check_choice,
    check_epochs,
    check_positive,
    check_rates,
    grown,
    half_cosine,
    set_field,
)


@dataclass(frozen=True, repr=False)
class CyclicLR(TickingSchedule):
    """Linearly from `base_lr` up to `max_lr` and down again, again and again.

    The ways up and down may differ in length, as in PyTorch. (braintools 0.3.0 goes down as fast as up.)

    Attributes:
        base_lr: the rate at the start of a cycle, >= 0.
        max_lr: the rate where it turns, >= 0. It may be less than base_lr: then cycles go down first.
        step_size_up: epochs of the way from base_lr to max_lr, >= 1.
        step_size_down: epochs of the way back, >= 1; None means step_size_up.
        mode: how the amplitude changes: "triangular": not at all; "triangular2": it is halved from cycle to cycle;
            "exp_range": it is multiplied by `gamma ** epoch`.
        gamma: > 0, and at most 1 if max_lr is less than base_lr. Used in the mode "exp_range" alone.
        scale_fn: only None: a function cannot travel to a server.
        scale_mode: "cycle" or "iterations", as braintools has it for `scale_fn`; of no effect, and not kept.
        last_epoch: the epoch to begin at; this, `steps_per_epoch` and `tick` as in `Schedule`.

    Source: arXiv:1506.01186, section 3.
    """

    base_lr: float = 1e-3
    max_lr: float = 1e-2
    step_size_up: int = 2000
    step_size_down: int | None = None
    mode: Literal["triangular", "triangular2", "exp_range"] = "triangular"
    gamma: float = 1.0
    scale_fn: InitVar[Callable[..., float] | None] = None
    scale_mode: InitVar[Literal["cycle", "iterations"]] = "cycle"
    last_epoch: int = 0

    def __post_init__(self, scale_fn: object, scale_mode: object) -> None:
        """Checks every field."""
        super().__post_init__()
        if scale_fn is not None:
            modes = '"triangular", "triangular2" or "exp_range"'
            raise TypeError(f"scale_fn is {scale_fn!r}: it cannot travel to a server; give mode={modes} instead")
        check("scale_mode", scale_mode, scale_mode in ("cycle", "iterations"), '"cycle" or "iterations"')

    def _check(self) -> None:
        check_rates(self, "base_lr", "max_lr")
        check_epochs(self, "step_size_up", minimum=1)
        if self.step_size_down is not None:
            check_epochs(self, "step_size_down", minimum=1)
        check_choice(self, "mode", ("triangular", "triangular2", "exp_range"))
        check_positive(self, "gamma")
        falls = self.max_lr < self.base_lr
        check("gamma", self.gamma, not falls or self.gamma <= 1, "at most 1 while max_lr is less than base_lr")

    def _rate(self, epoch: int) -> float:
        up = self.step_size_up
        cycle, since = divmod(epoch, up + self._down)
        height = since / up if since <= up else 1.0 - (since - up) / self._down
        scales = {"triangular": (1.0, 0), "triangular2": (0.5, cycle), "exp_range": (self.gamma, epoch)}
        return self.base_lr + grown((self.max_lr - self.base_lr) * height, *scales[self.mode])

    @property
    def _down(self) -> int:
        return self.step_size_up if self.step_size_down is None else self.step_size_down


@dataclass(frozen=True, repr=False)
class OneCycleLR(Schedule):
    """Linearly from `max_lr / div_factor` to `max_lr`, then down to `max_lr / final_div_factor`, which is kept.

    As in braintools; PyTorch divides `max_lr / div_factor` by `final_div_factor`, and turns one step earlier.

    Attributes:
        max_lr: the greatest rate, >= 0.
        total_steps: epochs from the first rate to the last, >= 1; None: `epochs * steps_per_epoch`.
        epochs: only read where total_steps is None, and not kept.
        steps_per_epoch: only read where total_steps is None, and not kept: a tick is one step, or by hand.
        pct_start: the fraction of total_steps on the way up, in (0, 1).
        anneal_strategy: the way down: "cos" for half a cosine, or "linear".
        div_factor: > 0.
        final_div_factor: > 0.
        last_epoch: the epoch to begin at, >= 0.
        tick: "step", or "manual" for ticks by `run.tick_schedule()` alone.
        base_lr: the first rate, `max_lr / div_factor`.

    Source: arXiv:1708.07120.
    """

    max_lr: float = 1e-2
    total_steps: int | None = None
    epochs: int | None = None
    steps_per_epoch: int | None = None
    pct_start: float = 0.3
    anneal_strategy: Literal["cos", "linear"] = "cos"
    div_factor: float = 25.0
    final_div_factor: float = 1e4
    last_epoch: int = 0
    _: KW_ONLY
    tick: Tick = "step"
    base_lr: float = field(init=False, repr=False, compare=False)

    def _check(self) -> None:
        check_rates(self, "max_lr")
        if self.total_steps is None:
            set_field(self, "total_steps", self._steps_of_epochs())
        check_epochs(self, "total_steps", minimum=1)
        check_number("pct_start", self.pct_start)
        check("pct_start", self.pct_start, 0 < self.pct_start < 1, "greater than 0 and less than 1")
        check_choice(self, "anneal_strategy", ("cos", "linear"))
        check_positive(self, "div_factor", "final_div_factor")
        set_field(self, "epochs", None)
        set_field(self, "steps_per_epoch", None)
        set_field(self, "base_lr", min(self.max_lr / self.div_factor, FLOAT32_MAX))

    def _steps_of_epochs(self) -> int:
        if self.epochs is None or self.steps_per_epoch is None:
            raise ValueError("total_steps is None: give it, or both epochs and steps_per_epoch")
        check_epochs(self, "epochs", "steps_per_epoch", minimum=1)
        return self.epochs * self.steps_per_epoch

    def _rate(self, epoch: int) -> float:
        assert self.total_steps is not None
        turn = self.pct_start * self.total_steps
        if epoch <= turn:
            return blend(self.base_lr, self.max_lr, epoch / turn)
        last = min(self.max_lr / self.final_div_factor, FLOAT32_MAX)
        fraction = min((epoch - turn) / ((1.0 - self.pct_start) * self.total_steps), 1.0)
        way_down = half_cosine if self.anneal_strategy == "cos" else blend
        return way_down(self.max_lr, last, fraction)
