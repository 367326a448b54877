"""The hyperparameters of a live run: what each parameter group's next step is made with, and how that moves on.

Everything here is an immutable value. Whoever closes a round reads `Controls.values()` for it and goes on with
`Controls.after_step(...)`; a change by hand gives new controls, so that it holds from the next round to be closed.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

from kedge.optim._checks import check, plain
from kedge.optim.groups import Group, check_changes
from kedge.optim.schedules import PlateauState, ReduceLROnPlateau, Schedule
from kedge.optim.schedules.base import MAX_EPOCH, check_epoch
from kedge.optim.spec import Settings, UpdateSpec

RECORDED_CHANGE_COUNT = 32

ValueT = TypeVar("ValueT")


class StepValues(NamedTuple):
    """What one step uses in one parameter group."""

    lr: float
    weight_decay: float
    decoupled_weight_decay: float
    grad_clip_norm: float | None
    grad_clip_value: float | None
    norm_scope: int
    """The groups of one number are clipped by their common norm. 0: the run's own clip."""


class Change(NamedTuple):
    """New hyperparameters of a group; what is None stays, and a clip of math.inf is none."""

    lr: float | Schedule | None = None
    weight_decay: float | None = None
    grad_clip_norm: float | None = None
    grad_clip_value: float | None = None


class RecordedChange(NamedTuple):
    """A change that was made by hand."""

    step: int
    """The first step that was made with it, or will be."""
    group: str
    """"" for the run."""
    change: Change


class RateState(NamedTuple):
    """A learning rate in time."""

    lr: float | Schedule
    step_count: int = 0
    """Steps since it holds."""
    tick: int = 0
    plateau: PlateauState | None = None
    """For `ReduceLROnPlateau` alone."""
    loss_sum: float = 0.0
    """Of the losses since the last tick, each times its example_count."""
    loss_weight: int = 0
    """The examples of those losses."""

    @classmethod
    def begin(cls, lr: float | Schedule) -> "RateState":
        """At its first step."""
        return cls(lr, plateau=lr.begin() if isinstance(lr, ReduceLROnPlateau) else None)

    @property
    def rate(self) -> float:
        """That of the next step."""
        if self.plateau is not None:
            return self.plateau.rate
        return self.lr.rate(self.tick) if isinstance(self.lr, Schedule) else self.lr

    def after_step(self, loss: float | None, example_count: int) -> "RateState":
        """After a step whose contributions had this mean loss over so many examples."""
        state = self._replace(step_count=self.step_count + 1)
        if self.plateau is not None and loss is not None and math.isfinite(loss):
            state = state._replace(
                loss_sum=self.loss_sum + loss * example_count, loss_weight=self.loss_weight + example_count
            )
        ticks_by_step = isinstance(self.lr, Schedule) and self.lr.tick == "step"
        if ticks_by_step and state.step_count % self.lr.steps_per_tick == 0:  # type: ignore[union-attr]
            return state.after_tick()
        return state

    def after_tick(self, to: int | None = None) -> "RateState":
        """After one more tick, or at tick `to` if that is later than this one."""
        tick = self.tick + 1 if to is None else to
        if tick <= self.tick:
            return self
        state = self._replace(tick=tick)
        if self.plateau is None or not self.loss_weight:
            return state
        assert isinstance(self.lr, ReduceLROnPlateau)
        plateau = self.lr.observe(self.plateau, self.loss_sum / self.loss_weight)
        return state._replace(plateau=plateau, loss_sum=0.0, loss_weight=0)


class _Own(NamedTuple):
    """What a group has for itself; None: the run's."""

    name: str
    rate: RateState | None
    change: Change


