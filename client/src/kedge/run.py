"""A run on a server: its weights, its settings, its workers and its events."""

import operator
import os
import re
import socket
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from kedge import optim, policies, tree
from kedge.compression import Encoding, TopK, encoding_of
from kedge.optim._checks import plain
from kedge.optim.controls import Change
from kedge.optim.groups import check_changes
from kedge.optim.schedules.base import check_epoch
from kedge.retry import Retrier
from kedge.settings import check_admission, check_aggregation, checked_metrics
from kedge.transport import (
    Channel,
    Checkpoint,
    Lease,
    PullRequest,
    RunInfo,
    RunStatus,
    RunUpdate,
    Transport,
    WatchStart,
    WeightsOfStep,
)
from kedge.watch import Watch
from kedge.weights import FastOrSlow, pull_patiently, pull_request
from kedge.wire.compressed import check_safe
from kedge.wire.manifest import Manifest
from kedge.wire.names import (
    CheckpointName,
    WorkerName,
    check_checkpoint_id,
    check_id,
    parse_checkpoint,
    parse_run,
    parse_worker,
    run_name,
)
from kedge.worker import Worker

_TRANSPORTS = ("auto", "grpc", "shared_memory")
_MAX_CAUSE_LENGTH = 256


@dataclass(frozen=True)
class Snapshot:
    """Weights of one step, in the structure of the run's params.

    Attributes:
        step: the step that they are of.
        fast: the fast weights; None if only the slow ones were asked for.
        slow: the slow weights; None without Lookahead, or if only the fast ones were asked for.
    """

    step: int
    fast: Any
    slow: Any


