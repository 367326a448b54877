"""Whether a contribution is taken: what it must be, before anything changes.

An error means that the worker broke the protocol: nothing is recorded and the sequence stays free. A rejection is an
answer: it is recorded, and the sequence is used up.
"""

from typing import NamedTuple

from kedge.policies import Policy, Synchronous
from kedge.wire.errors import KedgeError
from kedge_server.core.values import ContributionHeader


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
            got=header.manifest_digest.hex(),
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
    header: ContributionHeader, *, standing: Standing, policy: Policy, non_finite_element: int | None
) -> Rejection | None:
    """Judges a contribution that has arrived whole; None means that it is taken."""
    if non_finite_element is not None:
        return Rejection(
            "NON_FINITE_GRADIENT",
            f"element {non_finite_element} of the gradient is NaN or infinite: nothing was changed; skip the batch, "
            "or lower the learning rate or loss scale",
        )
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
