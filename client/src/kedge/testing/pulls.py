"""What a pull is answered with, and when."""

from collections.abc import Sequence

import numpy as np

from kedge.testing.run import FakeRun
from kedge.transport import PullRequest, WeightsOfStep
from kedge.wire.errors import KedgeError
from kedge.wire.manifest import DTYPES


def check_has(run: FakeRun, request: PullRequest) -> None:
    """Refuses slow weights where there are none.

    Raises:
        KedgeError: NO_SLOW_WEIGHTS.
    """
    if request.weights != "fast" and run.newest.slow is None:
        message = f"{run.name} has no Lookahead, so no slow weights: pull the fast ones"
        raise KedgeError("NO_SLOW_WEIGHTS", message, run=run.name)


def obstacle(run: FakeRun, request: PullRequest, worker: str | None) -> KedgeError | None:
    """Why a pull cannot be answered yet; None if it can."""
    gap = run.gap(worker)
    if gap is not None and gap.is_over:
        return gap.error(worker or "")
    step = run.weights_for(worker).step
    if step >= request.min_step:
        return None
    message = f"{run.name} is at step {step}, waited {request.wait_seconds:g} s for step {request.min_step}"
    return KedgeError("STEP_NOT_REACHED", message, step=step, min_step=request.min_step)


def answer(run: FakeRun, request: PullRequest, worker: str | None) -> WeightsOfStep:
    """The weights, if they are newer than what is there already."""
    step, fast, slow = run.weights_for(worker)
    if request.if_newer_than is not None and step <= request.if_newer_than:
        return WeightsOfStep(step, None)
    both = (("fast", fast), ("slow", slow))
    parts = [part.astype(np.float32) for name, part in both if part is not None and name in request.weights]
    return WeightsOfStep(step, through_wire(parts, request.dtype).astype(np.float32))


def through_wire(arrays: Sequence[np.ndarray], dtype: str) -> np.ndarray:
    """The values as the other side has them, float64."""
    with np.errstate(over="ignore"):
        return np.concatenate([array.reshape(-1).astype(DTYPES[dtype]) for array in arrays]).astype(np.float64)
