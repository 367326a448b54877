"""What all schedules share: ticks, bounds, and the checks of their fields."""

import math
import sys
from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass, fields
from typing import Any, Literal

from kedge.optim._checks import FLOAT32_MAX, check, check_count, check_number, check_rate, plain, set_plain

Tick = Literal["step", "manual"]

MAX_EPOCH = 2**63 - 1
"""The greatest number of ticks or epochs that a field holds."""
MAX_ENTRIES = 1000
"""The greatest length of a field that holds several values."""


class Schedule:
    """A learning rate as a function of the ticks so far.

    Every schedule is a frozen dataclass, is checked when it is constructed, and has these fields:

    Attributes:
        base_lr: what the rate is relative to in a `ChainedScheduler`.
        last_epoch: the epoch to begin at, 0 to 2^63 - 1.
        steps_per_epoch: applied steps in a tick, >= 1.
        tick: "step", or "manual" for ticks by `run.tick_schedule()` alone.
    """

    base_lr: float
    last_epoch: int
    steps_per_epoch: int | None
    tick: Tick

    def __post_init__(self) -> None:
        """Checks every field."""
        set_plain(self)
        self._check()
        check_epochs(self, "last_epoch")
        if self.steps_per_epoch is not None:
            check_epochs(self, "steps_per_epoch", minimum=1)
        check_choice(self, "tick", ("step", "manual"))

    def rate(self, tick: int) -> float:
        """The rate after so many ticks (0: that of the first step); never more than float32 holds."""
        return min(self._rate(tick + self.last_epoch), FLOAT32_MAX)

    def __repr__(self) -> str:
        shown = [each for each in fields(self) if each.repr]  # type: ignore[arg-type]  # every subclass is a dataclass
        shown.sort(key=lambda each: each.kw_only is True)  # as the constructor has them
        return f"{type(self).__name__}({', '.join(f'{each.name}={getattr(self, each.name)!r}' for each in shown)})"

    @property
    def steps_per_tick(self) -> int:
        """Applied steps in a tick, where ticks go by steps."""
        return self.steps_per_epoch or 1

    def _check(self) -> None:
        """Checks, and brings to one form, what the schedule has besides the ticks."""
        raise NotImplementedError

    def _rate(self, epoch: int) -> float:
        """The rate of an epoch, at least 0; it may be infinite, but is never NaN."""
        raise NotImplementedError


@dataclass(frozen=True, repr=False)
class TickingSchedule(Schedule):
    """A schedule whose ticks may be of several steps: all but `OneCycleLR`."""

    _: KW_ONLY
    steps_per_epoch: int = 1
    tick: Tick = "step"


def set_field(schedule: Schedule, field: str, value: object) -> None:
    """Sets a field of a schedule that is being constructed."""
    object.__setattr__(schedule, field, value)


def check_rates(schedule: Schedule, *fields: str) -> None:
    """Refuses fields that are no rate; the others become floats."""
    for field in fields:
        value = getattr(schedule, field)
        if isinstance(value, list | tuple):
            raise TypeError(f"{field} is {value!r}: it must be one number; give each optim.Group a schedule of its own")
        check_rate(field, value)
        set_field(schedule, field, float(value))


def check_fractions(schedule: Schedule, *fields: str) -> None:
    """Refuses fields that are outside [0, 1]; the others become floats."""
    for field in fields:
        value = getattr(schedule, field)
        check_number(field, value)
        check(field, value, 0 <= value <= 1, "in [0, 1]")
        set_field(schedule, field, float(value))


def check_positive(schedule: Schedule, *fields: str) -> None:
    """Refuses fields that are not greater than 0; the others become floats."""
    for field in fields:
        value = getattr(schedule, field)
        check_number(field, value)
        check(field, value, 0 < value <= sys.float_info.max, "greater than 0, and finite")
        set_field(schedule, field, float(value))


def check_epochs(schedule: Schedule, *fields: str, minimum: int = 0) -> None:
    """Refuses fields that are no number of ticks or epochs."""
    for field in fields:
        check_epoch(field, getattr(schedule, field), minimum)


def check_choice(schedule: Schedule, field: str, choices: tuple[str, ...]) -> None:
    """Refuses a field that is none of the texts."""
    value = getattr(schedule, field)
    known = " or ".join(f'"{choice}"' for choice in choices)
    check(field, value, isinstance(value, str) and value in choices, known)


def checked_epochs(field: str, values: Any) -> tuple[int, ...]:
    """Several epochs.

    Raises:
        TypeError: if they are not several whole numbers.
        ValueError: if one is out of range, or if they are too many.
    """
    epochs = checked_entries(field, values)
    for at, epoch in enumerate(epochs):
        check_epoch(f"{field}[{at}]", epoch)
    return epochs


def check_ascending(field: str, epochs: tuple[int, ...]) -> None:
    """Refuses epochs of which one is not after the one before it."""
    for at in range(1, len(epochs)):
        after = epochs[at - 1]
        check(f"{field}[{at}]", epochs[at], epochs[at] > after, f"greater than {field}[{at - 1}], which is {after}")


def checked_entries(field: str, values: Any, *, limit: int = MAX_ENTRIES) -> tuple[Any, ...]:
    """Several values as a tuple.

    Raises:
        TypeError: if they are not several.
        ValueError: if they are too many.
    """
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise TypeError(f"{field} is {values!r}: it must be a list or a tuple")
    entries = tuple(map(plain, values))
    if len(entries) > limit:
        raise ValueError(f"{field} has {len(entries)} entries: it must have at most {limit}")
    return entries


def blend(start: float, end: float, fraction: float) -> float:
    """From `start` (fraction 0) to `end` (fraction 1), both exactly; never negative where neither is."""
    return start * (1.0 - fraction) + end * fraction


def half_cosine(start: float, end: float, fraction: float) -> float:
    """From `start` (fraction 0) along half a cosine to `end` (fraction 1)."""
    return blend(end, start, (1.0 + math.cos(math.pi * fraction)) / 2.0)


def grown(base: float, gamma: float, exponent: float) -> float:
    """Base * gamma ** exponent, infinite where the power overflows. Only what is positive may grow."""
    if base == 0:
        return 0.0
    try:
        return float(base * gamma**exponent)
    except OverflowError:
        return math.inf


def check_epoch(field: str, value: object, minimum: int = 0) -> None:
    """Refuses what is no number of ticks or epochs."""
    check_count(field, value, minimum=minimum)
    check(field, value, value <= MAX_EPOCH, "at most 2^63 - 1")  # type: ignore[operator]  # check_count knows it