@dataclass(frozen=True)
class Controls:
    """The hyperparameters of all groups at one moment."""

    _decouples_decay: bool
    _base: Settings
    _rate: RateState
    _groups: tuple[_Own, ...]
    changes: tuple[RecordedChange, ...] = ()
    """The last ones made by hand, oldest first."""

    @classmethod
    def begin(cls, spec: UpdateSpec, groups: Sequence[Group]) -> "Controls":
        """Those of step 0."""
        own = tuple(
            _Own(
                group.name,
                None if group.lr is None else RateState.begin(group.lr),
                Change(None, group.weight_decay, group.grad_clip_norm, group.grad_clip_value),
            )
            for group in groups
        )
        return cls(spec.rule.decouples_decay, spec.settings, RateState.begin(spec.settings.lr), own)

    @property
    def learning_rate(self) -> float:
        """That of the run's next step, outside the groups that have their own."""
        return self._rate.rate

    def values(self) -> tuple[StepValues, ...]:
        """What the next step uses: first the tensors of no group, then each group."""
        base = self._base
        run = StepValues(
            self._rate.rate,
            base.weight_decay,
            base.decoupled_weight_decay,
            base.grad_clip_norm,
            base.grad_clip_value,
            0,
        )
        return (run, *(self._values_of(run, own, scope) for scope, own in enumerate(self._groups, 1)))

    def after_step(self, loss: float | None, example_count: int) -> "Controls":
        """After a step whose contributions had this mean loss (None: they sent none) over so many examples."""
        return self._with_rates(lambda rate: rate.after_step(loss, example_count))

    def changed(self, group: str, change: Change, *, step: int) -> "Controls":
        """With new hyperparameters from this step on: the run's for "", else a group's own.

        A new schedule begins at its first tick. A change that changes nothing gives these same controls.

        Raises:
            ValueError, TypeError: for a group that there is not, or a value that is none or out of range.
        """
        _check_group(group)
        change = Change(*check_changes(*change))
        after = self._with_group(group, change) if group else self._with_base(change)
        if after == self:
            return self
        record = RecordedChange(step, group, change)
        return replace(after, changes=(*self.changes, record)[-RECORDED_CHANGE_COUNT:])

    def ticked(self, group: str, to: int | None = None) -> "Controls":
        """After a tick by hand, of the run's schedule for "", else of a group's own; or at tick `to` if that is later.

        Raises:
            ValueError: if there is no schedule that ticks by hand, or for a tick that is out of range.
            TypeError: if `to` is no whole number, or the group no name.
        """
        _check_group(group)
        to = plain(to)
        if to is not None:
            check_epoch("to", to)
        rate = self.rate_state(group)
        if not (isinstance(rate.lr, Schedule) and rate.lr.tick == "manual"):
            raise ValueError(
                f"lr is {rate.lr!r}: it does not tick by hand; give its schedule tick='manual', or set a rate"
            )
        if to is None:
            check("tick", rate.tick, rate.tick < MAX_EPOCH, "less than 2^63 - 1 for one more")
        ticked = rate.after_tick(to)
        if not group:
            return replace(self, _rate=ticked)
        return replace(
            self, _groups=tuple(own._replace(rate=ticked) if own.name == group else own for own in self._groups)
        )

    def rate_state(self, group: str) -> RateState:
        """The learning rate of the run for "", else of a group that has its own.

        Raises:
            ValueError: for a group that there is not, or that has the run's rate.
        """
        if not group:
            return self._rate
        rate = self._require_group(group).rate
        if rate is None:
            raise ValueError(f"group {group!r} has the run's rate: leave the group out, or give it a rate of its own")
        return rate

    def _with_base(self, change: Change) -> "Controls":
        base = self._base
        decay = base.decoupled_weight_decay if self._decouples_decay else base.weight_decay
        decay = _first(change.weight_decay, decay)
        base = Settings(
            lr=_first(change.lr, base.lr),
            weight_decay=base.weight_decay if self._decouples_decay else decay,
            decoupled_weight_decay=decay if self._decouples_decay else base.decoupled_weight_decay,
            grad_clip_norm=_clip(_first(change.grad_clip_norm, base.grad_clip_norm)),
            grad_clip_value=_clip(_first(change.grad_clip_value, base.grad_clip_value)),
        )
        rate = self._rate if change.lr is None else _rate_after(self._rate, change.lr)
        return replace(self, _base=base, _rate=rate)

    def _with_group(self, name: str, change: Change) -> "Controls":
        self._require_group(name)
        return replace(self, _groups=tuple(_changed(own, change) if own.name == name else own for own in self._groups))

    def _require_group(self, name: str) -> _Own:
        for own in self._groups:
            if own.name == name:
                return own
        known = ", ".join(repr(own.name) for own in self._groups) or "none"
        raise ValueError(f"group {name!r} is not of this run, which has {known}")

    def _values_of(self, run: StepValues, own: _Own, scope: int) -> StepValues:
        change = own.change
        values = run if own.rate is None else run._replace(lr=own.rate.rate)
        if change.weight_decay is not None and self._decouples_decay:
            values = values._replace(decoupled_weight_decay=change.weight_decay)
        elif change.weight_decay is not None:
            values = values._replace(weight_decay=change.weight_decay)
        if change.grad_clip_norm is not None:
            values = values._replace(grad_clip_norm=_clip(change.grad_clip_norm), norm_scope=scope)
        if change.grad_clip_value is not None:
            values = values._replace(grad_clip_value=_clip(change.grad_clip_value))
        return values

    def _with_rates(self, after: Callable[[RateState], RateState]) -> "Controls":
        groups = tuple(own if own.rate is None else own._replace(rate=after(own.rate)) for own in self._groups)
        return replace(self, _rate=after(self._rate), _groups=groups)


def _check_group(group: object) -> None:
    if not isinstance(group, str):
        raise TypeError(f'group is {group!r}: it must be the name of a parameter group, or "" for the run')


def _changed(own: _Own, change: Change) -> _Own:
    held = own.change
    merged = Change(
        lr=None,  # `rate` holds it
        weight_decay=_first(change.weight_decay, held.weight_decay),
        grad_clip_norm=_first(change.grad_clip_norm, held.grad_clip_norm),
        grad_clip_value=_first(change.grad_clip_value, held.grad_clip_value),
    )
    return own._replace(rate=own.rate if change.lr is None else _rate_after(own.rate, change.lr), change=merged)


def _rate_after(rate: RateState | None, lr: float | Schedule) -> RateState:
    """The rate that is in force stays as it is, so that a repeated change does not begin a schedule anew."""
    return rate if rate is not None and rate.lr == lr else RateState.begin(lr)


def _first(new: ValueT | None, old: ValueT) -> ValueT:
    return old if new is None else new


def _clip(limit: float | None) -> float | None:
    return None if limit == math.inf else limit
