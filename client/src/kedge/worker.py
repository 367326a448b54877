"""A worker: pushes gradients to a run and pulls weights from it, under a lease that is renewed in the background.

A worker is used from one thread; only its heartbeats come from another. Its pushes are numbered, and a push that is
repeated keeps its number, so that nothing is applied twice whatever is lost on the way.
"""

import contextlib
import logging
import operator
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from kedge import optim, tree
from kedge.checks import checked_example_count, checked_loss
from kedge.heartbeat import Waiting, is_lease_lost, start_heartbeats
from kedge.retry import Retrier
from kedge.transport import Exchange, Lease, PullRequest, Push, PushResult, Transport, WeightsOfStep
from kedge.weights import MAX_WAIT_SECONDS, WAITED_OUT, FastOrSlow, pull_patiently, pull_request
from kedge.wire.errors import InternalError, KedgeError, Retry, UnavailableError
from kedge.wire.manifest import Manifest
from kedge.wire.names import parse_worker

if TYPE_CHECKING:
    from kedge.local import LocalSteps

_TOO_LATE = frozenset({"STALE_GRADIENT", "ALREADY_CONTRIBUTED"})
_OUT_OF_TURN = _TOO_LATE | {"AHEAD_OF_BOUND"}

_NEXT_ROUND_SECONDS = 30.0
"""How long `step` waits for the round that it came too late for, before it goes on with the weights that there are."""

_logger = logging.getLogger("kedge")
T = TypeVar("T")


