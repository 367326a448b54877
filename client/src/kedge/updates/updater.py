"""What changes weights: clips, decay, the rule, the rate, Lookahead."""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from kedge import optim
from kedge.optim.controls import StepValues
from kedge.optim.groups import assign
from kedge.updates.rules import Tensor, direction_of
from kedge.wire.manifest import Manifest


class Updater:
    """Weights and what changes them.

    Args:
        optimizer: what makes the steps.
        groups: tensors with hyperparameters of their own.
        manifest: how the flat range is divided.
        weights: the initial weights, of shape [n].

    Attributes:
        step: updates applied.
        lookahead_sync_count: lookahead syncs among them.
        fast: float64 of shape [n]. Without Lookahead it may be set: the moments stay.
        slow: float64 of shape [n]; None without Lookahead. Frozen tensors are the same in both.

    Raises:
        KedgeError: INVALID_CONFIGURATION for `optim.Optax`.
        ValueError: for a group that gets no tensor.
    """

    def __init__(
        self, optimizer: optim.Optimizer, groups: Sequence[optim.Group], manifest: Manifest, weights: np.ndarray
    ) -> None:
        self._spec = optimizer.spec()
        self._direction = direction_of(self._spec.rule)
        indices = assign(groups, [spec.name for spec in manifest.tensors])
        frozen = {index for index, group in enumerate(groups, 1) if group.frozen}
        self._moving = [
            Tensor(slice(spec.offset, spec.offset + spec.size), spec.shape, index)
            for spec, index in zip(manifest.tensors, indices, strict=True)
            if index not in frozen and spec.size
        ]
        self.step = 0
        self.lookahead_sync_count = 0
        self.fast = weights.astype(np.float64)
        self.slow = None if self._spec.sync_period is None else self.fast.copy()

    def apply(self, gradient: np.ndarray, values: Sequence[StepValues]) -> None:
        """Makes one step.

        Args:
            gradient: of shape [n].
            values: as `Controls.values()` has them, for the tensors of no group and for each group.
        """
        self.step += 1
        gradients = [gradient[tensor.range].reshape(tensor.shape).astype(np.float64) for tensor in self._moving]
        self.fast = self.fast.copy()
        for tensor, clipped in zip(self._moving, self._clipped(gradients, values), strict=True):
            self._move(tensor, clipped, values[tensor.group])
        if self.slow is not None and self._spec.ends_sync_period(self.step):
            self._synchronize(self.slow)

    def _move(self, tensor: Tensor, gradient: np.ndarray, values: StepValues) -> None:
        weights = self.fast[tensor.range].reshape(tensor.shape)
        tensor.weights, tensor.decay = weights, values.decoupled_weight_decay
        tensor.step = self._spec.rule_step(self.step)
        step = values.lr * self._direction(self._spec.rule, tensor, gradient + values.weight_decay * weights)
        self.fast[tensor.range] = (weights - step).reshape(-1)

    def _clipped(self, gradients: list[np.ndarray], values: Sequence[StepValues]) -> list[np.ndarray]:
        """By the norm of those of one scope together, then each element by itself."""
        squares: dict[int, float] = defaultdict(float)
        for tensor, gradient in zip(self._moving, gradients, strict=True):
            squares[values[tensor.group].norm_scope] += float(np.sum(gradient**2))
        clipped = []
        for tensor, gradient in zip(self._moving, gradients, strict=True):
            _, _, _, greatest_norm, greatest, scope = values[tensor.group]
            norm = squares[scope] ** 0.5
            scale = greatest_norm / norm if greatest_norm is not None and norm > greatest_norm else 1.0
            bound = np.inf if greatest is None else greatest
            clipped.append(np.clip(gradient * scale, -bound, bound))
        return clipped

    def _synchronize(self, slow: np.ndarray) -> None:
        self.lookahead_sync_count += 1
        alpha = self._spec.alpha
        self.slow = self.fast if alpha == 1 else slow + alpha * (self.fast - slow)
        self.fast = self.slow.copy()
        if self._spec.reset_state:
            for tensor in self._moving:
                tensor.state.clear()
