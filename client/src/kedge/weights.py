"""Asking for weights: what a run's and a worker's pull have in common."""

import time
from collections.abc import Callable
from typing import Literal, get_args

from kedge.transport import PullRequest, WeightsOfStep
from kedge.wire.errors import KedgeError

MAX_WAIT_SECONDS = 300.0
"""The longest that one message asks the server to wait. Whoever waits longer asks again."""

FastOrSlow = Literal["fast", "slow"]


def pull_request(weights: str, *, dtype: str = "float32", min_step: int | None = None) -> PullRequest:
    """The request for weights as a user names them.

    Raises:
        ValueError: for other weights than "fast" and "slow", and for a negative step.
    """
    if weights not in get_args(FastOrSlow):
        raise ValueError(f"weights is {weights!r}: it must be 'fast' or 'slow'")
    if min_step is not None and not 0 <= min_step < 1 << 63:
        raise ValueError(f"min_step is {min_step}: it must be None, or 0 to 2**63 - 1")
    return PullRequest("slow" if weights == "slow" else "fast", dtype, min_step or 0)


def pull_patiently(
    pull: Callable[[PullRequest], WeightsOfStep],
    request: PullRequest,
    timeout_seconds: float | None,
    *,
    clock: Callable[[], float] = time.monotonic,
) -> WeightsOfStep:
    """Pulls, and pulls again until the step is reached or `timeout_seconds` have passed (None: never).

    Raises:
        KedgeError: STEP_NOT_REACHED, and whatever `pull` raises.
    """
    give_up_at = None if timeout_seconds is None else clock() + timeout_seconds
    while True:
        wait = MAX_WAIT_SECONDS if give_up_at is None else max(give_up_at - clock(), 0.0)
        try:
            return pull(request._replace(wait_seconds=min(wait, MAX_WAIT_SECONDS)))
        except KedgeError as error:
            if error.reason != "STEP_NOT_REACHED" or (give_up_at is not None and clock() >= give_up_at):
                raise
