"""Whether a contribution is taken: what it must be, before anything changes.

An error means that the worker broke the protocol: nothing is recorded and the sequence stays free. A rejection is an
answer: it is recorded, and the sequence is used up.
"""

import math
import statistics
from collections import deque
from typing import NamedTuple

import numpy as np

from kedge.policies import OUTLIER_WARM_UP, OUTLIER_WINDOW, Admission, Policy, Synchronous
from kedge.wire.errors import KedgeError
from kedge_server.core.rounds import staleness_limit
from kedge_server.core.values import ContributionHeader

_RETRY_AFTER_SECONDS = 0.5
_FLOAT32_MAX = float(np.finfo(np.float32).max)


class Standing(NamedTuple):
    """Where the run, and the worker in it, stand when a contribution is judged."""

    step: int
    """The step that contributions are to be based on: the last closed round's."""
    has_contributed: bool
    """Whether this worker has a contribution in the open round."""
    clock: int = 0
    """The worker's, under `BoundedStaleness`."""
    slowest_clock: int = 0
    bound: int | None = None
    """How far the first may be ahead of the second; None without a bound."""

    @property
    def is_ahead(self) -> bool:
        """Whether the worker should have waited at a pull first."""
        return self.bound is not None and self.clock - self.slowest_clock > self.bound


class Rejection(NamedTuple):
    """Why a contribution changes nothing."""

    reason: str
    message: str
    is_for_values: bool = False
    """Whether the gradient itself is unfit, whenever it may come."""


