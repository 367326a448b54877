"""The client of a server: connecting to it, and the runs that it holds."""

import logging
import os
import re
import socket
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from kedge import optim, policies, tree
from kedge.config import resolve_address
from kedge.optim._checks import plain
from kedge.optim.controls import Change
from kedge.optim.groups import assign, check_changes, check_groups
from kedge.optim.schedules.base import check_epoch
from kedge.retry import Retrier
from kedge.transport import Lease, NewRun, PullRequest, RunInfo, RunStatus, Transport, in_process
from kedge.weights import FastOrSlow, pull_patiently, pull_request
from kedge.wire.errors import KedgeError
from kedge.wire.manifest import DTYPES, Manifest, TensorSpec
from kedge.wire.names import check_id, parse_run, run_name
from kedge.worker import Worker

_TRANSPORTS = ("auto", "grpc")

_logger = logging.getLogger("kedge")


def connect(address: str | None = None, *, timeout_seconds: float = 10.0, retry_seconds: float = 60.0) -> "Client":
    """Connects to a server; blocks until it answers.

    Args:
        address: host:port; None takes the environment's KEDGE_ADDRESS.
        timeout_seconds: how long to wait for the server.
        retry_seconds: how long each later call goes on trying while the server cannot be reached, or asks to come back.

    Returns:
        A client; close it, or use it in a `with` block.

    Raises:
        ValueError: if there is no address.
        KedgeError: SERVER_UNAVAILABLE.

    Example:
        >>> with kedge.connect("localhost:50051") as client:
        ...     run = client.get_run("digits")
    """
    transport = _transport_to(resolve_address(address))
    try:
        transport.wait_until_ready(timeout_seconds)
    except BaseException:
        transport.close()
        raise
    return Client(transport, Retrier(retry_seconds))


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


