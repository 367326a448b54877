"""Asking for weights: what a run's and a worker's pull have in common."""

import time
from collections.abc import Callable
from typing import Literal, get_args

from kedge.transport import PullRequest, WeightsOfStep
from kedge.wire.errors import KedgeError

MAX_WAIT_SECONDS = 300.0
"""The longest that one message asks the server to wait. Whoever waits longer asks again."""

FastOrSlow = Literal["fast", "slow"]


WAITED_OUT = frozenset({"STEP_NOT_REACHED", "WAITING_FOR_SLOWEST"})
"""What a pull fails with when it has waited for as long as it asked for: it may ask again."""


def pull_request(
    weights: str, *, dtype: str = "float32", min_step: int | None = None, if_newer_than: int | None = None
) -> PullRequest:
    """The request for weights as a user names them.

    Raises:
        ValueError: for other weights than "fast" and "slow", and for a negative step.
    """
    if weights not in get_args(FastOrSlow):
        raise ValueError(f"weights is {weights!r}: it must be 'fast' or 'slow'")
    for name, step in (("min_step", min_step), ("if_newer_than", if_newer_than)):
        if step is not None and not 0 <= step < 1 << 63:
            raise ValueError(f"{name} is {step}: it must be None, or 0 to 2**63 - 1")
    return PullRequest("slow" if weights == "slow" else "fast", dtype, min_step or 0, if_newer_than=if_newer_than)


def pull_patiently(
    pull: Callable[[PullRequest], WeightsOfStep],
    request: PullRequest,
    timeout_seconds: float | None,
    *,
    clock: Callable[[], float] = time.monotonic,
) -> WeightsOfStep:
    """Pulls, and pulls again until what is waited for has happened or `timeout_seconds` have passed (None: never).

    Raises:
        KedgeError: STEP_NOT_REACHED, WAITING_FOR_SLOWEST, and whatever `pull` raises.
    """
    give_up_at = None if timeout_seconds is None else clock() + timeout_seconds
    while True:
        wait = MAX_WAIT_SECONDS if give_up_at is None else max(give_up_at - clock(), 0.0)
        try:
            return pull(request._replace(wait_seconds=min(wait, MAX_WAIT_SECONDS)))
        except KedgeError as error:
            if error.reason not in WAITED_OUT or (give_up_at is not None and clock() >= give_up_at):
                raise