class Worker:
    """A data-parallel worker of a run. `Run.join` makes it; use it from one thread.

    Leaving its `with` block, or `close`, gives the lease back. A worker whose lease ran out, because its process was
    paused or cut off for too long, or ended because the run went back to an earlier state, joins again by itself with
    its next push. A server that is started anew within `retry_seconds` is ridden through.

    Attributes:
        last_result: what became of the last push; None before the first.
    """

    def __init__(
        self,
        transport: Transport,
        retrier: Retrier,
        lease: Lease,
        *,
        manifest: Manifest,
        template: tree.Template,
        wire_dtype: str,
    ) -> None:
        self._transport = transport
        self._retrier = retrier
        self._manifest = manifest
        self._template = template
        self._wire_dtype = wire_dtype
        self._exchange: Exchange | None = None
        self._is_closed = False
        self._is_fate_unknown = False
        self._attempt_count = 0  # at the last push, under the present lease
        self._try_count = 0  # of anything, under the present lease
        self._waiting = Waiting()
        self._too_late_count = 0
        self._step_number: int | None = None
        self.last_result: PushResult | None = None
        self._hold(lease)

    @property
    def name(self) -> str:
        """`runs/{run}/workers/{worker}`."""
        return self._lease.worker

    @property
    def epoch(self) -> int:
        """The lease's epoch. It grows when the worker joins again."""
        return self._lease.epoch

    @property
    def step_number(self) -> int:
        """The step of the fast weights that were last pulled.

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
        request = pull_request(weights, dtype=self._wire_dtype, min_step=min_step, if_newer_than=if_newer_than)
        with self._waiting:
            data = pull_patiently(self._pull, request, timeout_seconds)
        if data.flat is None:
            return None
        return self._take(data) if weights == "fast" else self._as_tree(data)

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
        push = self._contribution(grads, loss=loss, example_count=example_count, base_step=base_step)
        return self._push(push._replace(wait_seconds=wait_seconds))[0]

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
        push = self._contribution(grads, loss=loss, example_count=example_count, base_step=None)
        pull = PullRequest(dtype=self._wire_dtype, wait_seconds=MAX_WAIT_SECONDS)
        try:
            with self._waiting:
                result, data = self._push(push._replace(wait_seconds=MAX_WAIT_SECONDS, pull=pull))
        except KedgeError as error:
            if error.reason != "BASE_STEP_AHEAD":
                raise
            return self._go_back(push.base_step, error)
        assert data is not None, "a push that asks for weights is answered with weights"
        if result.outcome == "rejected":
            self._report_rejection(result)
            if result.reason in _TOO_LATE and data.step <= push.base_step:
                data = self._pull_next(push.base_step) or data
        return self._take(data)

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
        """Gives the lease back and ends the heartbeats. May be called twice; never fails for want of a server."""
        if self._is_closed:
            return
        self._is_closed = True
        self._stop_heartbeats()
        self._drop_exchange()
        with contextlib.suppress(KedgeError):
            self._transport.leave(self._lease)

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<kedge.Worker {self.name} epoch={self.epoch} step_number={self._step_number}>"

    def _contribution(self, grads: Any, *, loss: float | None, example_count: int, base_step: int | None) -> Push:
        """The contribution, checked as far as it can be without the server."""
        base = self._step_number if base_step is None else operator.index(base_step)
        if base is None:
            raise ValueError("no weights were pulled yet: call pull() first, or give push() the gradient's base_step")
        if not 0 <= base < 1 << 63:
            raise ValueError(f"base_step is {base}: it must be 0 to 2**63 - 1")
        return Push(
            lease=self._lease,
            sequence=self._sequence,
            base_step=base,
            example_count=checked_example_count(example_count),
            loss=checked_loss(loss),
            arrays=tree.arrays_in_order(grads, self._manifest),
            dtype=self._wire_dtype,
            wait_seconds=0.0,
            pull=None,
        )

    def _push(self, push: Push) -> tuple[PushResult, WeightsOfStep | None]:
        """Sends a contribution until its result is known; one that asks for weights also until there are some."""
        self._check_open()
        if self._is_fate_unknown:
            self._renounce()
        self._is_fate_unknown = True
        self._attempt_count = 0
        try:
            answer = self._ask(push)
        except KedgeError as error:
            self._is_fate_unknown = not _says_nothing_recorded(error)
            raise
        while answer is None:
            answer = self._ask(push)
        self._is_fate_unknown = False
        self._sequence += 1
        self.last_result = answer[0]
        return answer

    def _ask(self, push: Push) -> tuple[PushResult, WeightsOfStep | None] | None:
        """Sends a contribution; None if it is recorded and to be sent once more, a repetition that waits anew."""
        try:
            result, data = self._send(push)
        except KedgeError as error:
            if error.reason != "WAITING_FOR_SLOWEST":
                raise
            return None
        return None if push.pull is not None and _is_worth_waiting_for(result) else (result, data)

    def _send(self, push: Push) -> tuple[PushResult, WeightsOfStep | None]:
        def attempt(exchange: Exchange) -> tuple[PushResult, WeightsOfStep | None]:
            self._attempt_count += 1
            # Lease and sequence are those of the moment: joining again changes them between two attempts.
            return exchange.push(push._replace(lease=self._lease, sequence=self._sequence))

        return self._on_exchange(attempt)

    def _pull(self, request: PullRequest) -> WeightsOfStep:
        return self._on_exchange(lambda exchange: exchange.pull(self.name, request))

    def _pull_next(self, step: int) -> WeightsOfStep | None:
        """Newer weights than of this step; None if there are none soon, as when the round was refused."""
        request = pull_request("fast", dtype=self._wire_dtype, min_step=step + 1)
        try:
            with self._waiting:
                return pull_patiently(self._pull, request, _NEXT_ROUND_SECONDS)
        except KedgeError as error:
            if error.reason not in WAITED_OUT:
                raise
            return None

    def _go_back(self, base_step: int, error: KedgeError) -> Any:
        """Leaves out a gradient of weights that the run has gone back behind; pulls those to go on with."""
        weights = self.pull()
        step = int(error.metadata.get("step", self.step_number))
        self.last_result = PushResult("rejected", error.reason, step, step - base_step, error.message)
        message = "%s: the run went back from step %d to step %d: a gradient was left out"
        _logger.warning(message, self.name, base_step, step)
        return weights

    def _on_exchange(self, use: Callable[[Exchange], T]) -> T:
        """Does something on the stream, again if need be; after joining again if the lease is lost.

        A lease that is lost at once when it was just taken is an error; after a failure between it may be lost again.
        """
        has_joined = False
        while True:
            try:
                return self._retrier.call(lambda: self._attempt(use))
            except KedgeError as error:
                # What became of an earlier attempt is not known where the whole epoch is forgotten.
                is_unknown = error.reason == "EPOCH_FORGOTTEN" and self._attempt_count > 1
                is_lost = is_lease_lost(error) or _has_gone_back(error)
                if is_unknown or not is_lost or (has_joined and self._try_count == 1):
                    raise
                _logger.info("%s: joining again: %s", self.name, error)
            self._rejoin()
            has_joined = True

    def _attempt(self, use: Callable[[Exchange], T]) -> T:
        self._check_open()
        self._try_count += 1
        if self._exchange is None:
            self._exchange = self._transport.open_exchange(self._manifest)
        try:
            return use(self._exchange)
        except BaseException:
            self._drop_exchange()  # what is left in the stream would be taken for the next answer
            raise

    def _report_rejection(self, result: PushResult) -> None:
        if result.reason not in _OUT_OF_TURN:
            _logger.warning("%s: a gradient was left out: %s [%s]", self.name, result.message, result.reason)
            return
        # Coming too late now and then is what backup workers are for, so it is said at 10, 100, 1000, ... only.
        self._too_late_count += 1
        if self._too_late_count >= 10 and str(self._too_late_count).strip("0") == "1":
            count, last = self._too_late_count, result.message
            _logger.warning(
                "%s: %d gradients came too late or too early so far; the last one: %s", self.name, count, last
            )

    def _check_open(self) -> None:
        if self._is_closed:
            raise KedgeError("CANCELLED", "the worker was closed: join the run again")

    def _drop_exchange(self) -> None:
        if self._exchange is not None:
            self._exchange.close()
            self._exchange = None

    def _renounce(self) -> None:
        """Takes a new lease, so that the next push cannot be taken for a repetition of one that may have been lost.

        Raises:
            KedgeError: WORKER_SUPERSEDED if another process has taken this worker's place.
        """
        try:
            self._retrier.call(lambda: self._transport.heartbeat(self._lease))
        except KedgeError as error:
            if not is_lease_lost(error):
                raise
        self._rejoin()
        self._is_fate_unknown = False

    def _rejoin(self) -> None:
        name = parse_worker(self.name)
        self._stop_heartbeats()
        lease = self._lease.lease_seconds
        self._hold(self._retrier.call(lambda: self._transport.join(name.run, name.worker_id, lease)))

    def _hold(self, lease: Lease) -> None:
        self._lease = lease
        self._sequence = 1  # of the next contribution
        self._attempt_count = 0
        self._try_count = 0
        # Called by hand, or when the worker is forgotten, or at exit: whichever is first.
        self._stop_heartbeats = weakref.finalize(self, start_heartbeats(self._transport, lease, self._waiting))

    def _take(self, data: WeightsOfStep) -> Any:
        self._step_number = data.step
        return self._as_tree(data)

    def _as_tree(self, data: WeightsOfStep) -> Any:
        assert data.flat is not None, "it was looked at before"
        return self._template.fill(tree.split_flat(data.flat, self._manifest))


def _says_nothing_recorded(error: KedgeError) -> bool:
    """Whether the error is the server's word on this contribution. Of an answer that was lost it is none."""
    is_unknown = error.reason == "EPOCH_FORGOTTEN" or error.entry.retry is Retry.BACKOFF
    return not is_unknown and not issubclass(error.entry.exception, InternalError | UnavailableError)


def _has_gone_back(error: KedgeError) -> bool:
    """Whether the server knows fewer of this lease's contributions than it has answered."""
    if error.reason != "SEQUENCE_GAP":
        return False
    expected, got = (error.metadata.get(key, "") for key in ("expected", "got"))
    return expected.isdecimal() and got.isdecimal() and int(expected) < int(got)


def _is_worth_waiting_for(result: PushResult) -> bool:
    """Whether the round is one that workers wait for: a buffer is filled by whoever comes, maybe by this one alone."""
    return result.outcome == "deferred" and result.reason != "BUFFERED"
