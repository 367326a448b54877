"""The checks that the values of `kedge.optim` share. Every message begins with the field's name.

They take Python's own numbers. `plain` makes these of NumPy's, JAX's and PyTorch's, whichever is installed.
"""

import math
from collections.abc import Iterable
from dataclasses import fields
from numbers import Integral, Real
from typing import Any

FLOAT32_MAX = 3.4028234663852886e38
FLOAT32_MIN_NORMAL = 1.1754943508222875e-38


def plain(value: Any) -> Any:
    """A real number, or an array of no axes, as Python's own number or bool; everything else as it is."""
    if isinstance(value, bool):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        return plain(value.item())
    return value


def set_plain(value: Any) -> None:
    """Makes the fields of a dataclass that is being constructed plain."""
    for field in fields(value):
        if field.init:
            object.__setattr__(value, field.name, plain(getattr(value, field.name)))


def set_floats(value: Any, *names: str) -> None:
    """Makes floats of the whole numbers in these fields of a dataclass that is being constructed."""
    for name in names:
        object.__setattr__(value, name, as_float(getattr(value, name)))


def as_float(value: Any) -> Any:
    """A whole number as a float; everything else, a bool too, as it is."""
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def check(field: str, value: object, holds: bool, rule: str) -> None:
    """Refuses a value that breaks its rule, or that is a float but not finite."""
    finite = not isinstance(value, float) or math.isfinite(value)
    if not (holds and finite):
        raise ValueError(f"{field} is {value!r}: it must be {rule}")


def check_number(field: str, value: object) -> None:
    """Refuses what is no number; a bool is none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{field} is {value!r}: it must be a number")


def check_count(field: str, value: object, *, minimum: int) -> None:
    """Refuses what is no whole number, or too small a one."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{field} is {value!r}: it must be a whole number")
    check(field, value, value >= minimum, f"at least {minimum}")


def check_rate(field: str, value: Any) -> None:
    """Refuses what float32 cannot hold as a rate, a decay or another factor that is not negative."""
    check_number(field, value)
    check(field, value, 0 <= value <= FLOAT32_MAX, f"at least 0 and at most {FLOAT32_MAX:.3g}, float32's greatest")


def check_eps(field: str, value: Any) -> None:
    """Refuses an epsilon that is zero in float32, as the first step would divide by it, or infinite."""
    check_number(field, value)
    within = f"at least {FLOAT32_MIN_NORMAL:.3g} and at most {FLOAT32_MAX:.3g}, float32's least and greatest"
    check(field, value, FLOAT32_MIN_NORMAL <= value <= FLOAT32_MAX, within)


def check_fraction(field: str, value: Any) -> None:
    """Refuses a decay rate or momentum outside [0, 1)."""
    check_number(field, value)
    check(field, value, 0 <= value < 1, "in [0, 1)")


def check_clips(norm: float | None, value: float | None) -> None:
    """Refuses a clip that is not greater than 0."""
    for field, limit in (("grad_clip_norm", norm), ("grad_clip_value", value)):
        if limit is not None:
            check_number(field, limit)
        holds = limit is None or FLOAT32_MIN_NORMAL <= limit <= FLOAT32_MAX
        check(field, limit, holds, "None, or greater than 0 and within float32")


def check_flag(field: str, value: object) -> None:
    """Refuses what is neither True nor False."""
    if not isinstance(value, bool):
        raise TypeError(f"{field} is {value!r}: it must be True or False")


def check_positive(field: str, value: Any) -> None:
    """Refuses what is not greater than 0 in float32."""
    check_number(field, value)
    check(field, value, FLOAT32_MIN_NORMAL <= value <= FLOAT32_MAX, "greater than 0 and within float32")


def checked_pair(field: str, pair: Any, names: str) -> tuple[float, float]:
    """The pair as floats.

    Raises:
        ValueError: if it is no pair.
        TypeError: if it holds something else than numbers.
    """
    values = tuple(map(plain, pair)) if isinstance(pair, Iterable) else ()
    if len(values) != 2:
        raise ValueError(f"{field} is {pair!r}: it must be a pair {names}")
    for value in values:
        check_number(field, value)
        check(field, value, abs(value) <= FLOAT32_MAX, "a pair of numbers within float32")
    return float(values[0]), float(values[1])


def checked_betas(betas: Any) -> tuple[float, float]:
    """The pair as floats.

    Raises:
        ValueError: if it is no pair of numbers in [0, 1).
        TypeError: if it holds something else than numbers.
    """
    pair = checked_pair("betas", betas, "(beta1, beta2)")
    for beta in pair:
        check("betas", beta, 0 <= beta < 1, "a pair of numbers in [0, 1)")
    return pair
