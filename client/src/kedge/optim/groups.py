"""Parameter groups: tensors, chosen by name, with hyperparameters of their own."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass
from fnmatch import fnmatchcase
from typing import Any

from kedge.optim._checks import FLOAT32_MAX, FLOAT32_MIN_NORMAL, check_number, check_rate
from kedge.optim.rules import check_lr
from kedge.optim.schedules import Schedule

MAX_GROUPS = 64
MAX_PATTERNS = 64
MAX_NAME_LENGTH = 256


@dataclass(frozen=True)
class Group:
    """Tensors with hyperparameters of their own. A tensor belongs to the first group that one of its patterns fits.

    What is None is the run's. A norm clip covers the tensors that share it: all without one of their own together.

    Attributes:
        patterns: tensor names with the shell's wildcards, as "*.bias" or ("embed.*", "head.weight"); one or several.
        lr: a rate or a schedule.
        weight_decay: of the kind that the optimizer has, >= 0.
        grad_clip_norm: the norm of the group's gradient is clipped to it; math.inf: not at all.
        grad_clip_value: the gradient's elements are clipped to [-value, value]; math.inf: not at all.
        frozen: never updated, and without optimizer state.
        name: what `run.set_hyperparameters` calls it; the patterns, joined by commas, unless given.
    """

    patterns: str | tuple[str, ...]
    _: KW_ONLY
    lr: float | Schedule | None = None
    weight_decay: float | None = None
    grad_clip_norm: float | None = None
    grad_clip_value: float | None = None
    frozen: bool = False
    name: str = ""

    def __post_init__(self) -> None:
        """Checks every field."""
        patterns = (self.patterns,) if isinstance(self.patterns, str) else tuple(self.patterns)
        _check_patterns(patterns)
        object.__setattr__(self, "patterns", patterns)
        object.__setattr__(self, "name", self.name or ",".join(patterns)[:MAX_NAME_LENGTH])
        if len(self.name) > MAX_NAME_LENGTH:
            raise ValueError(f"name is {self.name[:40]!r}...: it must be at most {MAX_NAME_LENGTH} characters")
        check_changes(self.lr, self.weight_decay, self.grad_clip_norm, self.grad_clip_value)
        if self.lr is not None and not isinstance(self.lr, Schedule):
            object.__setattr__(self, "lr", float(self.lr))

    def takes(self, tensor_name: str) -> bool:
        """Whether one of the patterns fits."""
        return any(fnmatchcase(tensor_name, pattern) for pattern in self.patterns)


def check_groups(groups: Iterable[Any]) -> tuple[Group, ...]:
    """The groups as a tuple.

    Raises:
        TypeError: if one is no `Group`.
        ValueError: if two have one name, or there are more than 64.
    """
    given = tuple(groups)
    if len(given) > MAX_GROUPS:
        raise ValueError(f"groups has {len(given)}: give at most {MAX_GROUPS}; a group may have several patterns")
    checked: list[Group] = []
    for group in given:
        if not isinstance(group, Group):
            raise TypeError(
                f"groups holds {group!r}: give kedge.optim.Group, as in optim.Group('*.bias', weight_decay=0)"
            )
        if any(group.name == other.name for other in checked):
            raise ValueError(f"groups has two of the name {group.name!r}: give one another name")
        checked.append(group)
    return tuple(checked)


def assign(groups: Sequence[Group], tensor_names: Iterable[str]) -> list[int]:
    """The group of each tensor: 0 for those of no group, i + 1 for groups[i].

    Raises:
        ValueError: for a group that gets no tensor.
    """
    names = list(tensor_names)
    indices = [next((i for i, group in enumerate(groups, 1) if group.takes(name)), 0) for name in names]
    for i, group in enumerate(groups, 1):
        if i not in indices:
            some = ", ".join(map(repr, names[:3]))
            raise ValueError(
                f"groups has {group.name!r}, which no tensor is left for: its patterns fit none, or groups before it "
                f"take them all. The tensors are {some}{', ...' if len(names) > 3 else ''}"
            )
    return indices


def _check_patterns(patterns: tuple[object, ...]) -> None:
    if not 1 <= len(patterns) <= MAX_PATTERNS:
        raise ValueError(f"patterns has {len(patterns)}: it must be 1 to {MAX_PATTERNS} names of tensors")
    for pattern in patterns:
        if not isinstance(pattern, str) or not 1 <= len(pattern) <= MAX_NAME_LENGTH:
            raise ValueError(f"patterns has {pattern!r}: it must be a name of up to {MAX_NAME_LENGTH} characters")


def check_changes(
    lr: float | Schedule | None,
    weight_decay: float | None,
    grad_clip_norm: float | None,
    grad_clip_value: float | None,
) -> None:
    """Refuses what is neither None nor a hyperparameter."""
    if lr is not None:
        check_lr(lr)
    if weight_decay is not None:
        check_rate("weight_decay", weight_decay)
    for field, limit in (("grad_clip_norm", grad_clip_norm), ("grad_clip_value", grad_clip_value)):
        if limit is not None:
            check_number(field, limit)
            if not (FLOAT32_MIN_NORMAL <= limit <= FLOAT32_MAX or limit == math.inf):
                raise ValueError(f"{field} is {limit!r}: it must be None, greater than 0, or math.inf for no clip")
