"""Which gradients a run takes, by their values."""

import math
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from kedge.policies import OUTLIER_WARM_UP, OUTLIER_WINDOW, Admission

_FLOAT32_MAX = float(np.finfo(np.float32).max)


class Objection(NamedTuple):
    """Why a contribution is rejected."""

    reason: str
    message: str


class Norms:
    """Those that one worker sent last under its lease.

    Attributes:
        has_sent_outlier: whether the last one was far above the others'.
    """

    def __init__(self) -> None:
        self.has_sent_outlier = False
        self._last: deque[float] = deque(maxlen=OUTLIER_WINDOW)

    def __len__(self) -> int:
        return len(self._last)

    @property
    def median(self) -> float:
        """Its vote on what is usual."""
        return float(np.median(self._last))

    def add(self, gradient: np.ndarray, objection: Objection | None) -> None:
        """Takes that of a gradient, whatever became of it; zero, or one that float32 cannot hold, says nothing."""
        norm = _norm(gradient)
        if not 0 < norm**2 <= _FLOAT32_MAX:
            return
        self._last.append(norm)
        self.has_sent_outlier = objection is not None and objection.reason == "NORM_OUTLIER"


def objection_to(gradient: np.ndarray, admission: Admission, sent: Sequence[Norms]) -> Objection | None:
    """What there is against a gradient's values, if anything, beside what the live workers have sent."""
    if not np.isfinite(gradient).all():
        return Objection("NON_FINITE_GRADIENT", "the gradient holds a NaN or an infinity: skip the batch")
    norm = _norm(gradient)
    if norm**2 > _FLOAT32_MAX:
        return Objection("GRADIENT_TOO_LARGE", f"float32 cannot hold the square of the norm {norm:g}")
    if admission.max_norm is not None and norm > admission.max_norm:
        return Objection("NORM_ABOVE_LIMIT", f"the norm is {norm:g}, max_norm is {admission.max_norm:g}: clip it")
    if admission.outlier_factor is None or sum(len(norms) for norms in sent) < OUTLIER_WARM_UP:
        return None
    limit = admission.outlier_factor * float(np.median([norms.median for norms in sent if len(norms)]))
    if norm > limit:
        return Objection("NORM_OUTLIER", f"the norm is {norm:g}, the last ones allow {limit:g}: look at the data")
    return None


def most_sent_outliers(sent: Sequence[Norms]) -> bool:
    """Whether it is the run that has changed, rather than one of its workers."""
    last = [norms.has_sent_outlier for norms in sent if len(norms)]
    return 2 * sum(last) > len(last)


def _norm(gradient: np.ndarray) -> float:
    return math.sqrt(np.square(gradient).sum())