class NormHistory:
    """The norms of what the live workers have sent last. Each worker has one vote, however often it sends."""

    def __init__(self) -> None:
        self._norms: dict[str, deque[float]] = {}
        self._outliers: set[str] = set()

    def add(self, worker_id: str, norm: float, *, is_outlier: bool | None) -> None:
        """Takes the norm of what a worker sent, whether it was taken or not. Zeros and infinities say nothing.

        Args:
            worker_id: the worker.
            norm: the norm.
            is_outlier: whether it was one; None of one that did not come last.
        """
        if not 0 < norm < math.inf:
            return
        self._norms.setdefault(worker_id, deque(maxlen=OUTLIER_WINDOW)).append(norm)
        if is_outlier is not None:
            (self._outliers.add if is_outlier else self._outliers.discard)(worker_id)

    def forget(self, worker_id: str) -> None:
        """Forgets a worker that has gone."""
        self._norms.pop(worker_id, None)
        self._outliers.discard(worker_id)

    def state(self) -> tuple[tuple[str, tuple[float, ...], bool], ...]:
        """Each worker with its norms, and whether the last one was an outlier."""
        return tuple((worker, tuple(norms), worker in self._outliers) for worker, norms in self._norms.items())

    def resume(self, state: tuple[tuple[str, tuple[float, ...], bool], ...]) -> None:
        """Takes up what was there before the server was started anew."""
        self._norms = {worker: deque(norms, maxlen=OUTLIER_WINDOW) for worker, norms, _ in state}
        self._outliers = {worker for worker, _, is_outlier in state if is_outlier}

    @property
    def most_are_outliers(self) -> bool:
        """Whether what most workers sent last was an outlier: then they all have changed."""
        return 2 * len(self._outliers) > len(self._norms)

    def are_at_fault(self, rejection: Rejection) -> bool:
        """Whether it is the run that has changed, not the worker whose gradient is rejected so."""
        return rejection.reason == "NORM_OUTLIER" and self.most_are_outliers

    def limit(self, factor: float | None) -> float:
        """The greatest norm that is no outlier; infinite while too few are known to judge by."""
        if factor is None or sum(map(len, self._norms.values())) < OUTLIER_WARM_UP:
            return math.inf
        return factor * statistics.median(statistics.median(norms) for norms in self._norms.values())


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
            squares = float(np.dot(values, values))
        self.sum_of_squares += squares
        if self.non_finite_element is None and not math.isfinite(squares):
            bad = np.flatnonzero(~np.isfinite(values))
            self.non_finite_element = self._element_count + int(bad[0]) if bad.size else None
        self._element_count += values.size

    @property
    def norm(self) -> float:
        """The Euclidean norm."""
        return math.sqrt(self.sum_of_squares)

    def rejection(self) -> Rejection | None:
        """Why these values are not taken, if they are not."""
        if self.non_finite_element is not None:
            return Rejection(
                "NON_FINITE_GRADIENT",
                f"element {self.non_finite_element} of the gradient is NaN or infinite: nothing was changed; "
                "skip the batch, or lower the learning rate or loss scale",
                is_for_values=True,
            )
        if self.sum_of_squares > _FLOAT32_MAX:
            return Rejection(
                "GRADIENT_TOO_LARGE",
                f"the gradient's squares add up to {self.sum_of_squares:.3g}, float32 holds {_FLOAT32_MAX:.3g}: "
                "nothing was changed; lower the loss scale",
                is_for_values=True,
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


def check_room(run: str, pending_count: int, limit: int) -> None:
    """Checks that a run does not hold too many contributions already.

    Raises:
        KedgeError: QUEUE_FULL.
    """
    if pending_count >= limit:
        raise KedgeError(
            "QUEUE_FULL",
            f"{run} holds {pending_count} contributions, as many as limits.contributions_per_run allows: push again "
            f"after {_RETRY_AFTER_SECONDS} s",
            retry_after_seconds=_RETRY_AFTER_SECONDS,
            limit=limit,
        )


class Rules(NamedTuple):
    """What a run takes at the moment."""

    policy: Policy
    admission: Admission
    norms: NormHistory


def judge(header: ContributionHeader, inspection: Inspection, *, standing: Standing, rules: Rules) -> Rejection | None:
    """Judges a contribution that has arrived whole; None means that it is taken."""
    unfit = _judge_values(inspection, rules.admission, rules.norms)
    return unfit or _judge_standing(header, standing, rules.policy)


def _judge_values(inspection: Inspection, admission: Admission, history: NormHistory) -> Rejection | None:
    unfit = inspection.rejection()
    if unfit is not None:
        return unfit
    norm, outlier_limit = inspection.norm, history.limit(admission.outlier_factor)
    if admission.max_norm is not None and norm > admission.max_norm:
        return Rejection(
            "NORM_ABOVE_LIMIT",
            f"the gradient's norm is {norm:.4g}, the run's max_norm is {admission.max_norm:.4g}: nothing was changed; "
            "clip the gradient, or raise the limit",
            is_for_values=True,
        )
    if norm > outlier_limit:
        return Rejection(
            "NORM_OUTLIER",
            f"the gradient's norm is {norm:.4g}, more than {admission.outlier_factor:g} times what the run's workers "
            "send: nothing was changed; look for bad data, or raise outlier_factor",
            is_for_values=True,
        )
    return None


def _judge_standing(header: ContributionHeader, standing: Standing, policy: Policy) -> Rejection | None:
    staleness, limit = standing.step - header.base_step, staleness_limit(policy)
    if limit is not None and staleness > limit:
        return Rejection(
            "STALE_GRADIENT", f"gradient is {_steps(staleness)} old, the limit is {limit}: pull and recompute"
        )
    if isinstance(policy, Synchronous) and standing.has_contributed:
        return Rejection(
            "ALREADY_CONTRIBUTED",
            f"the worker has contributed to the round after step {standing.step} already: pull newer weights first",
        )
    if standing.is_ahead:
        return Rejection(
            "AHEAD_OF_BOUND",
            f"the worker is at clock {standing.clock}, the slowest one at {standing.slowest_clock}, the bound is "
            f"{standing.bound}: pull first, which waits for the others",
        )
    return None


def _steps(count: int) -> str:
    return f"{count} step" if count == 1 else f"{count} steps"