class Run:
    """A run that a server holds. A client makes it; it may be used from any thread.

    Attributes:
        name: `runs/{run}`.
        manifest: its tensors in order.
        optimizer: as it was created.
        aggregation: how contributions become steps, as of the moment when the run was opened or this object changed it.
        admission: which gradients it takes, as of the same moment.
        groups: its parameter groups, as it was created.
        durability: what an acknowledged push survives, as it was created.
    """

    def __init__(
        self, transport: Transport, retrier: Retrier, info: RunInfo, *, manifest: Manifest, template: tree.Template
    ) -> None:
        self._transport = transport
        self._retrier = retrier
        self._template = template
        self.name = info.name
        self.manifest = manifest
        self.optimizer = info.optimizer
        self.aggregation = info.aggregation
        self.admission = info.admission
        self.groups = info.groups
        self.durability = info.durability

    @property
    def id(self) -> str:
        """The {run} of `runs/{run}`."""
        return parse_run(self.name)

    def join(
        self,
        name: str | None = None,
        *,
        wire_dtype: str | TopK = "float32",
        weights_dtype: str | None = None,
        transport: str = "auto",
        lease_seconds: float | None = None,
    ) -> Worker:
        """Joins as a worker: takes a lease, and renews it in the background until the worker is closed.

        Args:
            name: the worker's id, unique in the run: whoever joins under a name that is taken supersedes its holder.
                None makes one of the host's name, the process and a random part.
            wire_dtype: what gradients are sent as: "float32", "bfloat16" or "float16"; or compressed, with what is left
                out sent later: "int8", "sign" or `kedge.TopK(fraction)`.
            weights_dtype: what weights are sent as: "float32", "bfloat16" or "float16"; None: as gradients are, and
                "bfloat16" where these are compressed.
            transport: what carries gradients and weights. "shared_memory" lends memory of this process to a server on
                the same host and of the same user: nothing else is as fast. "grpc" goes over the network. "auto" takes
                shared memory where that can be had and both are sent as float32, and gRPC elsewhere; the values are the
                same to the last bit.
            lease_seconds: how long the server counts on the worker without hearing of it, within the server's limits;
                None takes its default.

        Raises:
            ValueError: for another wire_dtype, weights_dtype or transport, for "shared_memory" with another dtype than
                float32, or for a lease that is not greater than 0.
            KedgeError: INVALID_NAME, RUN_NOT_FOUND, TOO_MANY_WORKERS, SERVER_UNAVAILABLE; COMPRESSION_UNSAFE for
                "sign" with AdaBelief that has no `max_direction`. With the transport "shared_memory" the worker's first
                call raises SHARED_MEMORY_UNAVAILABLE where there is none.
        """
        encoding = encoding_of(wire_dtype, weights_dtype)
        channel = _channel(transport, encoding)
        _check_join(lease_seconds)
        check_safe(self.optimizer, encoding.dtype)
        # Never left to the server, so that a repeated attempt replaces the first one instead of standing beside it.
        worker_id = _new_worker_id() if name is None else check_id(name, what="worker")
        lease: Lease = self._retrier.call(lambda: self._transport.join(self.name, worker_id, lease_seconds))
        return Worker(
            self._transport,
            self._retrier,
            lease,
            manifest=self.manifest,
            template=self._template,
            encoding=encoding,
            channel=channel,
        )

    def pull(
        self,
        weights: FastOrSlow = "fast",
        *,
        min_step: int | None = None,
        timeout_seconds: float | None = 60.0,
        if_newer_than: int | None = None,
    ) -> Any:
        """Fetches weights without a lease; blocks until they are here.

        Args:
            weights: "fast" or "slow". Slow weights are the ones to evaluate and deploy.
            min_step: wait until the run has reached this step; None takes the weights as they are.
            timeout_seconds: how long to wait for `min_step`; None waits as long as it takes.
            if_newer_than: a step; weights of this one or an earlier one are not sent.

        Returns:
            NumPy arrays in the structure of the run's params, not shared with anyone; None if there is nothing newer
            than `if_newer_than`.

        Raises:
            KedgeError: NO_SLOW_WEIGHTS, STEP_NOT_REACHED, RUN_NOT_FOUND, SERVER_UNAVAILABLE.
        """
        request = pull_request(weights, min_step=min_step, if_newer_than=if_newer_than)
        data = pull_patiently(self._pull, request, timeout_seconds)
        return None if data.flat is None else self._template.fill(tree.split_flat(data.flat, self.manifest))

    def snapshot(self, weights: FastOrSlow | None = None) -> Snapshot:
        """Fetches weights with the step that they are of.

        Args:
            weights: "fast" or "slow" for one of them; None for all there are, both of the same step.

        Raises:
            KedgeError: NO_SLOW_WEIGHTS, RUN_NOT_FOUND, SERVER_UNAVAILABLE.
        """
        has_both = weights is None and self.optimizer.spec().sync_period is not None
        kinds = ("fast", "slow") if has_both else (weights or "fast",)
        data = self._pull(PullRequest("fast_and_slow") if has_both else pull_request(kinds[0]))
        assert data.flat is not None, "a pull without a condition is answered with weights"
        parts = data.flat.reshape(len(kinds), self.manifest.element_count)
        trees = {
            kind: self._template.fill(tree.split_flat(part, self.manifest))
            for kind, part in zip(kinds, parts, strict=True)
        }
        return Snapshot(data.step, trees.get("fast"), trees.get("slow"))

    def info(self) -> RunInfo:
        """What the server says of the run now, without its manifest.

        Raises:
            KedgeError: RUN_NOT_FOUND, SERVER_UNAVAILABLE.
        """
        return self._retrier.call(lambda: self._transport.get_run(self.name, with_manifest=False))

    def status(self) -> RunStatus:
        """Where the run stands now.

        Raises:
            KedgeError: RUN_NOT_FOUND, SERVER_UNAVAILABLE.
        """
        return self.info().status

    def set_hyperparameters(
        self,
        *,
        group: str = "",
        lr: float | optim.Schedule | None = None,
        weight_decay: float | None = None,
        grad_clip_norm: float | None = None,
        grad_clip_value: float | None = None,
    ) -> int:
        """Changes hyperparameters while the run goes on. The moments stay, and the update is not compiled anew.

        What is None stays. A change that changes nothing is not recorded, so every worker may make it. `info().changes`
        lists those that were made.

        Args:
            group: the name of a parameter group; "" for the run and every group without a value of its own.
            lr: a rate, or a schedule, which begins at its first tick.
            weight_decay: of the kind that the optimizer has: coupled, or decoupled as in AdamW.
            grad_clip_norm: greater than 0; math.inf switches it off.
            grad_clip_value: greater than 0; math.inf switches it off.

        Returns:
            The number of the next step to be made, which is made with it.

        Raises:
            ValueError, TypeError: for what can be no hyperparameter; the message names it.
            KedgeError: INVALID_CONFIGURATION for a group that the run does not have; RUN_NOT_FOUND, SERVER_UNAVAILABLE.
        """
        change = Change(*check_changes(lr, weight_decay, grad_clip_norm, grad_clip_value))
        if not isinstance(group, str):
            raise TypeError(f'group is {group!r}: give the name of a group, or "" for the run')
        request_id = uuid.uuid4().hex
        return self._retrier.call(
            lambda: self._transport.set_hyperparameters(self.name, group, change, request_id=request_id)
        )

    def tick_schedule(self, *, group: str = "", to: int | None = None) -> int:
        """Ticks a schedule that was made with `tick="manual"`: what `scheduler.step()` is elsewhere.

        Without `to` every call is one tick, whoever makes it: let one worker do so. With `to`, all may.

        Args:
            group: the name of a parameter group that has a rate of its own; "" for the run's.
            to: the tick to be at, if it is not reached yet; None for one more.

        Returns:
            The ticks so far.

        Raises:
            KedgeError: INVALID_CONFIGURATION where no schedule ticks by hand; RUN_NOT_FOUND, SERVER_UNAVAILABLE.
        """
        to = plain(to)
        if to is not None:
            check_epoch("to", to)
        request_id = uuid.uuid4().hex
        return self._retrier.call(lambda: self._transport.tick_schedule(self.name, group, to=to, request_id=request_id))

    def set_aggregation(self, aggregation: policies.Policy) -> int:
        """Changes how contributions become steps, while the run goes on.

        The round that is open ends: what it holds becomes one step the way the old aggregation says, or is rejected as
        COHORT_TOO_SMALL if a trimmed mean or a median has too few. Whatever arrives from then on is judged by the new
        one. What the run has already changes nothing, so every worker may call this.

        Args:
            aggregation: as for `Client.create_run`.

        Returns:
            The number of the next step to be made, the first that the new aggregation may make.

        Raises:
            TypeError: for what is no aggregation.
            KedgeError: INVALID_CONFIGURATION, RUN_TOO_LARGE if the server has no room for so large a round, or for so
                many workers as the quorum; RUN_NOT_FOUND, SERVER_UNAVAILABLE.

        Example:
            >>> run.set_aggregation(kedge.BoundedStaleness(bound=4))
        """
        check_aggregation(aggregation)
        step = self._update(RunUpdate(aggregation=aggregation))
        self.aggregation = aggregation
        return step

    def set_admission(self, admission: policies.Admission) -> int:
        """Changes which gradients the run takes, from the next that arrives.

        Args:
            admission: as a whole: what is left out of it has its default.

        Returns:
            The number of the next step to be made.

        Raises:
            TypeError: for what is no admission.
            KedgeError: INVALID_CONFIGURATION, RUN_NOT_FOUND, SERVER_UNAVAILABLE.
        """
        check_admission(admission)
        step = self._update(RunUpdate(admission=admission))
        self.admission = admission
        return step

    def evict(self, worker: str, cause: str = "", *, block_seconds: float | None = None) -> None:
        """Sends a worker away: its lease ends, and what it sends from then on fails with WORKER_EVICTED.

        What it has contributed stays.

        Args:
            worker: its id, "w1", or its full name.
            cause: why, for the worker to read; up to 256 characters.
            block_seconds: for how long nobody may join under its name; None: a new process may at once.

        Raises:
            ValueError, TypeError: for a worker of another run, a longer cause, or a time that is not above 0.
            KedgeError: WORKER_NOT_FOUND if it holds no lease; INVALID_NAME, RUN_NOT_FOUND, SERVER_UNAVAILABLE.
        """
        name = self._worker_name(worker)
        _check_eviction(cause, block_seconds)
        request_id = uuid.uuid4().hex
        self._retrier.call(lambda: self._transport.evict(name, cause, block_seconds, request_id=request_id))

    def watch(self, *, from_step: int | None = None, after_number: int | None = None) -> Watch:
        """Tells what happens to the run, as it happens: steps, lookahead syncs, workers, rejections, changes.

        Blocks until the server has begun to watch: nothing that happens after the call is missed.

        Args:
            from_step: begin with the events of this step, as far as they are kept.
            after_number: begin after the event of this number. With neither, begin now.

        Returns:
            An iterator of `kedge.Event` in order, to be closed or used in a `with` block. Where events are no longer
            kept, or were read too slowly, one event of kind "summary" stands for them.

        Raises:
            ValueError, TypeError: for both, or for what is no whole number >= 0.
            KedgeError: RUN_NOT_FOUND, TOO_MANY_STREAMS, SERVER_UNAVAILABLE.

        Example:
            >>> with run.watch() as events:
            ...     for event in events:
            ...         print(event.step, event.kind, event.worker, event.message)
        """
        if from_step is not None and after_number is not None:
            raise ValueError("from_step and after_number are both given: give one of them")
        start = WatchStart(_checked_number("from_step", from_step), _checked_number("after_number", after_number))
        return Watch(self._transport, self._retrier, self.name, start)

    def checkpoint(self, metrics: Mapping[str, float] | None = None) -> Checkpoint:
        """Takes a checkpoint of the run's present step; blocks until it is safe from loss of power.

        Steps go on meanwhile. Without metrics, one that there is of this step already is answered.

        Args:
            metrics: measures of the weights, for `Checkpoints.metric` and for people: up to 32 finite numbers.

        Raises:
            ValueError, TypeError: for what can be no metrics.
            KedgeError: DURABILITY_UNAVAILABLE if the run is kept in memory; STORAGE_FULL, STORAGE_UNAVAILABLE,
                RUN_NOT_FOUND, SERVER_UNAVAILABLE.

        Example:
            >>> run.checkpoint({"accuracy": accuracy(run.pull("slow"))})
        """
        numbers = checked_metrics(metrics)
        return self._retrier.call(lambda: self._transport.create_checkpoint(self.name, numbers))

    def checkpoints(self) -> list[Checkpoint]:
        """The run's checkpoints, newest first; none if it is kept in memory.

        Raises:
            KedgeError: RUN_NOT_FOUND, SERVER_UNAVAILABLE.
        """
        return self._retrier.call(lambda: self._transport.list_checkpoints(self.name))

    def restore(self, checkpoint: Checkpoint | str) -> int:
        """Lets the run go on from one of its checkpoints: weights, optimizer state, schedules and counters.

        The open round is refused and all leases end. Workers join again by themselves: their `step` leaves out the
        gradient that it has, and returns the weights of the checkpoint.

        Args:
            checkpoint: as `checkpoint` or `checkpoints` returned it, its name or its id.

        Returns:
            The step that the run goes on from.

        Raises:
            ValueError, TypeError: for a checkpoint of another run, or what is none.
            KedgeError: CHECKPOINT_NOT_FOUND, CHECKPOINT_DAMAGED, DURABILITY_UNAVAILABLE: nothing has changed;
                INVALID_NAME, RUN_NOT_FOUND, SERVER_UNAVAILABLE.
        """
        name, request_id = self._checkpoint_name(checkpoint), uuid.uuid4().hex
        return self._retrier.call(lambda: self._transport.restore_checkpoint(name, request_id=request_id))

    def fork(self, checkpoint: Checkpoint | str, run_id: str) -> "Run":
        """Creates another run that begins where a checkpoint is, with all settings of this one and no workers.

        Args:
            checkpoint: as for `restore`.
            run_id: "digits-2" or "runs/digits-2".

        Returns:
            The new run. What is pulled from it has the structure that this one's has.

        Raises:
            ValueError, TypeError, KedgeError: as `restore`; RUN_ALREADY_EXISTS, TOO_MANY_RUNS.
        """
        name, request_id, new = self._checkpoint_name(checkpoint), uuid.uuid4().hex, parse_run(run_name(run_id))
        info = self._retrier.call(lambda: self._transport.fork_checkpoint(name, new, request_id=request_id))
        return Run(self._transport, self._retrier, info, manifest=self.manifest, template=self._template)

    def delete(self) -> None:
        """Deletes the run, as `Client.delete_run` does."""
        self._retrier.call(lambda: self._transport.delete_run(self.name))

    def __repr__(self) -> str:
        return f"<kedge.Run {self.name}: {self.manifest.element_count} parameters>"

    def _pull(self, request: PullRequest) -> WeightsOfStep:
        return self._retrier.call(lambda: self._transport.pull(self.name, self.manifest, request))

    def _update(self, update: RunUpdate) -> int:
        request_id = uuid.uuid4().hex
        return self._retrier.call(lambda: self._transport.update_run(self.name, update, request_id=request_id))

    def _worker_name(self, worker: str) -> str:
        if not isinstance(worker, str):
            raise TypeError(f'worker is {worker!r}: give its id, as in "w1", or its full name')
        if "/" not in worker:
            return str(WorkerName(self.id, check_id(worker, what="worker")))
        if parse_worker(worker).run != self.name:
            raise ValueError(f"worker is {worker!r}: it is none of {self.name}")
        return worker

    def _checkpoint_name(self, checkpoint: Checkpoint | str) -> str:
        name = checkpoint.name if isinstance(checkpoint, Checkpoint) else checkpoint
        if not isinstance(name, str):
            raise TypeError(f"checkpoint is {name!r}: give what checkpoints() returned, a name or an id")
        if "/" not in name:
            return str(CheckpointName(self.id, check_checkpoint_id(name)))
        if parse_checkpoint(name).run != self.name:
            raise ValueError(f"checkpoint is {name!r}: it is none of {self.name}; open its own run with get_run()")
        return name


