"""The fake server's side of the transport: runs under one lock, with waiting."""

import itertools
import threading
from collections.abc import Callable, Sequence
from typing import NoReturn

import numpy as np

from kedge.optim.controls import Change
from kedge.testing.run import FakeRun
from kedge.transport import Lease, NewRun, PullRequest, Push, PushResult, RunInfo, WeightsOfStep
from kedge.wire.errors import KedgeError
from kedge.wire.manifest import DTYPES, Manifest
from kedge.wire.names import parse_run, parse_worker

DEFAULT_LEASE_SECONDS = 10.0

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
            return self._run(run).set_hyperparameters(group, change)

    def tick_schedule(self, run: str, group: str, *, to: int | None, request_id: str) -> int:  # noqa: ARG002  no retries
        """Ticks a schedule by hand."""
        with self._changed:
            return self._run(run).tick_schedule(group, to)

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
            self._run(parse_worker(lease.worker).run).renew(lease, self._clock())

    def leave(self, lease: Lease) -> None:
        """Gives a lease back."""
        with self._changed:
            self._run(parse_worker(lease.worker).run).leave(lease, self._clock())
            self._changed.notify_all()

    def pull(self, run: str, manifest: Manifest, request: PullRequest) -> WeightsOfStep:
        """Fetches weights."""
        with self._changed:
            held = self._run(run)
            _check_manifest(held, manifest)
            self._wait(held, lambda: held.step >= request.min_step, request.wait_seconds)
            if held.step < request.min_step:
                raise KedgeError(
                    "STEP_NOT_REACHED",
                    f"{run} is at step {held.step}, waited {request.wait_seconds:g} s for step {request.min_step}",
                    step=held.step,
                    min_step=request.min_step,
                )
            return WeightsOfStep(held.step, _weights(held, request))

    def push(self, manifest: Manifest, push: Push) -> tuple[PushResult, WeightsOfStep | None]:
        """Takes a contribution, and waits for its round."""
        with self._changed:
            run = self._run(parse_worker(push.lease.worker).run)
            _check_manifest(run, manifest)
            entry = run.contribute(push._replace(arrays=()), _through_wire(push.arrays, push.dtype), self._clock())
            self._changed.notify_all()
            self._wait(run, lambda: entry.result is not None, push.wait_seconds)
            result = entry.result or PushResult(
                "deferred", "WAITING_FOR_QUORUM", run.step, entry.staleness, "its round is open: push it again"
            )
            weights = WeightsOfStep(run.step, _weights(run, push.pull)) if push.pull else None
            return result, weights

    def open_exchange(self, manifest: Manifest) -> "FakeExchange":
        """Opens a stream."""
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

    def _wait(self, run: FakeRun, is_done: Callable[[], bool], wait_seconds: float) -> None:
        give_up_at = self._clock() + wait_seconds
        while not is_done() and self._clock() < give_up_at:
            self._changed.wait(_POLL_SECONDS)
            if self._run(run.name) is not run:
                _raise_not_found(run.name)


class FakeExchange:
    """One worker's pushes and pulls."""

    def __init__(self, transport: FakeTransport, manifest: Manifest) -> None:
        self._transport = transport
        self._manifest = manifest

    def push(self, push: Push) -> tuple[PushResult, WeightsOfStep | None]:
        """Sends one contribution."""
        return self._transport.push(self._manifest, push)

    def pull(self, worker: str, request: PullRequest) -> WeightsOfStep:
        """Fetches weights."""
        return self._transport.pull(parse_worker(worker).run, self._manifest, request)

    def close(self) -> None:
        """Does nothing."""


def _raise_not_found(name: str) -> NoReturn:
    raise KedgeError("RUN_NOT_FOUND", f"there is no run {name}: create it, or look at the list of runs", run=name)


def _check_manifest(run: FakeRun, manifest: Manifest) -> None:
    expected = run.new.manifest.digest.hex()
    if manifest.digest.hex() != expected:
        message = f"{run.name} has other tensors by now: get it again"
        raise KedgeError("MANIFEST_MISMATCH", message, expected=expected, got=manifest.digest.hex())


def _finite_weights(arrays: Sequence[np.ndarray]) -> np.ndarray:
    weights = _through_wire(arrays, "float32")
    bad = np.flatnonzero(~np.isfinite(weights))
    if bad.size:
        message = f"element {bad[0]} of the initial weights is {weights[bad[0]]}"
        raise KedgeError("NON_FINITE_WEIGHTS", message, element=bad[0])
    return weights


def _weights(run: FakeRun, request: PullRequest) -> np.ndarray:
    fast, slow = run.updater.fast, run.updater.slow
    parts = [part for name, part in (("fast", fast), ("slow", slow)) if name in request.weights.split("_and_")]
    held = [part for part in parts if part is not None]
    if len(held) < len(parts):
        message = f"{run.name} has no Lookahead, so no slow weights: pull the fast ones"
        raise KedgeError("NO_SLOW_WEIGHTS", message, run=run.name)
    return _through_wire([part.astype(np.float32) for part in held], request.dtype).astype(np.float32)


def _through_wire(arrays: Sequence[np.ndarray], dtype: str) -> np.ndarray:
    """The values as the other side has them, float64."""
    with np.errstate(over="ignore"):
        return np.concatenate([array.reshape(-1).astype(DTYPES[dtype]) for array in arrays]).astype(np.float64)
