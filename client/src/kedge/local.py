"""Local steps: a worker makes several steps by itself, and what they came to travels as one gradient.

That pseudo-gradient is the weights that were pulled less the weights now. The run's optimizer takes it as it takes any
gradient, so the server knows nothing of local steps. Invariant: the local steps that are pending all came after
`_origin`, the weights of `_base_step`, and no later ones were pulled since.

Source: DiLoCo, arXiv:2311.08105, algorithm 1; SlowMo, arXiv:1910.00643.
"""

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from kedge import optim, tree
from kedge.checks import checked_example_count, checked_loss
from kedge.optim._checks import check_count, plain
from kedge.optim.controls import Controls
from kedge.optim.groups import check_groups
from kedge.updates import Updater
from kedge.wire.manifest import Manifest
from kedge.worker import Worker

_logger = logging.getLogger("kedge")


class LocalSteps:
    """A worker's own steps between exchanges with the server. `Worker.local_steps` makes it; use it from one thread.

    It keeps a copy of the weights that were pulled, 4 bytes an element. A local optimizer keeps weights and state in
    float64, 8 bytes each.
    """

    def __init__(
        self,
        worker: Worker,
        manifest: Manifest,
        template: tree.Template,
        *,
        optimizer: optim.Rule | None,
        sync_period: int | None,
        groups: Sequence[optim.Group],
    ) -> None:
        self._worker = worker
        self._manifest = manifest
        self._template = template
        self._local = _local_optimizer(optimizer, sync_period, groups, manifest)
        self._origin: np.ndarray | None = None
        self._base_step = 0
        self._pending = _Pending()

    @property
    def pending_count(self) -> int:
        """The local steps since the last exchange."""
        return self._pending.step_count

    def pull(self) -> Any:
        """Fetches the fast weights to go on from; blocks until they are here. Pending local steps are dropped.

        Returns:
            NumPy arrays in the structure of the run's params, not shared with anyone. The moments of the local
            optimizer stay.

        Raises:
            KedgeError: as `Worker.pull`.
        """
        return self._leave_from(self._worker.pull())

    def step(self, grads: Any, *, loss: float | None = None, example_count: int = 1) -> Any:
        """Makes a local step, and an exchange with the server if it is the `sync_period`-th since the last one.

        A gradient with a NaN or an infinity is left out: it changes nothing and counts for nothing.

        Args:
            grads: as for `Worker.push`, of the weights that were last returned here.
            loss: the loss of these examples. The server gets the mean over the pending steps that have one, weighted by
                their examples.
            example_count: the number of examples that the gradient is a mean over, >= 1. The server gets the sum.

        Returns:
            The weights to go on with, as `pull` returns them: the local ones, or after an exchange the server's. If the
            pseudo-gradient was rejected it was left out (`worker.last_result` says so), and these are the server's
            weights without it. But if its round was refused (COHORT_TOO_SMALL) and there are no newer weights, the
            local steps stay pending, these are the local weights, and the next step exchanges them.

        Raises:
            ValueError: if nothing was pulled before, there is no local optimizer, or the worker itself pulled other
                weights meanwhile. Nothing is changed by it.
            KedgeError: TENSOR_MISSING, TENSOR_UNEXPECTED, TENSOR_SHAPE_MISMATCH, UNSUPPORTED_DTYPE,
                INVALID_EXAMPLE_COUNT: nothing is changed by it. Those of an exchange, as `Worker.step`: the local step
                is made and stays pending, and the next one or `flush` exchanges it.
        """
        gradient = _flat(grads, self._manifest)
        loss, example_count = checked_loss(loss), checked_example_count(example_count)
        pending = self._pending.after(loss, example_count)
        local = self._require_optimizer()
        self._require_origin()
        if not np.isfinite(gradient).all():
            _logger.warning("%s: a local gradient was left out: it has a NaN or an infinity", self._worker.name)
            return self._as_tree(local.weights)
        local.step(gradient, loss, example_count)
        self._pending = pending
        return self._as_tree(local.weights) if pending.step_count < local.sync_period else self.flush()

    def step_to(self, weights: Any, *, loss: float | None = None, example_count: int = 1) -> Any:
        """Exchanges weights that any local steps came to, whoever made them, for the server's; blocks as `Worker.step`.

        Args:
            weights: arrays named and shaped as the run's params. Their difference to what was pulled is sent.
            loss: the mean loss of the local steps.
            example_count: the number of examples in all of them, >= 1: the weight in the round.

        Returns:
            As `step` after an exchange.

        Raises:
            ValueError: if nothing was pulled before, or the worker itself pulled other weights meanwhile.
            KedgeError: as `Worker.step`. Nothing is changed by it: the same call may be made again.

        Example:
            >>> local = worker.local_steps()
            >>> weights = local.pull()
            >>> for part in parts:
            ...     weights, loss = train(weights, part)
            ...     weights = local.step_to(weights, loss=loss, example_count=len(part))
        """
        pending = self._pending.after(checked_loss(loss), checked_example_count(example_count))
        return self._exchange(_flat(weights, self._manifest), pending)

    def flush(self) -> Any:
        """Exchanges the local steps that are pending, if there are any. Call it after the last step.

        Returns:
            As `step` after an exchange; without pending steps the weights as they are, and nothing is sent.

        Raises:
            ValueError: if nothing was pulled before, or the worker itself pulled other weights meanwhile.
            KedgeError: as `Worker.step`. The steps stay pending: `flush` tries again, `pull` drops them. Where the fate
                of the first attempt is unknown (SERVER_UNAVAILABLE) and the run is asynchronous, trying again may apply
                them twice.
        """
        if not self._pending.step_count:
            return self._as_tree(self._require_origin())
        return self._exchange(self._require_optimizer().weights, self._pending)

    def __repr__(self) -> str:
        return f"<kedge.LocalSteps of {self._worker.name}: {self.pending_count} pending>"

    def _exchange(self, weights: np.ndarray, pending: "_Pending") -> Any:
        with np.errstate(over="ignore", invalid="ignore"):  # the server refuses what is not finite
            difference = (self._require_origin() - weights).astype(np.float32)
        grads = {
            spec.name: difference[spec.offset : spec.offset + spec.size].reshape(spec.shape)
            for spec in self._manifest.tensors
        }
        theirs = self._worker.step(grads, loss=pending.mean_loss, example_count=pending.example_count)
        return self._stay_at(weights, pending) if self._is_refused() else self._leave_from(theirs)

    def _is_refused(self) -> bool:
        """Whether the last exchange changed nothing and brought nothing: its round had too few contributions."""
        result = self._worker.last_result
        is_refused = result is not None and (result.outcome, result.reason) == ("rejected", "COHORT_TOO_SMALL")
        return is_refused and self._worker.step_number == self._base_step

    def _stay_at(self, weights: np.ndarray, pending: "_Pending") -> Any:
        """Goes on from weights that are still to be exchanged."""
        self._pending = pending
        if self._local is not None:
            self._local.weights = weights
        return self._as_tree(weights)

    def _leave_from(self, weights: Any) -> Any:
        """Begins anew at weights that the worker has pulled."""
        self._origin = _flat(weights, self._manifest)
        self._base_step = self._worker.step_number
        self._pending = _Pending()
        if self._local is not None:
            self._local.weights = self._origin
        return weights

    def _as_tree(self, weights: np.ndarray) -> Any:
        with np.errstate(over="ignore"):
            return self._template.fill(tree.split_flat(weights.astype(np.float32), self._manifest))

    def _require_origin(self) -> np.ndarray:
        if self._origin is None:
            raise ValueError("no weights were pulled yet: call pull() first")
        if self._worker.step_number != self._base_step:
            raise ValueError(
                f"the worker holds weights of step {self._worker.step_number}, the local steps began at "
                f"{self._base_step}: pull and step with the LocalSteps alone; call its pull() to begin anew"
            )
        return self._origin

    def _require_optimizer(self) -> "_LocalOptimizer":
        if self._local is None:
            raise ValueError("there is no local optimizer: give local_steps() one, or call step_to() with the weights")
        return self._local


