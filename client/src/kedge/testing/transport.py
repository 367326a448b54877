"""The fake server's side of the transport: runs under one lock, with waiting."""

import itertools
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn

import numpy as np

from kedge.optim.controls import Change
from kedge.policies import Buffered
from kedge.testing import checkpoints, pulls
from kedge.testing.ledger import Entry
from kedge.testing.pulls import through_wire
from kedge.testing.run import FakeRun
from kedge.testing.watch import SERVER_GENERATION, FakeWatch
from kedge.transport import (
    Channel,
    Checkpoint,
    Event,
    Lease,
    NewRun,
    PullRequest,
    Push,
    PushResult,
    RunInfo,
    RunUpdate,
    WatchStart,
    WeightsOfStep,
)
from kedge.wire import compressed
from kedge.wire.errors import KedgeError
from kedge.wire.manifest import Manifest
from kedge.wire.names import parse_checkpoint, parse_run, parse_worker

DEFAULT_LEASE_SECONDS = 10.0

MAX_CAUSE_LENGTH = 256

_POLL_SECONDS = 0.02  # also how soon a waiting call sees that an injected clock has moved


class FakeTransport:
    """A `kedge.transport.Transport` that holds the runs itself. Thread-safe."""

    def __init__(self, address: str, clock: Callable[[], float]) -> None:
        self._address = address
        self._clock = clock
        self._changed = threading.Condition()
        self._runs: dict[str, FakeRun] = {}
        self._epochs = itertools.count(1)
        self._is_down = False

    def shut_down(self) -> None:
        """Ends the server: every call fails from now on, and those that wait do too."""
        with self._changed:
            self._is_down = True
            self._changed.notify_all()

    def wait_until_ready(self, timeout_seconds: float) -> None:  # noqa: ARG002  it is ready, or never will be
        """Returns at once."""
        with self._changed:
            self._check_up()

    def create_run(self, run: NewRun) -> RunInfo:
        """Creates a run; a repeated request finds the run that the first one made."""
        with self._changed:
            self._check_up()
            held = self._runs.get(run.run_id)
            if held is None:
                checkpoints.check_durability(run)
                # Without the arrays, which are the caller's: nothing of them may be kept.
                held = FakeRun(run._replace(arrays=()), _finite_weights(run.arrays))
                self._runs[run.run_id] = held
            elif held.new.request_id != run.request_id:
                message = f"{held.name} exists: choose another name, or use get_or_create_run"
                raise KedgeError("RUN_ALREADY_EXISTS", message, run=held.name)
            return held.info(self._clock(), with_manifest=True)

    def get_run(self, name: str, *, with_manifest: bool = True) -> RunInfo:
        """Reads one run."""
        with self._changed:
            return self._run(name).info(self._clock(), with_manifest=with_manifest)

    def list_runs(self) -> list[RunInfo]:
        """Reads all runs, by name."""
        with self._changed:
            self._check_up()
            names = [run.name for run in sorted(self._runs.values(), key=lambda run: run.name)]
            return [self._run(name).info(self._clock(), with_manifest=False) for name in names]

    def delete_run(self, name: str) -> None:
        """Deletes a run."""
        with self._changed:
            run = self._run(name)
            del self._runs[run.new.run_id]
            self._changed.notify_all()

    def set_hyperparameters(self, run: str, group: str, change: Change, *, request_id: str) -> int:  # noqa: ARG002
        """Changes a live run."""
        with self._changed:
            return self._run(run).model.set_hyperparameters(group, change)

    def update_run(self, run: str, update: RunUpdate, *, request_id: str) -> int:  # noqa: ARG002  no retries
        """Changes the aggregation or the admission of a live run."""
        with self._changed:
            held = self._run(run)
            if update.aggregation is not None:
                held.set_aggregation(update.aggregation, self._clock())
            if update.admission is not None:
                held.admission = update.admission
            self._changed.notify_all()
            return held.step + 1

    def evict(self, worker: str, cause: str, block_seconds: float | None, *, request_id: str) -> None:
        """Ends a worker's lease from outside, once for each request id."""
        _check_eviction(cause, block_seconds)
        with self._changed:
            run = self._run(parse_worker(worker).run)
            if request_id not in run.evictions_answered:
                run.evict(worker, cause, block_seconds or 0.0, self._clock())
                run.evictions_answered |= {request_id} - {""}
                self._changed.notify_all()

    def watch(self, run: str, start: WatchStart) -> FakeWatch:
        """Tells what happens to a run."""
        with self._changed:
            held = self._run(run)
            is_from_now = start.from_step is None and start.after_number is None
            is_of_another = start.server_generation not in (0, SERVER_GENERATION)
            seen = held.events.last_number if is_from_now else 0 if is_of_another else start.after_number or 0
            return FakeWatch(self, held, seen, start.from_step or 0)

    def next_event(self, watch: FakeWatch) -> Event:
        """What a watch is to be told next; blocks until there is something."""
        with self._changed:
            while not watch.is_closed:
                self._check_there(watch.run)
                event = watch.run.events.next_after(watch.seen_number, watch.from_step)
                if event is not None:
                    return event
                self._changed.wait(_POLL_SECONDS)
        raise KedgeError("CANCELLED", "the watch was closed")

    def tick_schedule(self, run: str, group: str, *, to: int | None, request_id: str) -> int:  # noqa: ARG002  no retries
        """Ticks a schedule by hand."""
        with self._changed:
            return self._run(run).model.tick_schedule(group, to)

    def join(self, run: str, worker_id: str, lease_seconds: float | None) -> Lease:
        """Takes a lease."""
        with self._changed:
            held = self._run(run)
            lease = Lease(f"{run}/workers/{worker_id}", next(self._epochs), lease_seconds or DEFAULT_LEASE_SECONDS)
            held.join(lease, self._clock())
            self._changed.notify_all()
            return lease

    def heartbeat(self, lease: Lease) -> None:
        """Renews a lease."""
        with self._changed:
            self._run(parse_worker(lease.worker).run).members.renew(lease, self._clock())

    def leave(self, lease: Lease) -> None:
        """Gives a lease back."""
        with self._changed:
            self._run(parse_worker(lease.worker).run).leave(lease, self._clock())
            self._changed.notify_all()

    def create_checkpoint(self, run: str, metrics: Mapping[str, float]) -> Checkpoint:  # noqa: ARG002  there are none
        """Refuses: there are none of a run that is kept in memory."""
        with self._changed:
            checkpoints.refuse(self._run(run))

    def list_checkpoints(self, run: str) -> list[Checkpoint]:
        """Reads the checkpoints of a run: none."""
        with self._changed:
            self._run(run)
            return []

    def restore_checkpoint(self, name: str, *, request_id: str) -> int:  # noqa: ARG002  there are none
        """Refuses, as `create_checkpoint` does."""
        with self._changed:
            checkpoints.refuse(self._run(parse_checkpoint(name).run))

    def fork_checkpoint(self, name: str, run_id: str, *, request_id: str) -> RunInfo:  # noqa: ARG002  there are none
        """Refuses, as `create_checkpoint` does."""
        with self._changed:
            checkpoints.refuse(self._run(parse_checkpoint(name).run))

    def pull(self, run: str, manifest: Manifest, request: PullRequest) -> WeightsOfStep:
        """Fetches weights without a lease."""
        with self._changed:
            held = self._run(run)
            _check_manifest(held, manifest)
            return self._pull(held, request, None)

    def pull_for(self, worker: str, manifest: Manifest, request: PullRequest) -> WeightsOfStep:
        """Fetches weights for a worker."""
        with self._changed:
            held = self._run(parse_worker(worker).run)
            _check_manifest(held, manifest)
            return self._pull(held, request, worker)

    def push(self, manifest: Manifest, push: Push) -> tuple[PushResult, WeightsOfStep | None]:
        """Takes a contribution, and waits for its round."""
        with self._changed:
            run = self._run(parse_worker(push.lease.worker).run)
            _check_manifest(run, manifest)
            entry = run.contribute(push._replace(arrays=()), _gradient(run, push), self._clock())
            self._changed.notify_all()
            self._wait(run, lambda: _is_answerable(run, entry), push.wait_seconds)
            if entry.result is None:
                run.members.check_not_evicted(push.lease)
            result = entry.result or _deferred(run, entry)
            return result, self._pull(run, push.pull, push.lease.worker) if push.pull else None

    def open_exchange(
        self, manifest: Manifest, lease: Lease | None = None, channel: Channel = "grpc"
    ) -> "FakeExchange":
        """Opens a stream."""
        if channel == "shared_memory":
            raise KedgeError("SHARED_MEMORY_UNAVAILABLE", 'a fake server shares no memory: use "auto"', cause="fake")
        del lease  # what shares nothing needs none
        return FakeExchange(self, manifest)

    def close(self) -> None:
        """Does nothing: the server is shared by its clients."""

    def _check_up(self) -> None:
        if self._is_down:
            raise KedgeError("SERVER_UNAVAILABLE", f"the server {self._address} is closed", address=self._address)

    def _run(self, name: str) -> FakeRun:
        """The run as of now."""
        self._check_up()
        run = self._runs.get(parse_run(name))
        if run is None:
            _raise_not_found(name)
        run.advance(self._clock())
        return run

    def _check_there(self, run: FakeRun) -> None:
        """Brings the run up to now, or refuses one that was deleted."""
        if self._run(run.name) is not run:
            _raise_not_found(run.name)

    def _wait(self, run: FakeRun, is_done: Callable[[], bool], wait_seconds: float) -> None:
        give_up_at = self._clock() + wait_seconds
        while not is_done() and self._clock() < give_up_at:
            self._changed.wait(_POLL_SECONDS)
            self._check_there(run)

    def _pull(self, run: FakeRun, request: PullRequest, worker: str | None) -> WeightsOfStep:
        pulls.check_has(run, request)
        if request.weights == "slow":
            worker = None  # nothing holds them back
        self._wait(run, lambda: pulls.obstacle(run, request, worker) is None, request.wait_seconds)
        obstacle = pulls.obstacle(run, request, worker)
        if obstacle is not None:
            raise obstacle
        return pulls.answer(run, request, worker)