class Client:
    """A connection to a server. `kedge.connect` makes it; it may be used from any thread."""

    def __init__(self, transport: Transport, retrier: Retrier) -> None:
        self._transport = transport
        self._retrier = retrier

    def create_run(
        self,
        name: str,
        *,
        params: Any,
        optimizer: optim.Optimizer,
        aggregation: policies.Policy,
        groups: Sequence[optim.Group] = (),
    ) -> "Run":
        """Creates a run; blocks until the server holds it.

        Args:
            name: "digits" or "runs/digits".
            params: the initial weights: nested dicts, lists, tuples and named tuples of arrays, each float32, bfloat16
                or float16.
            optimizer: of `kedge.optim`.
            aggregation: `kedge.Synchronous` or `kedge.Asynchronous`.
            groups: tensors with hyperparameters of their own, `kedge.optim.Group`; each tensor belongs to the first
                that takes it.

        Returns:
            The run. What is pulled from it has the structure of `params`.

        Raises:
            ValueError: for groups of one name, or a group that gets no tensor.
            KedgeError: INVALID_NAME, UNSUPPORTED_DTYPE, UNSUPPORTED_STRUCTURE, MANIFEST_INVALID (nothing was sent);
                INVALID_CONFIGURATION for what only the server can judge, as the arguments of `optim.Optax`;
                RUN_ALREADY_EXISTS, NON_FINITE_WEIGHTS, RUN_TOO_LARGE, TOO_MANY_RUNS; SERVER_UNAVAILABLE.

        Example:
            >>> run = client.create_run(
            ...     "digits",
            ...     params={"w": np.zeros((64, 10), np.float32)},
            ...     optimizer=optim.Lookahead(optim.AdaBelief(lr=1e-3), sync_period=5, alpha=0.5),
            ...     aggregation=kedge.Synchronous(quorum=4),
            ... )
        """
        _check_types(optimizer, aggregation)
        leaves = tree.named_leaves(params)
        manifest = tree.manifest_from_leaves(leaves)
        run_id = parse_run(run_name(name))
        checked = check_groups(groups)
        assign(checked, leaves)
        new = NewRun(
            run_id, manifest, list(leaves.values()), optimizer, aggregation, checked, request_id=uuid.uuid4().hex
        )
        info = self._retrier.call(lambda: self._transport.create_run(new))
        return Run(self._transport, self._retrier, info, manifest=manifest, template=tree.Template.from_tree(params))

    def get_run(self, name: str, *, like: Any = None) -> "Run":
        """Opens a run that exists.

        Args:
            name: "digits" or "runs/digits".
            like: a tree named and shaped as the run's params, whose structure the pulled weights get; None gives a flat
                dict from tensor names to arrays.

        Raises:
            KedgeError: INVALID_NAME, RUN_NOT_FOUND; TENSOR_MISSING, TENSOR_UNEXPECTED or TENSOR_SHAPE_MISMATCH if
                `like` does not fit; SERVER_UNAVAILABLE.
        """
        info = self._retrier.call(lambda: self._transport.get_run(run_name(name)))
        manifest = _manifest_of(info)
        if like is None:
            return Run(self._transport, self._retrier, info, manifest=manifest, template=tree.Template.flat(manifest))
        tree.arrays_in_order(like, manifest)
        return Run(self._transport, self._retrier, info, manifest=manifest, template=tree.Template.from_tree(like))

    def get_or_create_run(
        self,
        name: str,
        *,
        params: Any,
        optimizer: optim.Optimizer,
        aggregation: policies.Policy,
        groups: Sequence[optim.Group] = (),
    ) -> "Run":
        """Opens a run, or creates it if it does not exist: workers may call this in any order.

        Args:
            name: as for `create_run`.
            params: as for `create_run`. If the run exists only their names, shapes, dtypes and order matter.
            optimizer: as for `create_run`. If the run exists it must have the same.
            aggregation: as for `create_run`. If the run exists its own holds, and a warning says so
                where they differ.
            groups: as for `create_run`. If the run exists it must have the same.

        Raises:
            KedgeError: RUN_MISMATCH if the run that exists has other tensors, another optimizer or other groups; also
                those of `create_run`.
        """
        config = _RunConfig(optimizer, aggregation, check_groups(groups))
        try:
            return self._get_same_run(name, params, config)
        except KedgeError as error:
            if error.reason != "RUN_NOT_FOUND":
                raise
        try:
            return self.create_run(name, params=params, **config._asdict())
        except KedgeError as error:
            if error.reason != "RUN_ALREADY_EXISTS":
                raise
        return self._get_same_run(name, params, config)

    def list_runs(self) -> list[RunInfo]:
        """What the server says of each of its runs, by name and without manifests.

        Raises:
            KedgeError: SERVER_UNAVAILABLE.
        """
        return self._retrier.call(self._transport.list_runs)

    def delete_run(self, name: str) -> None:
        """Deletes a run with its weights and leases. Whatever waits in it fails with RUN_NOT_FOUND.

        Args:
            name: "digits" or "runs/digits".

        Raises:
            KedgeError: INVALID_NAME, RUN_NOT_FOUND, SERVER_UNAVAILABLE.
        """
        self._retrier.call(lambda: self._transport.delete_run(run_name(name)))

    def close(self) -> None:
        """Ends the connection; what still waits on it fails with CANCELLED. May be called twice."""
        self._retrier.close()
        self._transport.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _get_same_run(self, name: str, params: Any, config: "_RunConfig") -> "Run":
        info = self._retrier.call(lambda: self._transport.get_run(run_name(name)))
        wanted = tree.manifest_from_leaves(tree.named_leaves(params))
        manifest = _manifest_of(info)
        if manifest.digest != wanted.digest:
            raise _mismatch(info, "manifest", _first_difference(manifest, wanted))
        if optim.from_spec(info.optimizer.spec()) != optim.from_spec(config.optimizer.spec()):
            raise _mismatch(info, "optimizer", f"it has {info.optimizer}, asked for is {config.optimizer}")
        if info.groups != config.groups:
            raise _mismatch(info, "groups", f"it has {list(info.groups)}, asked for are {list(config.groups)}")
        if info.aggregation != config.aggregation:
            message = "%s exists and keeps its aggregation: it has %s, asked for is %s"
            _logger.warning(message, info.name, info.aggregation, config.aggregation)
        return Run(self._transport, self._retrier, info, manifest=manifest, template=tree.Template.from_tree(params))


class _RunConfig(NamedTuple):
    """What a run is created with, besides its tensors."""

    optimizer: optim.Optimizer
    aggregation: policies.Policy
    groups: tuple[optim.Group, ...]


