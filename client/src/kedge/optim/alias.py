"""`Optax`: an optimizer of optax by its name, for what has no class of its own. The client knows nothing of optax."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeGuard

from kedge.optim._checks import FLOAT32_MAX, plain
from kedge.optim.rules import Rule
from kedge.optim.schedules import Schedule
from kedge.optim.spec import Settings

Scalar = int | float | bool | str | None
Argument = Scalar | tuple[Scalar, ...]

MAX_NAME_LENGTH = 64
MAX_ARGUMENT_COUNT = 64
MAX_TEXT_LENGTH = 256
_MAX_INT = 2**63 - 1


@dataclass(frozen=True, init=False, eq=False, repr=False)
class Optax(Rule):
    """An optimizer of optax: `Optax("adan", lr=1e-2, b1=0.95)` is `optax.adan(learning_rate=1e-2, b1=0.95)`.

    The server checks the name against its list and the arguments against optax' own signature when the run is created.
    Two of them are equal if they are written alike: 1, 1.0 and True are three arguments.

    Args:
        name: of a function in optax, at most 64 characters.
        lr: the rate, a number or a schedule: optax' `learning_rate`.
        grad_clip_norm: the gradient's global norm is clipped to it, before optax gets it.
        grad_clip_value: the gradient's elements are clipped to [-value, value], before optax gets it.
        arguments: optax' other arguments by name: numbers, True, False, None, text, or tuples of them. `weight_decay`
            is one of them too: it is what optax makes of it, and stays. The `weight_decay` of a group or of
            `run.set_hyperparameters` is coupled decay besides, added before optax gets the gradient.

    Optax' rprop reads its learning rate only where its state is made: as the run is created, and where Lookahead's
    `reset_state` makes it anew. Neither a schedule nor a change reaches it in between.

    Attributes:
        name: of the function.
        arguments: (name, value) pairs, sorted by name.
        lr: the rate, a number or a schedule.
        grad_clip_norm: as above.
        grad_clip_value: as above.
    """

    name: str
    arguments: tuple[tuple[str, Argument], ...]
    lr: float | Schedule
    grad_clip_norm: float | None
    grad_clip_value: float | None
    weight_decay = 0.0

    def __init__(
        self,
        name: str,
        /,
        *,
        lr: float | Schedule = 1e-3,
        grad_clip_norm: float | None = None,
        grad_clip_value: float | None = None,
        **arguments: Argument | list[Scalar],
    ) -> None:
        self._set("name", name)
        self._set("arguments", _checked_arguments(arguments))
        self._set("lr", lr)
        self._set("grad_clip_norm", grad_clip_norm)
        self._set("grad_clip_value", grad_clip_value)
        self.__post_init__()

    def with_settings(self, settings: Settings) -> "Optax":
        """This one with another rate and other clips. It has no decay outside its arguments."""
        return Optax(
            self.name,
            lr=settings.lr,
            grad_clip_norm=settings.grad_clip_norm,
            grad_clip_value=settings.grad_clip_value,
            **dict(self.arguments),
        )

    def __eq__(self, other: object) -> bool:
        return repr(self) == repr(other) if isinstance(other, Optax) else NotImplemented

    def __hash__(self) -> int:
        return hash(repr(self))

    def __repr__(self) -> str:
        clips = {"grad_clip_norm": self.grad_clip_norm, "grad_clip_value": self.grad_clip_value}
        given = {"lr": self.lr, **{field: limit for field, limit in clips.items() if limit is not None}}
        options = ", ".join(f"{field}={value!r}" for field, value in (given | dict(self.arguments)).items())
        return f"Optax({self.name!r}, {options})"

    def _check_rule(self) -> None:
        _check_identifier("name", self.name)


def check_argument_names(arguments: Mapping[str, object]) -> None:
    """Refuses too many arguments, and names that none of optax' can have."""
    if len(arguments) > MAX_ARGUMENT_COUNT:
        raise ValueError(f"arguments are {len(arguments)}: give at most {MAX_ARGUMENT_COUNT}")
    if "learning_rate" in arguments:
        given = arguments["learning_rate"]
        raise ValueError(f"arguments.learning_rate is {given!r}: give it as lr, which may be a schedule too")
    for name in arguments:
        _check_identifier("arguments", name)


def _checked_arguments(arguments: Mapping[str, object]) -> tuple[tuple[str, Argument], ...]:
    check_argument_names(arguments)
    return tuple((name, _checked(f"arguments.{name}", arguments[name])) for name in sorted(arguments))


def _check_identifier(field: str, name: object) -> None:
    if not isinstance(name, str):
        raise TypeError(f'{field} is {name!r}: give the name in optax, as in Optax("adan")')
    if not (name.isidentifier() and len(name) <= MAX_NAME_LENGTH):
        raise ValueError(
            f"{field} is {name[:80]!r}: a name in optax has letters, digits and _, {MAX_NAME_LENGTH} at most"
        )


def _checked(field: str, value: object) -> Argument:
    if isinstance(value, list | tuple):
        if len(value) > MAX_ARGUMENT_COUNT:
            raise ValueError(f"{field} has {len(value)} elements: give at most {MAX_ARGUMENT_COUNT}")
        return tuple(_checked_scalar(field, element) for element in value)
    return _checked_scalar(field, value)


def _checked_scalar(field: str, value: object) -> Scalar:
    value = plain(value)
    if not _is_scalar(value):
        given = repr(value)[:80]
        raise TypeError(f"{field} is {given}: it must be a number, True, False, None, text, or a tuple of them")
    if isinstance(value, str) and len(value) > MAX_TEXT_LENGTH:
        raise ValueError(f"{field} is {value[:40]!r}...: text has at most {MAX_TEXT_LENGTH} characters")
    if isinstance(value, float) and not abs(value) <= FLOAT32_MAX:
        raise ValueError(f"{field} is {value!r}: it must be finite, in float32 too")
    if isinstance(value, int) and abs(value) > _MAX_INT:
        raise ValueError(f"{field} is {value!r}: a whole number must fit 64 bits")
    return value


def _is_scalar(value: object) -> TypeGuard[Scalar]:
    return value is None or isinstance(value, int | float | bool | str)