class FakeExchange:
    """One worker's pushes and pulls."""

    def __init__(self, transport: FakeTransport, manifest: Manifest) -> None:
        self._transport = transport
        self._manifest = manifest

    @property
    def is_outdated(self) -> bool:
        """It needs no credentials."""
        return False

    def push(self, push: Push) -> tuple[PushResult, WeightsOfStep | None]:
        """Sends one contribution."""
        return self._transport.push(self._manifest, push)

    def pull(self, worker: str, request: PullRequest) -> WeightsOfStep:
        """Fetches weights."""
        return self._transport.pull_for(worker, self._manifest, request)

    def close(self) -> None:
        """Does nothing."""


def _raise_not_found(name: str) -> NoReturn:
    raise KedgeError("RUN_NOT_FOUND", f"there is no run {name}: create it, or look at the list of runs", run=name)


def _check_manifest(run: FakeRun, manifest: Manifest) -> None:
    expected = run.new.manifest.digest.hex()
    if manifest.digest.hex() != expected:
        message = f"{run.name} has other tensors by now: get it again"
        raise KedgeError("MANIFEST_MISMATCH", message, expected=expected, got=manifest.digest.hex())


def _gradient(run: FakeRun, push: Push) -> np.ndarray:
    """The values of a push as the other side has them, float64."""
    if push.dtype not in compressed.COMPRESSED:
        return through_wire(push.arrays, push.dtype)
    compressed.check_safe(run.new.optimizer, push.dtype)
    return compressed.decoded(push.arrays[0], push.dtype, run.new.manifest.element_count).astype(np.float64)