class _Pending(NamedTuple):
    """The local steps since the last exchange."""

    step_count: int = 0
    example_count: int = 0
    loss_sum: float = 0.0
    """Of the losses, each times its examples."""
    loss_weight: int = 0
    """The examples of those losses."""

    @property
    def mean_loss(self) -> float | None:
        """None if no step had a loss."""
        return self.loss_sum / self.loss_weight if self.loss_weight else None

    def after(self, loss: float | None, example_count: int) -> "_Pending":
        """After one more step, or several that have this mean loss."""
        total = checked_example_count(self.example_count + example_count)
        if loss is None:
            return self._replace(step_count=self.step_count + 1, example_count=total)
        loss_sum = self.loss_sum + loss * example_count
        return _Pending(self.step_count + 1, total, loss_sum, self.loss_weight + example_count)


class _LocalOptimizer:
    """Weights, and the optimizer that moves them."""

    def __init__(
        self, optimizer: optim.Rule, sync_period: int, groups: tuple[optim.Group, ...], manifest: Manifest
    ) -> None:
        self.sync_period = sync_period
        self._updater = Updater(optimizer, groups, manifest, np.zeros(manifest.element_count))
        self._controls = Controls.begin(optimizer.spec(), groups)

    @property
    def weights(self) -> np.ndarray:
        """float64 of shape [n]. Setting them leaves the moments and the schedule as they are."""
        return self._updater.fast

    @weights.setter
    def weights(self, weights: np.ndarray) -> None:
        self._updater.fast = weights.astype(np.float64)

    def step(self, gradient: np.ndarray, loss: float | None, example_count: int) -> None:
        """Makes one step."""
        self._updater.apply(gradient, self._controls.values())
        self._controls = self._controls.after_step(loss, example_count)