def _check_eviction(cause: object, block_seconds: float | None) -> None:
    if not isinstance(cause, str):
        raise TypeError(f"cause is {cause!r}: it must be text")
    if len(cause) > _MAX_CAUSE_LENGTH:
        raise ValueError(f"cause has {len(cause)} characters: it may have {_MAX_CAUSE_LENGTH}")
    if block_seconds is not None and not block_seconds > 0:
        raise ValueError(f"block_seconds is {block_seconds!r}: it must be None or greater than 0")


def _checked_number(name: str, value: Any) -> int | None:
    if value is None:
        return None
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} is {value!r}: it must be None or a whole number") from None
    if not 0 <= number < 1 << 63:
        raise ValueError(f"{name} is {value!r}: it must be None, or 0 to 2**63 - 1")
    return number


def _channel(transport: str, encoding: Encoding) -> Channel:
    """What is asked of the transport: memory is float32, whatever else is asked for goes over gRPC."""
    if transport not in _TRANSPORTS:
        raise ValueError(f"transport is {transport!r}: it must be one of {', '.join(_TRANSPORTS)}")
    is_plain = encoding.dtype == encoding.weights_dtype == "float32"
    if transport == "shared_memory" and not is_plain:
        raise ValueError(
            f"transport is {transport!r}, and gradients are sent as {encoding.dtype!r}, weights as "
            f'{encoding.weights_dtype!r}: in shared memory both are "float32"'
        )
    return cast(Channel, transport) if is_plain else "grpc"


def _check_join(lease_seconds: float | None) -> None:
    if lease_seconds is not None and not lease_seconds > 0:
        raise ValueError(f"lease_seconds is {lease_seconds!r}: it must be None or greater than 0")


def _new_worker_id() -> str:
    host = re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname()).strip("-")[:32] or "host"
    return f"{host}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
