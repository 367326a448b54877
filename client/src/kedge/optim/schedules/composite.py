"""Schedules that are made of schedules."""

import sys
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field

from kedge.optim.schedules.base import (
    Schedule,
    TickingSchedule,
    check_ascending,
    checked_entries,
    checked_epochs,
    set_field,
)
from kedge.optim.schedules.plateau import ReduceLROnPlateau

MAX_SCHEDULES = 64
"""In a schedule of schedules, itself and everything inside counted."""
MAX_DEPTH = 16
"""Of schedules of schedules inside of each other, the outermost counted."""


class Composite(TickingSchedule):
    """A schedule of schedules. It counts the ticks for all of them.

    Attributes:
        schedulers: at least one schedule; none with ticks or a `last_epoch` of its own, and no `ReduceLROnPlateau`.
    """

    schedulers: Sequence[Schedule]

    def _check(self) -> None:
        schedulers = checked_entries("schedulers", self.schedulers, limit=MAX_SCHEDULES)
        if not schedulers:
            raise ValueError("schedulers is empty: it must have at least one schedule")
        for at, schedule in enumerate(schedulers):
            _check_inner(f"schedulers[{at}]", schedule, type(self).__name__)
        set_field(self, "schedulers", schedulers)
        set_field(self, "base_lr", schedulers[0].base_lr)
        if _count(self) > MAX_SCHEDULES:
            raise ValueError(f"schedulers has {_count(self)} schedules in all: it must have at most {MAX_SCHEDULES}")
        if _depth(self) > MAX_DEPTH:
            raise ValueError(f"schedulers has {_depth(self)} levels: it must have at most {MAX_DEPTH}")


@dataclass(frozen=True, repr=False)
class ChainedScheduler(Composite):
    """The first schedule's `base_lr` times the factor of each schedule: its rate divided by its own `base_lr`.

    The factor of a schedule whose `base_lr` is 0 is 0. That of a schedule of schedules is relative to the `base_lr` of
    its first, that of `OneCycleLR` to its first rate.

    Attributes:
        schedulers: at least one schedule; none with ticks or a `last_epoch` of its own, and no `ReduceLROnPlateau`.
            With everything inside of each other at most 64 in all, and 16 levels.
        last_epoch: the epoch to begin at, which braintools has not here; `steps_per_epoch` and `tick` as in `Schedule`.
    """

    schedulers: Sequence[Schedule]
    last_epoch: int = 0
    base_lr: float = field(init=False, repr=False, compare=False)

    def _rate(self, epoch: int) -> float:
        rate = self.base_lr
        for schedule in self.schedulers:
            rate = _scaled(rate, schedule.rate(epoch), schedule.base_lr)
        return rate


@dataclass(frozen=True, repr=False)
class SequentialLR(Composite):
    """`schedulers[0]` before epoch `milestones[0]`, `schedulers[1]` from there on, and so on.

    Each begins at its own epoch 0.

    Attributes:
        schedulers: as in `ChainedScheduler`.
        milestones: epochs, each >= 0 and greater than the one before, one fewer than schedulers.
        last_epoch: the epoch to begin at; this, `steps_per_epoch` and `tick` as in `Schedule`.
    """

    schedulers: Sequence[Schedule]
    milestones: Sequence[int]
    last_epoch: int = 0
    base_lr: float = field(init=False, repr=False, compare=False)

    def _check(self) -> None:
        super()._check()
        milestones = checked_epochs("milestones", self.milestones)
        check_ascending("milestones", milestones)
        count, wanted = len(milestones), len(self.schedulers) - 1
        if count != wanted:
            raise ValueError(f"milestones has {count} entries: it must have one fewer than schedulers, {wanted}")
        set_field(self, "milestones", milestones)

    def _rate(self, epoch: int) -> float:
        at = bisect_right(self.milestones, epoch)
        begin = self.milestones[at - 1] if at else 0
        return self.schedulers[at].rate(epoch - begin)


def _check_inner(field: str, schedule: object, outer: str) -> None:
    if not isinstance(schedule, Schedule):
        raise TypeError(f"{field} is {schedule!r}: it must be a schedule of kedge.optim")
    if isinstance(schedule, ReduceLROnPlateau):
        raise ValueError(f"{field} is a ReduceLROnPlateau: its rate comes from losses, which {outer} knows nothing of")
    own = {"last_epoch": schedule.last_epoch or None, "tick": schedule.tick if schedule.tick != "step" else None}
    own["steps_per_epoch"] = schedule.steps_per_tick if schedule.steps_per_tick != 1 else None
    for name, value in own.items():
        if value is not None:
            raise ValueError(f"{field} has {name}={value!r}: leave it out there, and set it on the {outer}")


def _scaled(rate: float, inner_rate: float, inner_base: float) -> float:
    """The rate times an inner schedule's factor; never infinite, so that a later factor of 0 gives 0 and not NaN."""
    factor = min(inner_rate / inner_base, sys.float_info.max) if inner_base else 0.0
    return min(rate * factor, sys.float_info.max)


def _count(schedule: Schedule) -> int:
    return 1 + sum(map(_count, schedule.schedulers)) if isinstance(schedule, Composite) else 1


def _depth(schedule: Schedule) -> int:
    return 1 + max(map(_depth, schedule.schedulers)) if isinstance(schedule, Composite) else 0
