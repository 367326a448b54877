"""What a worker says of a gradient, checked before anything is sent."""

import operator
from typing import Any

from kedge.wire.errors import KedgeError


def checked_loss(value: Any) -> float | None:
    """The loss as a number, detached from what it was computed by; None for None.

    Raises:
        TypeError: if it is not one number.
    """
    if value is None:
        return None
    try:
        return float(value.detach() if hasattr(value, "detach") else value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"loss is {value!r}: it must be one number") from error


def checked_example_count(value: int) -> int:
    """The number of examples, 1 to 2**63 - 1.

    Raises:
        TypeError: if it is no whole number.
        KedgeError: INVALID_EXAMPLE_COUNT.
    """
    try:
        count = operator.index(value)
    except TypeError:
        raise TypeError(f"example_count is {value!r}: it must be a whole number") from None
    if not 1 <= count < 1 << 63:
        raise KedgeError(
            "INVALID_EXAMPLE_COUNT",
            f"example_count is {count}: it must be 1 to 2**63 - 1, it weighs the gradient in the mean of its round",
            example_count=count,
        )
    return count
