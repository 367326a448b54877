"""The optimizers of `kedge.optim` in plain NumPy and float64: slow, small, and written without a look at the server's.

Source: arXiv:1412.6980 (Adam), 1711.05101 (AdamW), 2010.07468 (AdaBelief), 1907.08610 (Lookahead).
"""

from typing import Any

import numpy as np

from kedge import optim


class Updater:
    """The weights of a run and what changes them.

    Args:
        optimizer: the run's.
        weights: the initial weights, of shape [n].

    Attributes:
        step: updates applied.
        lookahead_sync_count: lookahead syncs among them.
        fast: float64 of shape [n].
        slow: float64 of shape [n]; None without Lookahead.
    """

    def __init__(self, optimizer: optim.Optimizer, weights: np.ndarray) -> None:
        self._spec = optimizer.spec()
        self._first = np.zeros(weights.shape)
        self._second = np.zeros(weights.shape)
        self.step = 0
        self.lookahead_sync_count = 0
        self.fast = weights.astype(np.float64)
        self.slow = None if self._spec.sync_period is None else self.fast.copy()

    @property
    def learning_rate(self) -> float:
        """That of the next step."""
        return self._spec.rate(self.step)

    def apply(self, gradient: np.ndarray) -> None:
        """Makes one step with a gradient of shape [n]."""
        rate = self.learning_rate
        self.step += 1
        gradient = _clipped(gradient, self._spec) + self._spec.weight_decay * self.fast
        self.fast = self.fast - rate * self._direction(gradient)
        if self.slow is not None and self._spec.ends_sync_period(self.step):
            self.lookahead_sync_count += 1
            alpha = self._spec.alpha
            self.slow = self.fast if alpha == 1 else self.slow + alpha * (self.fast - self.slow)
            self.fast = self.slow.copy()

    def _direction(self, gradient: np.ndarray) -> np.ndarray:
        base = self._spec.base
        if isinstance(base, optim.SGD):
            return self._momentum(gradient, base)
        if isinstance(base, optim.AdaBelief):
            return self._adabelief(gradient, base)
        direction = self._adam(gradient, base)
        return direction + base.weight_decay * self.fast if isinstance(base, optim.AdamW) else direction

    def _momentum(self, gradient: np.ndarray, base: optim.SGD) -> np.ndarray:
        self._first = base.momentum * self._first + gradient
        return gradient + base.momentum * self._first if base.nesterov else self._first

    def _adam(self, gradient: np.ndarray, base: optim.Adam | optim.AdamW) -> np.ndarray:
        b1, b2 = base.betas
        self._first = b1 * self._first + (1 - b1) * gradient
        self._second = b2 * self._second + (1 - b2) * gradient**2
        return self._corrected(base)

    def _adabelief(self, gradient: np.ndarray, base: optim.AdaBelief) -> np.ndarray:
        b1, b2 = base.betas
        eps_root = base.eps if base.eps_root is None else base.eps_root
        self._first = b1 * self._first + (1 - b1) * gradient
        self._second = b2 * self._second + (1 - b2) * (gradient - self._first) ** 2 + eps_root
        return self._corrected(base)

    def _corrected(self, base: Any) -> np.ndarray:
        b1, b2 = base.betas
        first = self._first / (1 - b1**self.step)
        second = self._second / (1 - b2**self.step)
        direction: np.ndarray = first / (np.sqrt(second) + base.eps)
        return direction


def _clipped(gradient: np.ndarray, spec: optim.UpdateSpec) -> np.ndarray:
    if spec.grad_clip_norm is not None:
        norm = float(np.linalg.norm(gradient))
        gradient = gradient * (min(1.0, spec.grad_clip_norm / norm) if norm else 1.0)
    if spec.grad_clip_value is not None:
        gradient = np.clip(gradient, -spec.grad_clip_value, spec.grad_clip_value)
    return gradient
