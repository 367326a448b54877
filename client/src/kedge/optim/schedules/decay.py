"""Schedules that decay (or grow) by a power."""

import sys
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from kedge.optim._checks import check, check_number
from kedge.optim.schedules.base import (
    TickingSchedule,
    check_epochs,
    check_positive,
    check_rates,
    checked_epochs,
    grown,
    set_field,
)


@dataclass(frozen=True, repr=False)
class StepLR(TickingSchedule):
    """`base_lr * gamma ** (epoch // step_size)`.

    Attributes:
        base_lr: the first rate, >= 0.
        step_size: epochs from one decay to the next, >= 1.
        gamma: the factor of a decay, > 0.
        last_epoch: the epoch to begin at; this, `steps_per_epoch` and `tick` as in `Schedule`.
    """

    base_lr: float = 1e-3
    step_size: int = 30
    gamma: float = 0.1
    last_epoch: int = 0

    def _check(self) -> None:
        check_rates(self, "base_lr")
        check_epochs(self, "step_size", minimum=1)
        check_positive(self, "gamma")

    def _rate(self, epoch: int) -> float:
        return grown(self.base_lr, self.gamma, epoch // self.step_size)


@dataclass(frozen=True, repr=False)
class MultiStepLR(TickingSchedule):
    """`base_lr * gamma ** n`, where n is the number of milestones that are not after the epoch.

    Attributes:
        base_lr: the first rate, >= 0.
        milestones: epochs in any order, each >= 0, at most 1000; one that stands twice decays twice.
        gamma: the factor of a decay, > 0.
        last_epoch: the epoch to begin at; this, `steps_per_epoch` and `tick` as in `Schedule`.
    """

    base_lr: float = 1e-3
    milestones: Sequence[int] = (30, 60, 90)
    gamma: float = 0.1
    last_epoch: int = 0

    def _check(self) -> None:
        check_rates(self, "base_lr")
        set_field(self, "milestones", tuple(sorted(checked_epochs("milestones", self.milestones))))
        check_positive(self, "gamma")

    def _rate(self, epoch: int) -> float:
        return grown(self.base_lr, self.gamma, bisect_right(self.milestones, epoch))


@dataclass(frozen=True, repr=False)
class ExponentialLR(TickingSchedule):
    """`base_lr * gamma ** epoch`.

    Attributes:
        base_lr: the first rate, >= 0.
        gamma: the factor of an epoch, > 0.
        last_epoch: the epoch to begin at; this, `steps_per_epoch` and `tick` as in `Schedule`.
    """

    base_lr: float = 1e-3
    gamma: float = 0.95
    last_epoch: int = 0

    def _check(self) -> None:
        check_rates(self, "base_lr")
        check_positive(self, "gamma")

    def _rate(self, epoch: int) -> float:
        return grown(self.base_lr, self.gamma, epoch)


@dataclass(frozen=True, repr=False)
class ExponentialDecayLR(TickingSchedule):
    """`base_lr * decay_rate ** (max(0, epoch - transition_begin) / decay_steps)`, bounded by `end_value`.

    Attributes:
        base_lr: the first rate, >= 0.
        decay_steps: epochs in which `decay_rate` takes effect once, >= 1.
        decay_rate: > 0.
        transition_begin: epochs before the decay, >= 0.
        staircase: whether the exponent is rounded down to a whole number.
        end_value: the least rate where decay_rate < 1, else the greatest; None: no bound.
        last_epoch: the epoch to begin at; this, `steps_per_epoch` and `tick` as in `Schedule`.
    """

    base_lr: float = 1e-3
    decay_steps: int = 1000
    decay_rate: float = 0.96
    transition_begin: int = 0
    staircase: bool = False
    end_value: float | None = None
    last_epoch: int = 0

    def _check(self) -> None:
        check_rates(self, "base_lr")
        check_epochs(self, "decay_steps", minimum=1)
        check_positive(self, "decay_rate")
        check_epochs(self, "transition_begin")
        check("staircase", self.staircase, isinstance(self.staircase, bool), "True or False")
        if self.end_value is not None:
            check_rates(self, "end_value")

    def _rate(self, epoch: int) -> float:
        elapsed = max(epoch - self.transition_begin, 0)
        exponent = elapsed // self.decay_steps if self.staircase else elapsed / self.decay_steps
        rate = grown(self.base_lr, self.decay_rate, exponent)
        if self.end_value is None:
            return rate
        return max(rate, self.end_value) if self.decay_rate < 1 else min(rate, self.end_value)


@dataclass(frozen=True, repr=False)
class PolynomialLR(TickingSchedule):
    """`base_lr * (1 - min(epoch, total_iters) / total_iters) ** power`.

    Attributes:
        base_lr: the first rate, >= 0.
        total_iters: epochs until the rate is 0, >= 1.
        power: >= 0; with 0 the rate is `base_lr` for ever.
        last_epoch: the epoch to begin at; this, `steps_per_epoch` and `tick` as in `Schedule`.
    """

    base_lr: float = 1e-3
    total_iters: int = 5
    power: float = 1.0
    last_epoch: int = 0

    def _check(self) -> None:
        check_rates(self, "base_lr")
        check_epochs(self, "total_iters", minimum=1)
        check_number("power", self.power)
        check("power", self.power, 0 <= self.power <= sys.float_info.max, "at least 0, and finite")
        set_field(self, "power", float(self.power))

    def _rate(self, epoch: int) -> float:
        left = max(self.total_iters - epoch, 0)
        return grown(self.base_lr, left / self.total_iters, self.power)
