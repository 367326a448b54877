"""A worker's lease and its stream: contributions are sent until their fate is known, also by joining again.

Contributions are numbered, and one that is repeated keeps its number, so that nothing is applied twice whatever is lost
on the way. Between two of a session's operations nothing else happens on its stream: one operation at a time, from
whatever thread. Only its end may come from another one, or from the garbage collector, at any time.
"""

import contextlib
import logging
import weakref
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from kedge.compression import Encoding
from kedge.heartbeat import Waiting, is_lease_lost, start_heartbeats
from kedge.retry import Retrier
from kedge.transport import Channel, Exchange, Lease, PullRequest, Push, PushResult, Transport, WeightsOfStep
from kedge.weights import MAX_WAIT_SECONDS, WAITED_OUT, FastOrSlow, pull_patiently, pull_request
from kedge.wire.errors import InternalError, KedgeError, Retry, UnavailableError
from kedge.wire.manifest import Manifest
from kedge.wire.names import parse_worker

_TOO_LATE = frozenset({"STALE_GRADIENT", "ALREADY_CONTRIBUTED"})
_OUT_OF_TURN = _TOO_LATE | {"AHEAD_OF_BOUND"}

_NEXT_ROUND_SECONDS = 30.0
"""How long `step` waits for the round that it came too late for, before it goes on with the weights that there are."""

_logger = logging.getLogger("kedge")
T = TypeVar("T")

Answer = tuple[PushResult, WeightsOfStep | None]


class Contribution(NamedTuple):
    """A gradient as the worker has it."""

    arrays: Sequence[np.ndarray]
    """In manifest order. They must not change until the operation has ended."""
    base_step: int
    example_count: int
    loss: float | None


