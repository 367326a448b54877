"""The schedule that depends on the workers' losses."""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from kedge.optim._checks import check, check_fraction, check_rate
from kedge.optim.schedules.base import TickingSchedule, check_choice, check_epochs, check_rates, set_field


class PlateauState(NamedTuple):
    """Where a `ReduceLROnPlateau` stands."""

    rate: float
    best: float
    """The best loss so far; infinite before the first."""
    bad_tick_count: int
    """Ticks since the best loss, since a reduction or since the end of its cooldown."""
    cooldown_tick_count: int
    """Ticks of the cooldown that are left."""


@dataclass(frozen=True, repr=False)
class ReduceLROnPlateau(TickingSchedule):
    """Reduces the rate when the workers' loss has not improved for more than `patience` ticks.

    The loss of a tick is the mean of the losses that came with the contributions since the tick before, weighted by
    their `example_count`; a tick without any changes nothing. Its rate is no function of the ticks: it is that of a
    `PlateauState`.

    Attributes:
        base_lr: the first rate, >= 0.
        mode: "min" if lower losses are better, else "max".
        factor: what the rate is multiplied by, in [0, 1).
        patience: ticks without improvement that are borne, >= 0.
        threshold: how much better a loss must be, >= 0; less than 1 with mode "min" and threshold_mode "rel".
        threshold_mode: "rel": more than `best * threshold` better; "abs": more than `threshold`.
        cooldown: ticks after a reduction that do not count as ticks without improvement, >= 0.
        min_lr: the rate is not reduced below it, >= 0.
        eps: a reduction by no more than this is not made, >= 0.
        last_epoch: is kept, and changes nothing.

    Source: PyTorch's schedule of this name. braintools 0.3.0 does not use eps, nor see the losses of a cooldown.
    """

    base_lr: float = 1e-3
    mode: Literal["min", "max"] = "min"
    factor: float = 0.1
    patience: int = 10
    threshold: float = 1e-4
    threshold_mode: Literal["rel", "abs"] = "rel"
    cooldown: int = 0
    min_lr: float = 0
    eps: float = 1e-8
    last_epoch: int = 0

    def begin(self) -> PlateauState:
        """Before the first tick."""
        return PlateauState(self.base_lr, math.inf if self.mode == "min" else -math.inf, 0, 0)

    def observe(self, state: PlateauState, loss: float) -> PlateauState:
        """After a tick with this mean loss."""
        cools = state.cooldown_tick_count > 0
        is_better = self._is_better(loss, state.best)
        bad = 0 if is_better or cools else state.bad_tick_count + 1
        reduces = bad > self.patience
        return PlateauState(
            rate=self._reduced(state.rate) if reduces else state.rate,
            best=loss if is_better else state.best,
            bad_tick_count=0 if reduces else bad,
            cooldown_tick_count=self.cooldown if reduces else state.cooldown_tick_count - cools,
        )

    def _check(self) -> None:
        check_rates(self, "base_lr", "min_lr", "eps")
        check_choice(self, "mode", ("min", "max"))
        check_choice(self, "threshold_mode", ("rel", "abs"))
        check_fraction("factor", self.factor)
        set_field(self, "factor", float(self.factor))
        check_epochs(self, "patience", "cooldown")
        check_rate("threshold", self.threshold)
        holds = self.threshold < 1 or (self.mode, self.threshold_mode) != ("min", "rel")
        check("threshold", self.threshold, holds, 'less than 1 with mode "min" and threshold_mode "rel"')
        set_field(self, "threshold", float(self.threshold))

    def _rate(self, epoch: int) -> float:
        raise TypeError(f"ReduceLROnPlateau has no rate of epoch {epoch} alone: take that of a PlateauState")

    def _is_better(self, loss: float, best: float) -> bool:
        sign = -1.0 if self.mode == "min" else 1.0
        # Not best + sign * best * threshold: the first best is infinite, and infinity * 0 is NaN.
        bar = best * (1.0 + sign * self.threshold) if self.threshold_mode == "rel" else best + sign * self.threshold
        return loss < bar if self.mode == "min" else loss > bar

    def _reduced(self, rate: float) -> float:
        reduced = max(rate * self.factor, self.min_lr)
        return reduced if rate - reduced > self.eps else rate
