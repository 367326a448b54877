"""A worker: pushes gradients to a run and pulls weights from it, under a lease that is renewed in the background.

A worker is used from one thread. What it does with its server is done one operation after the other, in the order in
which it was called for: in the caller's thread, or for the calls that do not wait in one of the worker's own.
"""

import functools
import logging
import operator
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from kedge import optim, tree
from kedge.checks import checked_example_count, checked_loss
from kedge.compression import Encoding
from kedge.pending import Copies, Lane, Outcome, Pending
from kedge.retry import Retrier
from kedge.session import Contribution, Session
from kedge.transport import Channel, Lease, PullRequest, PushResult, Transport
from kedge.weights import FastOrSlow
from kedge.wire.manifest import Manifest

if TYPE_CHECKING:
    from kedge.local import LocalSteps

_logger = logging.getLogger("kedge")
T = TypeVar("T")


class _Weights(NamedTuple):
    """Weights as they came, with what became of the push that they follow."""

    step: int
    tree: Any
    result: PushResult | None = None


class Worker:
    """A data-parallel worker of a run. `Run.join` makes it; use it from one thread.

    `push`, `pull` and `step` block. `push_async`, `pull_async` and `step_async` give a `Pending` at once, while what
    they ask for is done in the background; docs/asynchronous.md says what that is good for. All are done in the order
    of the calls.

    Leaving its `with` block, or `close`, gives the lease back. A worker whose lease ran out, because its process was
    paused or cut off for too long, or ended because the run went back to an earlier state, joins again by itself with
    its next push. A server that is started anew within `retry_seconds` is ridden through.

    Attributes:
        last_result: what became of the last push whose result is known to the caller; None before the first.
    """

    last_result: PushResult | None

    def __init__(
        self,
        transport: Transport,
        retrier: Retrier,
        lease: Lease,
        *,
        manifest: Manifest,
        template: tree.Template,
        encoding: Encoding,
        channel: Channel,
    ) -> None:
        self._manifest = manifest
        self._template = template
        self._session = Session(transport, retrier, lease, manifest=manifest, encoding=encoding, channel=channel)
        self._lane = Lane(lease.worker)
        self._copies = Copies()
        self._step_number: int | None = None
        self.last_result = None
        # A worker that is forgotten leaves nothing behind that works on. At exit both end by themselves.
        weakref.finalize(self, _abandon, self._session, self._lane).atexit = False

    @property
    def name(self) -> str:
        """`runs/{run}/workers/{worker}`."""
        return self._session.name

    @property
    def epoch(self) -> int:
        """The lease's epoch. It grows when the worker joins again."""
        return self._session.lease.epoch

    @property
    def step_number(self) -> int:
        """The step of the fast weights that were last pulled: returned by `pull`, `step`, or a pending's `result`.

        Raises:
            ValueError: before the first pull.
        """
        if self._step_number is None:
            raise ValueError("step_number is not known yet: pull the weights first")
        return self._step_number

    def pull(
        self,
        weights: FastOrSlow = "fast",
        *,
        min_step: int | None = None,
        timeout_seconds: float | None = None,
        if_newer_than: int | None = None,
    ) -> Any:
        """Fetches weights; blocks until they are here.

        Args:
            weights: "fast" to compute gradients with, "slow" to evaluate.
            min_step: wait until the run has reached this step; None takes the weights as they are.
            timeout_seconds: how long to wait for `min_step`, and for fast weights under `kedge.BoundedStaleness` until
                the slowest worker is near enough; None waits as long as it takes.
            if_newer_than: a step; weights of this one or an earlier one are not sent.

        Returns:
            NumPy arrays in the structure of the run's params. Fast weights set `step_number`. None if there is nothing
            newer than `if_newer_than`; `step_number` stays then.

        Raises:
            KedgeError: NO_SLOW_WEIGHTS, STEP_NOT_REACHED, WAITING_FOR_SLOWEST, RUN_NOT_FOUND, SERVER_UNAVAILABLE after
                `retry_seconds`.
        """
        request = self._session.pull_request(weights, min_step=min_step, if_newer_than=if_newer_than)
        self._lane.wait_until_idle()
        return self._take(_pull(self._session, request, timeout_seconds, self._as_tree), weights)

    def pull_async(
        self,
        weights: FastOrSlow = "fast",
        *,
        min_step: int | None = None,
        timeout_seconds: float | None = None,
        if_newer_than: int | None = None,
    ) -> Pending[Any]:
        """Fetches weights in the background. Blocks only while as many as 2 operations are under way.

        Args:
            weights: as for `pull`.
            min_step: as for `pull`.
            timeout_seconds: as for `pull`; counted from when those before it are done.
            if_newer_than: as for `pull`.

        Returns:
            Its `result` is what `pull` returns, and sets `step_number` as `pull` does.

        Raises:
            ValueError: for a step or weights that cannot be. All else is raised by the `result`.
            KedgeError: CANCELLED after `close`.
        """
        request = self._session.pull_request(weights, min_step=min_step, if_newer_than=if_newer_than)
        self._lane.wait_for_room()
        pull = functools.partial(_pull, self._session, request, timeout_seconds, self._as_tree)
        outcome = self._lane.submit(f"pull_async() of {self.name}", pull)
        return Pending(outcome, lambda data: self._take(data, weights))

    def push(
        self,
        grads: Any,
        *,
        loss: float | None = None,
        example_count: int = 1,
        base_step: int | None = None,
        wait_seconds: float = 0.0,
    ) -> PushResult:
        """Sends a gradient; blocks until the server has it and says what became of it.

        Args:
            grads: arrays named and shaped as the run's params, each float32, bfloat16 or float16.
            loss: the loss of these examples, for the record.
            example_count: the number of examples that the gradient is a mean over, >= 1: its weight in the round.
            base_step: the step whose weights produced the gradient; None means `step_number`.
            wait_seconds: how long to wait for the round to close before the outcome is "deferred".

        Returns:
            The outcome with its reason. A rejected gradient is a result and no error. A deferred one stays in its round
            and needs nothing more; pull with a `min_step` to go on after it.

        Raises:
            ValueError: if `base_step` is not given and nothing was pulled before.
            KedgeError: TENSOR_MISSING, TENSOR_UNEXPECTED, TENSOR_SHAPE_MISMATCH, UNSUPPORTED_DTYPE (nothing was sent);
                INVALID_EXAMPLE_COUNT, BASE_STEP_AHEAD (nothing was recorded); WORKER_SUPERSEDED, WORKER_EVICTED;
                RUN_NOT_FOUND; SERVER_UNAVAILABLE after `retry_seconds`.
        """
        contribution = self._contribution(grads, loss=loss, example_count=example_count, base_step=base_step)
        self._lane.wait_until_idle()
        return self._note(self._session.push(contribution, wait_seconds))

    def push_async(
        self,
        grads: Any,
        *,
        loss: float | None = None,
        example_count: int = 1,
        base_step: int | None = None,
        wait_seconds: float = 0.0,
        copy: bool = True,
    ) -> Pending[PushResult]:
        """Sends a gradient in the background. Blocks only while as many as 2 operations are under way.

        Args:
            grads: as for `push`. They are looked at now: what is wrong with them is raised at once.
            loss: as for `push`.
            example_count: as for `push`.
            base_step: as for `push`. None means `step_number` as it is now.
            wait_seconds: as for `push`. What comes after it waits too.
            copy: whether to copy the gradient before returning. Without that its arrays must not change until the
                result is there: for those that never do, as JAX's.

        Returns:
            Its `result` is what `push` returns, and sets `last_result` as `push` does.

        Raises:
            ValueError: as `push`.
            KedgeError: TENSOR_MISSING, TENSOR_UNEXPECTED, TENSOR_SHAPE_MISMATCH, UNSUPPORTED_DTYPE; CANCELLED after
                `close`. All else is raised by the `result`.
        """
        contribution = self._contribution(grads, loss=loss, example_count=example_count, base_step=base_step)
        push = functools.partial(self._session.push, wait_seconds=wait_seconds)
        return Pending(self._submit("push_async()", contribution, push, copy=copy), self._note)

    def step(self, grads: Any, *, loss: float | None = None, example_count: int = 1) -> Any:
        """Pushes a gradient, waits for its round, and pulls what came of it: one round trip.

        The gradient must be of the weights that were last pulled. If it came too late for its round, or the run does
        not take it, it is left out (`last_result` says so) and there are newer or the same weights to go on with. If
        the run went back behind the gradient's weights, to a checkpoint or because its server lost the last steps, it
        is left out too (BASE_STEP_AHEAD), and there are the older weights to go on with. Under `kedge.BoundedStaleness`
        it waits for workers that are too far behind; under `kedge.Buffered` for nobody.

        Args:
            grads: as for `push`.
            loss: as for `push`.
            example_count: as for `push`.

        Returns:
            Fast weights in the structure of the run's params; `step_number` is their step.

        Raises:
            ValueError: if nothing was pulled before.
            KedgeError: as `push`, but BASE_STEP_AHEAD.

        Example:
            >>> with run.join() as worker:
            ...     weights = worker.pull()
            ...     for batch in batches:
            ...         loss, grads = value_and_grad(weights, batch)
            ...         weights = worker.step(grads, loss=loss, example_count=len(batch))
        """
        contribution = self._contribution(grads, loss=loss, example_count=example_count, base_step=None)
        self._lane.wait_until_idle()
        return self._take(_step(contribution, self._session, self._as_tree))

    def step_async(
        self,
        grads: Any,
        *,
        loss: float | None = None,
        example_count: int = 1,
        base_step: int | None = None,
        copy: bool = True,
    ) -> Pending[Any]:
        """Makes a step in the background. Blocks only while as many as 2 operations are under way.

        Send a gradient before you take newer weights: without a `base_step` it is of those that were taken last. A
        gradient that is computed meanwhile is one step old when it arrives: docs/asynchronous.md says which policies
        take it.

        Args:
            grads: as for `step`. They are looked at now: what is wrong with them is raised at once.
            loss: as for `step`.
            example_count: as for `step`.
            base_step: the step whose weights produced the gradient; None means `step_number` as it is now.
            copy: as for `push_async`.

        Returns:
            Its `result` is what `step` returns, and sets `step_number` and `last_result` as `step` does.

        Raises:
            ValueError: as `push`.
            KedgeError: as `push_async`.

        Example:
            >>> with run.join() as worker:
            ...     pending = worker.pull_async()
            ...     weights = pending.result()
            ...     for batch in batches:
            ...         loss, grads = value_and_grad(weights, batch)
            ...         sent = worker.step_async(grads, loss=loss, example_count=len(batch))
            ...         weights = pending.result()  # of the step before, while this one is under way
            ...         pending = sent
            ...     weights = pending.result()
        """
        contribution = self._contribution(grads, loss=loss, example_count=example_count, base_step=base_step)
        step = functools.partial(_step, session=self._session, as_tree=self._as_tree)
        return Pending(self._submit("step_async()", contribution, step, copy=copy), self._take)

    def local_steps(
        self,
        optimizer: optim.Rule | None = None,
        *,
        sync_period: int | None = None,
        groups: Sequence[optim.Group] = (),
    ) -> "LocalSteps":
        """Training with few messages: steps that this worker makes by itself, and exchanges with the server at times.

        What the local steps came to is pushed as one gradient, the weights that were pulled less the weights now. The
        run's optimizer takes a step along it: with `SGD(lr=1.0)` the run has the mean of its workers' weights.

        Args:
            optimizer: of `kedge.optim`, but neither Lookahead nor Optax; it runs in NumPy within this process. None if
                the local steps are made elsewhere: see `LocalSteps.step_to`.
            sync_period: the local steps from one exchange to the next, >= 1.
            groups: tensors with hyperparameters of their own in the local steps.

        Returns:
            What to pull and to step with in place of this worker.

        Raises:
            ValueError, TypeError: for arguments that cannot be; the message names them.

        Example:
            >>> with run.join() as worker:
            ...     local = worker.local_steps(optim.AdamW(lr=1e-3), sync_period=20)
            ...     weights = local.pull()
            ...     for batch in batches:
            ...         loss, grads = value_and_grad(weights, batch)
            ...         weights = local.step(grads, loss=loss, example_count=len(batch))
            ...     weights = local.flush()
        """
        from kedge.local import LocalSteps

        return LocalSteps(
            self, self._manifest, self._template, optimizer=optimizer, sync_period=sync_period, groups=groups
        )

    def close(self) -> None:
        """Gives the lease back and ends the heartbeats. May be called twice; never fails for want of a server.

        It waits for nothing: what is under way in the background ends with CANCELLED, and whether such a gradient
        counts nobody knows. Take the last `Pending`'s result before.
        """
        ended = self._lane.close()
        if ended:
            _logger.warning("%s: closed while %d of its calls were under way in the background", self.name, ended)
        self._session.close()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<kedge.Worker {self.name} epoch={self.epoch} step_number={self._step_number}>"

    def _contribution(
        self, grads: Any, *, loss: float | None, example_count: int, base_step: int | None
    ) -> Contribution:
        """The contribution, checked as far as it can be without the server."""
        base = self._step_number if base_step is None else operator.index(base_step)
        if base is None:
            raise ValueError("no weights were pulled yet: call pull() first, or give push() the gradient's base_step")
        if not 0 <= base < 1 << 63:
            raise ValueError(f"base_step is {base}: it must be 0 to 2**63 - 1")
        return Contribution(
            arrays=tree.arrays_in_order(grads, self._manifest),
            base_step=base,
            example_count=checked_example_count(example_count),
            loss=checked_loss(loss),
        )

    def _submit(
        self, call: str, contribution: Contribution, send: Callable[[Contribution], T], *, copy: bool
    ) -> Outcome[T]:
        """Sends a contribution in the background, when there is room."""
        self._lane.wait_for_room()
        if copy:
            contribution = contribution._replace(arrays=self._copies.of(contribution.arrays))
            send = functools.partial(_send_copy, self._copies, send)
        what = f"{call} of {self.name} with a gradient of step {contribution.base_step}"
        return self._lane.submit(what, functools.partial(send, contribution))

    @property
    def _as_tree(self) -> Callable[[np.ndarray], Any]:
        """From what was pulled to what the caller gets. It holds no reference to the worker."""
        return functools.partial(_as_tree, self._template, self._manifest)

    def _take(self, weights: _Weights | None, kind: FastOrSlow = "fast") -> Any:
        """Hands weights to the caller, and takes note of it; None if there were none to hand over."""
        if weights is None:
            return None
        if kind == "fast":
            self._step_number = weights.step
        if weights.result is not None:
            self._note(weights.result)
        return weights.tree

    def _note(self, result: PushResult) -> PushResult:
        self.last_result = result
        return result


# What may run in the background, and so knows no worker.


def _pull(
    session: Session, request: PullRequest, timeout_seconds: float | None, as_tree: Callable[[np.ndarray], Any]
) -> _Weights | None:
    data = session.pull(request, timeout_seconds)
    return None if data.flat is None else _Weights(data.step, as_tree(data.flat))


def _step(contribution: Contribution, session: Session, as_tree: Callable[[np.ndarray], Any]) -> _Weights:
    result, data = session.step(contribution)
    assert data.flat is not None, "it was not asked for newer ones only"
    return _Weights(data.step, as_tree(data.flat), result)


def _send_copy(copies: Copies, send: Callable[[Contribution], T], contribution: Contribution) -> T:
    answer = send(contribution)
    copies.give_back(contribution.arrays)  # not after a failure: a stream that has failed may still be reading
    return answer


def _as_tree(template: tree.Template, manifest: Manifest, flat: np.ndarray) -> Any:
    return template.fill(tree.split_flat(flat, manifest))


def _abandon(session: Session, lane: Lane) -> None:
    lane.close()
    session.abandon()
