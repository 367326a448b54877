"""Torch's parameter groups and the run's: which is which, and their hyperparameters on the way between them.

A torch group lies within one *part* of the run: one of the run's groups, or what the run has outside its groups. What a
torch group shows is compared with what it was last made to show, so a schedule of the run that moves on is told apart
from a scheduler of torch, or a person, that sets a rate.
"""

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import fields
from glob import escape
from typing import Any, NamedTuple

from kedge import optim
from kedge.optim.controls import RateState
from kedge.optim.groups import assign
from kedge.run import Run
from kedge.transport import RunInfo

OPTIONS = ("lr", "weight_decay")
"""What a torch group may set, by the name that it has on both sides."""

_OPTIONS_OF_TORCH = {
    *("alpha", "amsgrad", "betas", "centered", "dampening", "decoupled_weight_decay", "eps", "etas"),
    *("initial_accumulator_value", "lambd", "lr_decay", "maximize", "momentum", "momentum_decay", "nesterov"),
    *("ns_steps", "rho", "step_sizes", "t0"),
}
"""What the formulas of torch's optimizers are given. "foreach" and its like choose how they are computed, not what."""

TorchGroup = dict[str, Any]


class Rate(NamedTuple):
    """A learning rate of the run."""

    lr: float | optim.Schedule
    begin: int = 0
    """The steps made before it held. For a number it does not matter."""

    def at(self, step: int) -> float | None:
        """That of the step after this one; None where only the server knows."""
        if not isinstance(self.lr, optim.Schedule):
            return self.lr
        if self.lr.tick != "step" or isinstance(self.lr, optim.ReduceLROnPlateau):
            return None
        return self.lr.rate((step - self.begin) // self.lr.steps_per_tick)


class Part:
    """A part of the run and the torch groups within it.

    Args:
        name: the name of the run's group; "" for what is outside all.
        indices: those of the torch groups.
        is_frozen: whether the run never updates it.

    Attributes:
        name: as above.
        indices: as above.
        is_frozen: as above.
        shown: what its torch groups were last made to show, by option.
    """

    def __init__(self, name: str, indices: list[int], *, is_frozen: bool) -> None:
        self.name = name
        self.indices = indices
        self.shown: dict[str, float] = {}
        self.is_frozen = is_frozen
        self._rate = Rate(0.0)

    def widened(self, indices: Sequence[int]) -> "Part":
        """This part with more torch groups in it."""
        other = copy(self)
        other.indices = [*self.indices, *indices]
        other.shown = dict(self.shown)
        return other

    def refresh(self, info: RunInfo, groups: Sequence[TorchGroup]) -> None:
        """Shows what the server says, but for what was changed here and is not sent yet."""
        if self.shown and not info.status.step:
            return  # `settings` leaves out what this worker may have changed itself
        self._rate, values = settings(self.name, info)
        self._show(values, groups)

    def advance(self, step: int, groups: Sequence[TorchGroup]) -> None:
        """Shows the rate that a schedule of the run has come to."""
        rate = self._rate.at(step)
        if rate is not None:
            self._show({**self.shown, "lr": rate}, groups)

    def changes(self, groups: Sequence[TorchGroup]) -> dict[str, float]:
        """What its torch groups have that they were not made to show.

        What the run has now is not asked for, as that would cost a call with each step. So a value that equals the
        shown one is no change, whatever was changed elsewhere since the last `refresh`.

        Raises:
            ValueError: if they do not agree.
        """
        values = {option: self._value(option, groups) for option in OPTIONS}
        return {option: value for option, value in values.items() if value != self.shown[option]}

    def forward(self, run: Run, groups: Sequence[TorchGroup]) -> None:
        """Tells the run of the changes. Where that fails they stay changes."""
        changes = self.changes(groups)
        if changes and not self.is_frozen:
            run.set_hyperparameters(group=self.name, **changes)
            if "lr" in changes:
                self._rate = Rate(changes["lr"])
        self.shown |= changes

    def _show(self, values: Mapping[str, float], groups: Sequence[TorchGroup]) -> None:
        for index in self.indices:
            for option, value in values.items():
                if float(groups[index].get(option, value)) == self.shown.get(option, value):
                    groups[index][option] = value
        self.shown = dict(values)

    def _value(self, option: str, groups: Sequence[TorchGroup]) -> float:
        values = {index: float(groups[index][option]) for index in self.indices}
        if len(set(values.values())) > 1:
            told = ", ".join(f"{value:g} in parameter group {index}" for index, value in values.items())
            where = f"only the group {self.name!r} for them" if self.name else "no groups for them"
            raise ValueError(
                f"{option} is {told}, but the run has {where}: create it with groups=[optim.Group(...)], or by "
                "RemoteOptimizer.create(..., param_groups=[...])"
            )
        return values[self.indices[0]]


def cut(group: TorchGroup, run: Run) -> list[TorchGroup]:
    """One torch group of (name, parameter) pairs as one for each part of the run."""
    numbers = _numbers(run)
    pairs: dict[int, list[tuple[str, Any]]] = {}
    for name, tensor in group["params"]:
        pairs.setdefault(numbers[name], []).append((name, tensor))
    return [{**group, "params": pairs[number]} for number in sorted(pairs)]


def parts_of(groups: Sequence[TorchGroup], run: Run) -> list[Part]:
    """The parts of the run that torch groups of (name, parameter) pairs are in.

    Raises:
        ValueError: for a torch group that is not within one part.
    """
    numbers = _numbers(run)
    indices: dict[int, list[int]] = {}
    for index, group in enumerate(groups):
        found = sorted({numbers[name] for name, _ in group["params"]})
        if len(found) > 1:
            told = " and ".join(repr(run.groups[number - 1].name) if number else "no group" for number in found)
            raise ValueError(
                f"parameter group {index} has tensors of {told} in the run: give one parameter group for each of the "
                "run's, or all parameters in one list"
            )
        for number in found:
            indices.setdefault(number, []).append(index)
    return [_part(run, number, found) for number, found in sorted(indices.items())]


def with_more_groups(parts: Sequence[Part], groups: Sequence[TorchGroup], first: int, run: Run) -> list[Part]:
    """The parts when those torch groups that begin with `first` come to the others: they show what their parts do.

    Raises:
        ValueError: for a group that is not within one part, or does not agree with the others there.
    """
    by_name = {part.name: part for part in parts}
    for new in parts_of(groups[first:], run):
        indices = [first + index for index in new.indices]
        held = by_name.get(new.name)
        part = (held or Part(new.name, [], is_frozen=new.is_frozen)).widened(indices)
        if held is None:
            part.refresh(run.info(), groups)
        else:
            for index in indices:
                groups[index].update({option: groups[held.indices[0]][option] for option in OPTIONS} | groups[index])
        part.changes(groups)
        by_name[part.name] = part
    return list(by_name.values())


def check_options(groups: Sequence[TorchGroup], optimizer: optim.Optimizer) -> None:
    """Refuses options that the optimizer of the run does not have as they are given: no group has them for itself.

    Raises:
        ValueError: that names the option.
    """
    spec = optimizer.spec()
    held = {field.name: getattr(spec.rule, field.name) for field in fields(spec.rule)}  # type: ignore[arg-type]
    held |= {option: value for option, value in spec.settings._asdict().items() if option in held}
    held["decoupled_weight_decay"] = spec.rule.decouples_decay  # what torch.optim.Adam calls it
    own = {*OPTIONS, "name"}
    for index, group in enumerate(groups):
        for option in sorted((_OPTIONS_OF_TORCH | held.keys() - own) & group.keys()):
            if not _is_same(group[option], held.get(option)):
                raise _refusal(option, group[option], index)


def _is_same(given: Any, held: Any) -> bool:
    """Whether an option is what the optimizer has; one that it does not have is to be off."""
    if isinstance(given, list | tuple) and isinstance(held, tuple):
        return tuple(given) == held
    return bool(given == held) or (not held and not given)


def _refusal(option: str, value: Any, index: int) -> ValueError:
    if option == "maximize":
        return ValueError(f"maximize is set in parameter group {index}: a run minimizes; negate the loss")
    return ValueError(
        f"{option} is set in parameter group {index}, to {value!r}, and is not the run's: of its own a group has "
        f"{' and '.join(OPTIONS)}, the rest belongs to the optimizer, or to an optim.Group, that the run is created "
        "with"
    )


def groups_of(param_groups: Sequence[TorchGroup]) -> tuple[optim.Group, ...]:
    """The groups that a run needs for torch groups of (name, parameter) pairs that have options of their own.

    Raises:
        ValueError, TypeError: for an option out of range, or of a group that has nothing in the run.
    """
    for index, group in enumerate(param_groups):
        for option in OPTIONS:
            if option in group and not group["params"]:
                raise ValueError(
                    f"{option} is set in parameter group {index}, of which nothing requires a gradient: leave it out, "
                    "or have its parameters require one when the run is created"
                )
    return tuple(
        optim.Group(
            tuple(escape(name) for name, _ in group["params"]),
            **{option: group[option] for option in OPTIONS if option in group},
            name=str(group.get("name", f"group {index}")),
        )
        for index, group in enumerate(param_groups)
        if any(option in group for option in OPTIONS)
    )


def _numbers(run: Run) -> dict[str, int]:
    """The part of each tensor: 0 outside the run's groups, i + 1 for its groups[i]."""
    names = [spec.name for spec in run.manifest.tensors]
    return dict(zip(names, assign(run.groups, names), strict=True))


def _part(run: Run, number: int, indices: list[int]) -> Part:
    if not number:
        return Part("", indices, is_frozen=False)
    group = run.groups[number - 1]
    return Part(group.name, indices, is_frozen=group.frozen)


def settings(name: str, info: RunInfo) -> tuple[Rate, dict[str, float]]:
    """The rate of a part of the run ("": outside its groups), and what torch groups in it are to show.

    At step 0 that is what the run was created with: another worker's scheduler may have changed it already, and the
    schedulers of all workers have to begin with the same.
    """
    step = info.status.step
    lr, begin, owner = _held("lr", name, info)
    rate = Rate(lr, begin)
    shown = info.status.learning_rate if step and not owner else rate.at(step)
    if shown is None:
        shown = RateState.begin(lr).rate
    if not isinstance(lr, optim.Schedule):
        rate = Rate(shown)
    return rate, {"lr": shown, "weight_decay": _held("weight_decay", name, info)[0]}


def _held(option: str, name: str, info: RunInfo) -> tuple[Any, int, str]:
    """The value that holds, the steps made before it did, and whose it is: the group's, or the run's ("")."""
    changes = info.changes if info.status.step else ()
    for owner in (name, ""):
        values = [(_created(option, owner, info), 0)]
        values += [(getattr(made.change, option), made.step - 1) for made in changes if made.group == owner]
        for value, begin in reversed(values):
            if value is not None:
                return value, begin, owner
    raise AssertionError(f"a run has a {option} of its own")


def _created(option: str, owner: str, info: RunInfo) -> Any:
    if owner:
        return next(getattr(group, option) for group in info.groups if group.name == owner)
    spec = info.optimizer.spec()
    decouples = option == "weight_decay" and spec.rule.decouples_decay
    return getattr(spec.settings, "decoupled_weight_decay" if decouples else option)