def _finite_weights(arrays: Sequence[np.ndarray]) -> np.ndarray:
    weights = through_wire(arrays, "float32")
    bad = np.flatnonzero(~np.isfinite(weights))
    if bad.size:
        message = f"element {bad[0]} of the initial weights is {weights[bad[0]]}"
        raise KedgeError("NON_FINITE_WEIGHTS", message, element=bad[0])
    return weights


def _check_eviction(cause: str, block_seconds: float | None) -> None:
    if len(cause) > MAX_CAUSE_LENGTH:
        message = f"cause has {len(cause)} characters: it may have {MAX_CAUSE_LENGTH}"
        raise KedgeError("INVALID_CONFIGURATION", message, field="cause")
    if block_seconds is not None and not 0 <= block_seconds < math.inf:
        message = f"block_seconds is {block_seconds}: it must be None, or 0 or more"
        raise KedgeError("INVALID_CONFIGURATION", message, field="block")


def _is_answerable(run: FakeRun, entry: Entry) -> bool:
    member = run.members.find(entry.push.lease)
    is_evicted = member is not None and member.eviction_cause is not None
    return entry.result is not None or isinstance(run.policy, Buffered) or is_evicted


_HELD = {
    "BUFFERED": "it waits in the buffer: go on",
    "WAITING_FOR_QUORUM": "its round is open: push it again",
    "WAITING_FOR_COHORT": "its round has too few for its combination, and waits for more workers: push it again",
}


def _deferred(run: FakeRun, entry: Entry) -> PushResult:
    reason = run.holding_reason
    return PushResult("deferred", reason, run.step, entry.staleness, _HELD[reason])
