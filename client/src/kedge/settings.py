"""A run's settings as a user gives them, checked before anything is sent."""

import math
from collections.abc import Mapping
from typing import Any, get_args

from kedge import policies
from kedge.policies import METRIC_NAME_LENGTH

MAX_METRICS = 32


def check_aggregation(value: object) -> None:
    """Refuses what is no aggregation.

    Raises:
        TypeError: as it says.
    """
    if not isinstance(value, policies.Policy):
        raise TypeError(
            f"aggregation is {value!r}: give kedge.Synchronous(quorum), kedge.Asynchronous(), "
            "kedge.BoundedStaleness(bound) or kedge.Buffered(size)"
        )


def check_admission(value: object) -> None:
    """Refuses what is no admission.

    Raises:
        TypeError: as it says.
    """
    if not isinstance(value, policies.Admission):
        raise TypeError(f"admission is {value!r}: give kedge.Admission(...), as in kedge.Admission(max_norm=10.0)")


def check_durability(value: object) -> None:
    """Refuses what is no durability and not None.

    Raises:
        ValueError: as it says.
    """
    levels = get_args(policies.Durability)
    if value is not None and value not in levels:
        raise ValueError(f"durability is {value!r}: it must be None or one of {', '.join(map(repr, levels))}")


def check_checkpoints(value: object) -> None:
    """Refuses what says nothing of checkpoints and is not None.

    Raises:
        TypeError: as it says.
    """
    if value is not None and not isinstance(value, policies.Checkpoints):
        raise TypeError(
            f"checkpoints is {value!r}: give kedge.Checkpoints(...), as in kedge.Checkpoints(every_steps=100), or None"
        )


def checked_metrics(values: Mapping[str, Any] | None) -> dict[str, float]:
    """A checkpoint's metrics as plain numbers.

    Raises:
        TypeError, ValueError: for what can be no metrics; the message names them.
    """
    if values is None:
        return {}
    if not isinstance(values, Mapping):
        raise TypeError(f'metrics is {values!r}: give names and numbers, as in {{"accuracy": 0.9}}')
    if len(values) > MAX_METRICS:
        raise ValueError(f"metrics has {len(values)} names: it may have {MAX_METRICS}")
    return {_checked_name(name): _checked_metric(name, value) for name, value in values.items()}


def _checked_name(name: object) -> str:
    if not isinstance(name, str) or not 1 <= len(name) <= METRIC_NAME_LENGTH:
        raise ValueError(f"metrics has the name {name!r}: give one of 1 to {METRIC_NAME_LENGTH} characters")
    return name


def _checked_metric(name: str, value: Any) -> float:
    try:
        number = float(value.detach() if hasattr(value, "detach") else value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"metrics[{name!r}] is {value!r}: it must be one number") from error
    if not math.isfinite(number):
        raise ValueError(f"metrics[{name!r}] is {number}: it must be finite")
    return number
