"""Which gradients a run takes, by their values."""

import math
from collections import deque
from typing import NamedTuple

import numpy as np

from kedge.policies import OUTLIER_WARM_UP, OUTLIER_WINDOW, Admission

_FLOAT32_MAX = float(np.finfo(np.float32).max)


class Objection(NamedTuple):
    """Why a contribution is rejected."""

    reason: str
    message: str


class Norms:
    """Those of the contributions that were taken last; what outliers are judged by."""

    def __init__(self) -> None:
        self._last: deque[float] = deque(maxlen=OUTLIER_WINDOW)

    def add(self, gradient: np.ndarray) -> None:
        """Takes that of a contribution."""
        self._last.append(_norm(gradient))

    def objection(self, gradient: np.ndarray, admission: Admission) -> Objection | None:
        """What there is against a gradient's values, if anything."""
        if not np.isfinite(gradient).all():
            return Objection("NON_FINITE_GRADIENT", "the gradient holds a NaN or an infinity: skip the batch")
        norm = _norm(gradient)
        if norm**2 > _FLOAT32_MAX:
            return Objection("GRADIENT_TOO_LARGE", f"float32 cannot hold the square of the norm {norm:g}")
        if admission.max_norm is not None and norm > admission.max_norm:
            return Objection("NORM_ABOVE_LIMIT", f"the norm is {norm:g}, max_norm is {admission.max_norm:g}: clip it")
        if admission.outlier_factor is None or len(self._last) < OUTLIER_WARM_UP:
            return None
        limit = admission.outlier_factor * float(np.median(self._last))
        if norm > limit > 0:  # beside zeros everything would be far out
            return Objection("NORM_OUTLIER", f"the norm is {norm:g}, the last ones allow {limit:g}: look at the data")
        return None


def _norm(gradient: np.ndarray) -> float:
    return math.sqrt(np.square(gradient).sum())