class Session:
    """What a worker does with its server. A worker that is forgotten abandons it; it knows nothing of the worker.

    Attributes:
        lease: the present one. It changes when the session joins again.
    """

    lease: Lease

    def __init__(
        self,
        transport: Transport,
        retrier: Retrier,
        lease: Lease,
        *,
        manifest: Manifest,
        encoding: Encoding,
        channel: Channel,
    ) -> None:
        self._transport = transport
        self._retrier = retrier
        self._manifest = manifest
        self._encoding = encoding
        self._channel = channel
        self._exchange: Exchange | None = None
        self._is_closed = False
        self._is_fate_unknown = False
        self._attempt_count = 0  # at the last push, under the present lease
        self._try_count = 0  # of anything, under the present lease
        self._waiting = Waiting()
        self._too_late_count = 0
        self._hold(lease)

    @property
    def name(self) -> str:
        """`runs/{run}/workers/{worker}`."""
        return self.lease.worker

    def pull_request(
        self, weights: FastOrSlow, *, min_step: int | None = None, if_newer_than: int | None = None
    ) -> PullRequest:
        """A request for weights in the dtype that this worker gets them in.

        Raises:
            ValueError: as `kedge.weights.pull_request`.
        """
        dtype = self._encoding.weights_dtype
        return pull_request(weights, dtype=dtype, min_step=min_step, if_newer_than=if_newer_than)

    def pull(self, request: PullRequest, timeout_seconds: float | None) -> WeightsOfStep:
        """Fetches weights; blocks until they are here, or for so long (None: for as long as it takes).

        Raises:
            KedgeError: as `Worker.pull`.
        """
        with self._waiting:
            return pull_patiently(self._pull, request, timeout_seconds)

    def push(self, contribution: Contribution, wait_seconds: float) -> PushResult:
        """Sends a contribution; blocks until the server has it, and so long for its round.

        Raises:
            KedgeError: as `Worker.push`.
        """
        return self._push(contribution, wait_seconds=wait_seconds, pull=None)[0]

    def step(self, contribution: Contribution) -> tuple[PushResult, WeightsOfStep]:
        """Sends a contribution, waits for its round, and fetches the fast weights to go on with.

        Raises:
            KedgeError: as `Worker.step`.
        """
        pull = self.pull_request("fast")._replace(wait_seconds=MAX_WAIT_SECONDS)
        try:
            with self._waiting:
                result, data = self._push(contribution, wait_seconds=MAX_WAIT_SECONDS, pull=pull)
        except KedgeError as error:
            if error.reason != "BASE_STEP_AHEAD":
                raise
            return self._go_back(contribution.base_step, error)
        assert data is not None, "a push that asks for weights is answered with weights"
        if result.outcome == "rejected":
            self._report_rejection(result)
            if result.reason in _TOO_LATE and data.step <= contribution.base_step:
                data = self._pull_next(contribution.base_step) or data
        return result, data

    def close(self) -> None:
        """Ends what is under way with CANCELLED, and gives the lease back. Never fails for want of a server."""
        if self.abandon():
            self._leave()

    def abandon(self) -> bool:
        """Ends what is under way with CANCELLED, and the heartbeats; the answer is whether this call did."""
        if self._is_closed:
            return False
        # First the word, then what there is. What is made meanwhile looks for the word, and ends by itself: no lock,
        # which the garbage collector, within any line, might wait for in vain.
        self._is_closed = True
        self._stop_heartbeats()
        self._drop_exchange()
        return True

    def _push(self, contribution: Contribution, *, wait_seconds: float, pull: PullRequest | None) -> Answer:
        """Sends a contribution until its result is known; one that asks for weights also until there are some."""
        self._check_open()
        if self._is_fate_unknown:
            self._renounce()
        push = Push(
            lease=self.lease,
            sequence=self._sequence,
            base_step=contribution.base_step,
            example_count=contribution.example_count,
            loss=contribution.loss,
            arrays=self._encoding.encode(contribution.arrays),
            dtype=self._encoding.dtype,
            wait_seconds=wait_seconds,
            pull=pull,
        )
        outcome = "unknown"
        try:
            answer = self._send_until_known(push)
            outcome = answer[0].outcome
        finally:
            # What may have been applied counts as taken: what it carried is lost at worst, and never sent twice.
            self._encoding.settle(is_taken=self._is_fate_unknown or outcome in ("applied", "deferred"))
        return answer

    def _send_until_known(self, push: Push) -> Answer:
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
        return answer

    def _ask(self, push: Push) -> Answer | None:
        """Sends a contribution; None if it is recorded and to be sent once more, a repetition that waits anew."""
        try:
            result, data = self._send(push)
        except KedgeError as error:
            if error.reason != "WAITING_FOR_SLOWEST":
                raise
            return None
        return None if push.pull is not None and _is_worth_waiting_for(result) else (result, data)

    def _send(self, push: Push) -> Answer:
        def attempt(exchange: Exchange) -> Answer:
            self._attempt_count += 1
            # Lease and sequence are those of the moment: joining again changes them between two attempts.
            return exchange.push(push._replace(lease=self.lease, sequence=self._sequence))

        return self._on_exchange(attempt)

    def _pull(self, request: PullRequest) -> WeightsOfStep:
        return self._on_exchange(lambda exchange: exchange.pull(self.name, request))

    def _pull_next(self, step: int) -> WeightsOfStep | None:
        """Newer weights than of this step; None if there are none soon, as when the round was refused."""
        try:
            return self.pull(self.pull_request("fast", min_step=step + 1), _NEXT_ROUND_SECONDS)
        except KedgeError as error:
            if error.reason not in WAITED_OUT:
                raise
            return None

    def _go_back(self, base_step: int, error: KedgeError) -> tuple[PushResult, WeightsOfStep]:
        """Leaves out a gradient of weights that the run has gone back behind; pulls those to go on with."""
        data = self.pull(self.pull_request("fast"), None)
        step = int(error.metadata.get("step", data.step))
        message = "%s: the run went back from step %d to step %d: a gradient was left out"
        _logger.warning(message, self.name, base_step, step)
        return PushResult("rejected", error.reason, step, step - base_step, error.message), data

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
        if self._exchange is not None and self._exchange.is_outdated:
            self._drop_exchange()
        exchange = self._exchange or self._open_exchange()
        try:
            return use(exchange)
        except BaseException:
            self._drop_exchange()  # what is left in the stream would be taken for the next answer
            raise

    def _open_exchange(self) -> Exchange:
        exchange = self._transport.open_exchange(self._manifest, self.lease, self._channel)
        self._exchange = exchange
        if self._is_closed:
            self._drop_exchange()
        self._check_open()
        return exchange

    def _drop_exchange(self) -> None:
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            exchange.close()

    def _check_open(self) -> None:
        if self._is_closed:
            raise KedgeError("CANCELLED", "the worker was closed: join the run again")

    def _renounce(self) -> None:
        """Takes a new lease, so that the next push cannot be taken for a repetition of one that may have been lost.

        Raises:
            KedgeError: WORKER_SUPERSEDED if another process has taken this worker's place.
        """
        try:
            self._retrier.call(lambda: self._transport.heartbeat(self.lease))
        except KedgeError as error:
            if not is_lease_lost(error):
                raise
        self._rejoin()
        self._is_fate_unknown = False

    def _rejoin(self) -> None:
        name = parse_worker(self.name)
        self._stop_heartbeats()
        lease = self.lease.lease_seconds
        self._hold(self._retrier.call(lambda: self._transport.join(name.run, name.worker_id, lease)))

    def _hold(self, lease: Lease) -> None:
        self.lease = lease
        self._sequence = 1  # of the next contribution
        self._attempt_count = 0
        self._try_count = 0
        # Called by hand, or when the session is forgotten, or at exit: whichever is first.
        self._stop_heartbeats = weakref.finalize(self, start_heartbeats(self._transport, lease, self._waiting))
        if self._is_closed:  # while it joined again: whoever closed it may have given the earlier lease back
            self._stop_heartbeats()
            self._leave()
        self._check_open()

    def _leave(self) -> None:
        with contextlib.suppress(KedgeError):
            self._transport.leave(self.lease)

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