def _local_optimizer(
    optimizer: Any, sync_period: Any, groups: Sequence[optim.Group], manifest: Manifest
) -> _LocalOptimizer | None:
    """The optimizer, if there is one and it can be a local one."""
    if optimizer is None:
        for field, value in (("sync_period", sync_period), ("groups", groups or None)):
            if value is not None:
                raise ValueError(f"{field} is {value!r}: it is for a local optimizer; give one, or leave it out")
        return None
    _check_rule(optimizer)
    sync_period = plain(sync_period)
    check_count("sync_period", sync_period, minimum=1)
    checked = check_groups(groups)
    for lr in (optimizer.lr, *(group.lr for group in checked)):
        if isinstance(lr, optim.Schedule) and lr.tick == "manual":
            raise ValueError(f"lr is {lr!r}: a local schedule ticks with the local steps; leave tick='manual' out")
    return _LocalOptimizer(optimizer, sync_period, checked, manifest)


def _check_rule(optimizer: object) -> None:
    if isinstance(optimizer, optim.Lookahead):
        raise TypeError(
            f"optimizer is {optimizer!r}: give its base optimizer; local steps in a run whose own optimizer is "
            f"SGD(lr={optimizer.alpha}) are this Lookahead"
        )
    if isinstance(optimizer, optim.Optax):
        raise TypeError(
            f"optimizer is {optimizer!r}: only servers have it; give another one of kedge.optim, or make the steps "
            "with optax itself and call step_to()"
        )
    if not isinstance(optimizer, optim.Rule):
        raise TypeError(f"optimizer is {optimizer!r}: give one of kedge.optim, as in optim.AdamW(lr=1e-3)")


def _flat(values: Any, manifest: Manifest) -> np.ndarray:
    """A copy of a tree's leaves, float32 of shape [n].

    Raises:
        KedgeError: TENSOR_MISSING, TENSOR_UNEXPECTED, TENSOR_SHAPE_MISMATCH, UNSUPPORTED_DTYPE.
    """
    arrays = tree.arrays_in_order(values, manifest)
    return np.concatenate([array.reshape(-1).astype(np.float32, copy=False) for array in arrays])
