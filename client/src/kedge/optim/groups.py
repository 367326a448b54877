"""Parameter groups: tensors, chosen by name, with hyperparameters of their own."""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass
from fnmatch import translate
from functools import lru_cache
from typing import Any

from kedge.optim._checks import (
    FLOAT32_MAX,
    FLOAT32_MIN_NORMAL,
    as_float,
    check_flag,
    check_number,
    check_rate,
    plain,
)
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
        patterns = _checked_patterns(self.patterns)
        _check_name(self.name)
        lr, decay, norm, value = check_changes(self.lr, self.weight_decay, self.grad_clip_norm, self.grad_clip_value)
        frozen = plain(self.frozen)
        check_flag("frozen", frozen)
        self._set(patterns=patterns, name=self.name or ",".join(patterns)[:MAX_NAME_LENGTH], frozen=frozen)
        self._set(lr=lr, weight_decay=decay, grad_clip_norm=norm, grad_clip_value=value)

    def takes(self, tensor_name: str) -> bool:
        """Whether one of the patterns fits."""
        return _matcher(tuple(self.patterns)).match(tensor_name) is not None

    def _set(self, **values: object) -> None:
        for field, value in values.items():
            object.__setattr__(self, field, value)


@lru_cache(maxsize=MAX_GROUPS)
def _matcher(patterns: tuple[str, ...]) -> re.Pattern[str]:
    """All patterns in one, since there may be many names."""
    return re.compile("|".join(map(translate, patterns)))


def check_groups(groups: Any) -> tuple[Group, ...]:
    """The groups as a tuple.

    Raises:
        TypeError: if they are not several, or one is no `Group`.
        ValueError: if two have one name, or there are more than 64.
    """
    if not isinstance(groups, Iterable):
        raise TypeError(f"groups is {groups!r}: give a list of kedge.optim.Group, or () for none")
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


def _checked_patterns(given: Any) -> tuple[str, ...]:
    if not isinstance(given, Iterable):
        raise TypeError(f"patterns is {given!r}: it must be names of tensors, as '*.bias' or ('embed.*', 'head.*')")
    patterns = (given,) if isinstance(given, str) else tuple(given)
    if not 1 <= len(patterns) <= MAX_PATTERNS:
        raise ValueError(f"patterns has {len(patterns)}: it must be 1 to {MAX_PATTERNS} names of tensors")
    for pattern in patterns:
        if not isinstance(pattern, str) or not 1 <= len(pattern) <= MAX_NAME_LENGTH:
            raise ValueError(f"patterns has {pattern!r}: it must be a name of up to {MAX_NAME_LENGTH} characters")
    return patterns


def _check_name(name: object) -> None:
    if not isinstance(name, str):
        raise TypeError(f"name is {name!r}: it must be text")
    if len(name) > MAX_NAME_LENGTH:
        raise ValueError(f"name is {name[:40]!r}...: it must be at most {MAX_NAME_LENGTH} characters")


def check_changes(
    lr: float | Schedule | None,
    weight_decay: float | None,
    grad_clip_norm: float | None,
    grad_clip_value: float | None,
) -> tuple[float | Schedule | None, float | None, float | None, float | None]:
    """The hyperparameters, with floats for numbers of any kind.

    Raises:
        ValueError, TypeError: for what is neither None nor a hyperparameter; the text begins with its name.
    """
    lr, weight_decay, grad_clip_norm, grad_clip_value = map(plain, (lr, weight_decay, grad_clip_norm, grad_clip_value))
    if lr is not None:
        check_lr(lr)
    if weight_decay is not None:
        check_rate("weight_decay", weight_decay)
    _check_clip("grad_clip_norm", grad_clip_norm)
    _check_clip("grad_clip_value", grad_clip_value)
    return as_float(lr), as_float(weight_decay), as_float(grad_clip_norm), as_float(grad_clip_value)


def _check_clip(field: str, limit: float | None) -> None:
    if limit is not None:
        check_number(field, limit)
        if not (FLOAT32_MIN_NORMAL <= limit <= FLOAT32_MAX or limit == math.inf):
            raise ValueError(f"{field} is {limit!r}: it must be None, greater than 0, or math.inf for no clip")
