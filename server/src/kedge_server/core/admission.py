"""Whether a contribution is taken: what it must be, before anything changes.

An error means that the worker broke the protocol: nothing is recorded and the sequence stays free. A rejection is an
answer: it is recorded, and the sequence is used up.
"""

import math
from typing import NamedTuple

import numpy as np

from kedge.policies import Policy, Synchronous
from kedge.wire.errors import KedgeError
from kedge_server.core.values import ContributionHeader

_FLOAT32_MAX = float(np.finfo(np.float32).max)


class Standing(NamedTuple):
    """Where the run stands when a contribution is judged."""

    step: int
    """The step that contributions are to be based on: the last closed round's."""
    has_contributed: bool
    """Whether this worker has a contribution in the open round."""


class Rejection(NamedTuple):
    """Why a contribution changes nothing."""

    reason: str
    message: str


class Inspection:
    """What is learnt of a gradient's values while they come in, a piece at a time.

    A sum of squares is not finite if any element is not, and costs less than looking at each one. It must be within
    float32, too: a norm or a second moment that overflows could never be undone.
    """

    def __init__(self) -> None:
        self.non_finite_element: int | None = None
        self.sum_of_squares = 0.0
        self._element_count = 0

    def add(self, values: np.ndarray) -> None:
        """Takes the next values, float32, in order."""
        with np.errstate(over="ignore", invalid="ignore"):
            squares = float(np.einsum("i,i->", values, values))
        self.sum_of_squares += squares
        if self.non_finite_element is None and not math.isfinite(squares):
            bad = np.flatnonzero(~np.isfinite(values))
            self.non_finite_element = self._element_count + int(bad[0]) if bad.size else None
        self._element_count += values.size

    def rejection(self) -> Rejection | None:
        """Why these values are not taken, if they are not."""
        if self.non_finite_element is not None:
            return Rejection(
                "NON_FINITE_GRADIENT",
                f"element {self.non_finite_element} of the gradient is NaN or infinite: nothing was changed; "
                "skip the batch, or lower the learning rate or loss scale",
            )
        if self.sum_of_squares > _FLOAT32_MAX:
            return Rejection(
                "GRADIENT_TOO_LARGE",
                f"the gradient's squares add up to {self.sum_of_squares:.3g}, float32 holds {_FLOAT32_MAX:.3g}: "
                "nothing was changed; lower the loss scale",
            )
        return None


def check_header(header: ContributionHeader, *, manifest_digest: bytes, step: int) -> None:
    """Checks what can be checked before the gradient comes.

    Raises:
        KedgeError: MANIFEST_MISMATCH, INVALID_EXAMPLE_COUNT or BASE_STEP_AHEAD.
    """
    if header.manifest_digest != manifest_digest:
        raise KedgeError(
            "MANIFEST_MISMATCH",
            "the gradient's manifest is not the run's: build it from the tree that the run was created with",
            expected=manifest_digest.hex(),
            got=header.manifest_digest[:32].hex(),
        )
    if header.example_count < 1:
        raise KedgeError(
            "INVALID_EXAMPLE_COUNT",
            f"example_count is {header.example_count}: give the number of examples in the gradient's mean, at least 1",
            example_count=header.example_count,
        )
    if header.base_step > step:
        raise KedgeError(
            "BASE_STEP_AHEAD",
            f"base_step is {header.base_step}, the run is at step {step}: send the step that came with the weights",
            base_step=header.base_step,
            step=step,
        )


def judge(
    header: ContributionHeader, *, standing: Standing, policy: Policy, inspection: Inspection
) -> Rejection | None:
    """Judges a contribution that has arrived whole; None means that it is taken."""
    unfit = inspection.rejection()
    if unfit is not None:
        return unfit
    staleness = standing.step - header.base_step
    limit = 0 if isinstance(policy, Synchronous) else policy.max_staleness
    if limit is not None and staleness > limit:
        return Rejection(
            "STALE_GRADIENT", f"gradient is {_steps(staleness)} old, the limit is {limit}: pull and recompute"
        )
    if isinstance(policy, Synchronous) and standing.has_contributed:
        return Rejection(
            "ALREADY_CONTRIBUTED",
            f"the worker has contributed to the round after step {standing.step} already: pull newer weights first",
        )
    return None


def _steps(count: int) -> str:
    return f"{count} step" if count == 1 else f"{count} steps"
