"""What the checks are made with: a row of the report, runs that are deleted, and a worker that walks."""

import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import numpy as np

from kedge.client import Client
from kedge.errors import NotFoundError, WaitTimeoutError
from kedge.optim import Optimizer
from kedge.policies import Asynchronous, Policy, Synchronous
from kedge.run import Run

ROUNDING = 2.0**-24
"""The largest relative error of one rounding to float32."""

PATIENCE_SECONDS = 30.0
"""How long a round whose contributions are all there may take to become a step."""

ALONE = Synchronous(quorum=1)
AT_ONCE = Asynchronous()


class Row(NamedTuple):
    """One comparison."""

    check: str
    """What is compared."""
    expected: tuple[float, ...]
    got: tuple[float, ...]
    """As many values as are expected."""
    tolerance: float
    """The largest difference of any value that passes; 0: all are to be equal."""

    @property
    def passes(self) -> bool:
        """Whether every value is within the tolerance. What is no number is not."""
        return all(abs(g - e) <= self.tolerance for g, e in zip(self.got, self.expected, strict=True))


def row(check: str, *, expected: Any, got: Any, tolerance: float = 0.0) -> Row:
    """A row from numbers or one-dimensional arrays of them."""
    return Row(check, _floats(expected), _floats(got), float(tolerance))


def _floats(values: Any) -> tuple[float, ...]:
    return tuple(float(value) for value in np.atleast_1d(values))


class Bench:
    """Creates runs under names that nobody else has, and deletes them.

    Attributes:
        client: of the server to be verified.
        full: whether the longer trajectories are wanted.
    """

    def __init__(self, client: Client, *, full: bool) -> None:
        self.client = client
        self.full = full
        self._prefix = f"verify-{uuid.uuid4().hex[:16]}"

    @contextmanager
    def run(self, name: str, params: Any, optimizer: Optimizer, aggregation: Policy = ALONE) -> Iterator[Run]:
        """A run that is deleted when the block ends, however it ends.

        Args:
            name: told apart by it from the other runs of this bench.
            params: the initial weights; float64 becomes float32.
            optimizer: of `kedge.optim`.
            aggregation: each contribution is a step unless told otherwise.
        """
        full_name = f"{self._prefix}-{name}"
        try:
            yield self.client.create_run(
                full_name, params=np.asarray(params, np.float32), optimizer=optimizer, aggregation=aggregation
            )
        finally:
            # Nothing to find if the creation failed. It is tried all the same: its answer alone may have been lost.
            with suppress(NotFoundError):
                self.client.delete_run(full_name)


def walk(
    run: Run, gradient: Callable[[np.ndarray], np.ndarray], stops: Sequence[int]
) -> Iterator[tuple[int, np.ndarray]]:
    """Walks a run that one worker has to itself, and shows the fast weights at some steps.

    A gradient that the server does not apply ends the walk: the weights of all later stops are NaN.

    Args:
        run: at step 0.
        gradient: what to push, given the fast weights as float32.
        stops: steps in ascending order; the walk ends with the last.

    Yields:
        Each stop with its weights.
    """
    with run.join() as worker:
        weights = worker.pull()
        for step in range(1, stops[-1] + 1):
            if np.isfinite(weights).all():
                weights = worker.step(_float32(gradient(weights)))
                if worker.step_number != step:
                    weights = np.full_like(weights, np.nan)
            if step in stops:
                yield step, weights


def pulled(run: Run, step: int) -> np.ndarray:
    """The fast weights once the run has made so many steps; NaN if it does not."""
    try:
        return np.asarray(run.pull(min_step=step, timeout_seconds=PATIENCE_SECONDS))
    except WaitTimeoutError:
        return np.full(run.manifest.element_count, np.nan, np.float32)


def _float32(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # the server refuses what overflows
        return np.asarray(values, np.float32)