class Run:
    """A run that a server holds. A client makes it; it may be used from any thread.

    Attributes:
        name: `runs/{run}`.
        manifest: its tensors in order.
        optimizer: as it was created.
        aggregation: how contributions become steps, as of the moment when the run was opened.
        groups: its parameter groups, as it was created.
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
        self.groups = info.groups

    @property
    def id(self) -> str:
        """The {run} of `runs/{run}`."""
        return parse_run(self.name)

    def join(
        self,
        name: str | None = None,
        *,
        wire_dtype: str = "float32",
        transport: str = "auto",
        lease_seconds: float | None = None,
    ) -> Worker:
        """Joins as a worker: takes a lease, and renews it in the background until the worker is closed.

        Args:
            name: the worker's id, unique in the run: whoever joins under a name that is taken supersedes its holder.
                None makes one of the host's name, the process and a random part.
            wire_dtype: what gradients and weights are sent as: "float32", "bfloat16" or "float16".
            transport: "auto" or "grpc".
            lease_seconds: how long the server counts on the worker without hearing of it, within the server's limits;
                None takes its default.

        Raises:
            ValueError: for another wire_dtype or transport, or a lease that is not greater than 0.
            KedgeError: INVALID_NAME, RUN_NOT_FOUND, TOO_MANY_WORKERS, SERVER_UNAVAILABLE; UNSUPPORTED for the transport
                "shared_memory", which this version does not have.
        """
        _check_join(wire_dtype, transport, lease_seconds)
        # Never left to the server, so that a repeated attempt replaces the first one instead of standing beside it.
        worker_id = _new_worker_id() if name is None else check_id(name, what="worker")
        lease: Lease = self._retrier.call(lambda: self._transport.join(self.name, worker_id, lease_seconds))
        return Worker(
            self._transport,
            self._retrier,
            lease,
            manifest=self.manifest,
            template=self._template,
            wire_dtype=wire_dtype,
        )

    def pull(
        self, weights: FastOrSlow = "fast", *, min_step: int | None = None, timeout_seconds: float | None = 60.0
    ) -> Any:
        """Fetches weights without a lease; blocks until they are here.

        Args:
            weights: "fast" or "slow". Slow weights are the ones to evaluate and deploy.
            min_step: wait until the run has reached this step; None takes the weights as they are.
            timeout_seconds: how long to wait for `min_step`; None waits as long as it takes.

        Returns:
            NumPy arrays in the structure of the run's params, not shared with anyone.

        Raises:
            KedgeError: NO_SLOW_WEIGHTS, STEP_NOT_REACHED, RUN_NOT_FOUND, SERVER_UNAVAILABLE.
        """
        data = pull_patiently(self._pull, pull_request(weights, min_step=min_step), timeout_seconds)
        return self._template.fill(tree.split_flat(data.flat, self.manifest))

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

    def delete(self) -> None:
        """Deletes the run, as `Client.delete_run` does."""
        self._retrier.call(lambda: self._transport.delete_run(self.name))

    def __repr__(self) -> str:
        return f"<kedge.Run {self.name}: {self.manifest.element_count} parameters>"

    def _pull(self, request: PullRequest) -> Any:
        return self._retrier.call(lambda: self._transport.pull(self.name, self.manifest, request))


def _transport_to(address: str) -> Transport:
    if in_process.is_in_process(address):
        return in_process.transport_to(address)
    from kedge.transport.grpc import GrpcTransport

    return GrpcTransport(address)


def _check_types(optimizer: object, aggregation: object) -> None:
    if not isinstance(optimizer, optim.Optimizer):
        raise TypeError(f"optimizer is {optimizer!r}: give one of kedge.optim, as in optim.Adam(lr=1e-3)")
    if not isinstance(aggregation, policies.Policy):
        raise TypeError(f"aggregation is {aggregation!r}: give kedge.Synchronous(quorum) or kedge.Asynchronous()")


def _check_join(wire_dtype: str, transport: str, lease_seconds: float | None) -> None:
    if wire_dtype not in DTYPES:
        raise ValueError(f"wire_dtype is {wire_dtype!r}: it must be one of {', '.join(DTYPES)}")
    if transport == "shared_memory":
        message = 'transport "shared_memory" does not exist in this version: use "auto" or "grpc"'
        raise KedgeError("UNSUPPORTED", message, method="join")
    if transport not in _TRANSPORTS:
        raise ValueError(f"transport is {transport!r}: it must be one of {', '.join(_TRANSPORTS)}")
    if lease_seconds is not None and not lease_seconds > 0:
        raise ValueError(f"lease_seconds is {lease_seconds!r}: it must be None or greater than 0")


def _new_worker_id() -> str:
    host = re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname()).strip("-")[:32] or "host"
    return f"{host}-{os.getpid()}-{uuid.uuid4().hex[:8]}"


def _manifest_of(info: RunInfo) -> Manifest:
    if info.manifest is None:
        raise KedgeError("INTERNAL", f"the server described {info.name} without its tensors")
    return info.manifest


def _mismatch(info: RunInfo, field: str, difference: str) -> KedgeError:
    return KedgeError(
        "RUN_MISMATCH",
        f"{info.name} exists and has another {field}: {difference}; choose another name, or delete the run",
        run=info.name,
        field=field,
    )


def _first_difference(manifest: Manifest, wanted: Manifest) -> str:
    for held, asked in zip(manifest.tensors, wanted.tensors, strict=False):
        if held != asked:
            return f"it has {_described(held)} where {_described(asked)} is asked for"
    return f"it has {len(manifest.tensors)} tensors, asked for are {len(wanted.tensors)}"


def _described(spec: TensorSpec) -> str:
    return f"{spec.name!r} of {spec.dtype} {list(spec.shape)}"
