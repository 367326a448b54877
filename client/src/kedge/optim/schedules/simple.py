"""Schedules of few rates, and of a factor that changes linearly."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from kedge.optim._checks import check_rate
from kedge.optim.schedules.base import (
    TickingSchedule,
    blend,
    check_ascending,
    check_epochs,
    check_fractions,
    check_rates,
    checked_entries,
    checked_epochs,
    set_field,
)


@dataclass(frozen=True, repr=False)
class ConstantLR(TickingSchedule):
    """`base_lr * factor` for the first `total_iters` epochs, then `base_lr`.

    Attributes:
        base_lr: the rate, >= 0.
        factor: in [0, 1].
        total_iters: epochs, >= 0.
        last_epoch: the epoch to begin at; this, `steps_per_epoch` and `tick` as in `Schedule`.
    """

    base_lr: float = 1e-3
    factor: float = 1 / 3
    total_iters: int = 5
    last_epoch: int = 0

    def _check(self) -> None:
        check_rates(self, "base_lr")
        check_fractions(self, "factor")
        check_epochs(self, "total_iters")

    def _rate(self, epoch: int) -> float:
        return self.base_lr * (self.factor if epoch < self.total_iters else 1.0)


@dataclass(frozen=True, repr=False)
class LinearLR(TickingSchedule):
    """`base_lr` times a factor that goes linearly from `start_factor` to `end_factor`, and stays there.

    Attributes:
        base_lr: the rate, >= 0.
        start_factor: in [0, 1]. (PyTorch refuses 0, as its recursion would stay there; this does not.)
        end_factor: in [0, 1].
        total_iters: epochs from one factor to the other, >= 0.
        last_epoch: the epoch to begin at; this, `steps_per_epoch` and `tick` as in `Schedule`.
    """

    base_lr: float = 1e-3
    start_factor: float = 1 / 3
    end_factor: float = 1.0
    total_iters: int = 5
    last_epoch: int = 0

    def _check(self) -> None:
        check_rates(self, "base_lr")
        check_fractions(self, "start_factor", "end_factor")
        check_epochs(self, "total_iters")

    def _rate(self, epoch: int) -> float:
        if epoch >= self.total_iters:
            return self.base_lr * self.end_factor
        return self.base_lr * blend(self.start_factor, self.end_factor, epoch / self.total_iters)


@dataclass(frozen=True, repr=False)
class PiecewiseConstantSchedule(TickingSchedule):
    """`values[0]` before epoch `boundaries[0]`, `values[1]` from there on, and so on.

    Attributes:
        base_lr: what a `ChainedScheduler` divides the rate by, >= 0; of no other effect.
        boundaries: epochs, each greater than the one before, at most 1000; None is the default.
        values: rates (not factors), each >= 0, one more than boundaries; None is the default.
        last_epoch: the epoch to begin at; this, `steps_per_epoch` and `tick` as in `Schedule`.
    """

    base_lr: float = 1e-3
    boundaries: Sequence[int] | None = None
    values: Sequence[float] | None = None
    last_epoch: int = 0

    def _check(self) -> None:
        check_rates(self, "base_lr")
        boundaries = checked_epochs("boundaries", (1000, 2000) if self.boundaries is None else self.boundaries)
        check_ascending("boundaries", boundaries)
        values = checked_entries("values", (1.0, 0.1, 0.01) if self.values is None else self.values)
        for at, value in enumerate(values):
            check_rate(f"values[{at}]", value)
        count, wanted = len(values), len(boundaries) + 1
        if count != wanted:
            raise ValueError(f"values has {count} entries: it must have one more than boundaries, {wanted}")
        set_field(self, "boundaries", boundaries)
        set_field(self, "values", tuple(float(value) for value in values))

    def _rate(self, epoch: int) -> float:
        assert self.boundaries is not None
        assert self.values is not None
        return self.values[bisect_right(self.boundaries, epoch)]
