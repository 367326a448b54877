"""What the SDK asks of a server, as plain values: the seam between it and gRPC.

`kedge.transport.grpc` speaks it over the network, `kedge.testing` within the process. Every method raises `KedgeError`
and nothing else; none of them retries.
"""

from collections.abc import Iterator, Mapping
from typing import Literal, Protocol

from kedge.optim.controls import Change
from kedge.transport.values import (
    Checkpoint,
    Event,
    Lease,
    NewRun,
    PullRequest,
    Push,
    PushResult,
    RoundStatus,
    RunInfo,
    RunStatus,
    RunUpdate,
    WatchStart,
    WeightsKind,
    WeightsOfStep,
    WorkerStatus,
)
from kedge.wire.manifest import Manifest

__all__ = [
    "Channel",
    "Checkpoint",
    "Event",
    "Exchange",
    "Lease",
    "NewRun",
    "PullRequest",
    "Push",
    "PushResult",
    "RoundStatus",
    "RunInfo",
    "RunStatus",
    "RunUpdate",
    "Transport",
    "Watch",
    "WatchStart",
    "WeightsKind",
    "WeightsOfStep",
    "WorkerStatus",
]


Channel = Literal["auto", "grpc", "shared_memory"]
"""What carries a worker's payloads; "auto" takes shared memory where that can be had."""


class Exchange(Protocol):
    """One worker's pushes and pulls, in order: one at a time, and after an error only `close` may follow.

    `close` may be called from another thread; it ends what is under way.
    """

    @property
    def is_outdated(self) -> bool:
        """Whether another is to be opened before the next operation: credentials have changed."""
        ...

    def push(self, push: Push) -> tuple[PushResult, WeightsOfStep | None]:
        """Sends one contribution; blocks until its result, and the weights if `push.pull` asks for them, are here."""
        ...

    def pull(self, worker: str, request: PullRequest) -> WeightsOfStep:
        """Fetches weights of the worker's run; blocks until they are here."""
        ...

    def close(self) -> None:
        """Ends it; may be called twice."""
        ...


class Watch(Protocol):
    """The events of a run as they come; an iterator. `close` may be called from any thread, and ends it."""

    last_number: int
    """The number of the last event before those that it tells."""
    server_generation: int
    """That of the server, which grows with each of its starts; 0 where it says none."""

    def __iter__(self) -> Iterator[Event]:
        """Itself."""
        ...

    def __next__(self) -> Event:
        """The next event; blocks until there is one.

        Raises:
            KedgeError: CANCELLED after `close`, RUN_NOT_FOUND, SERVER_UNAVAILABLE.
        """
        ...

    def close(self) -> None:
        """Ends it; may be called twice."""
        ...


class Transport(Protocol):
    """A server as the SDK sees it. All methods may be called from any thread, and block."""

    def wait_until_ready(self, timeout_seconds: float) -> None:
        """Returns once the server can be reached.

        Raises:
            KedgeError: SERVER_UNAVAILABLE.
        """
        ...

    def create_run(self, run: NewRun) -> RunInfo:
        """Creates a run; the answer has the manifest."""
        ...

    def get_run(self, name: str, *, with_manifest: bool = True) -> RunInfo:
        """Reads one run."""
        ...

    def list_runs(self) -> list[RunInfo]:
        """Reads all runs, by name, without manifests."""
        ...

    def delete_run(self, name: str) -> None:
        """Deletes a run."""
        ...

    def set_hyperparameters(self, run: str, group: str, change: Change, *, request_id: str) -> int:
        """Changes a live run, or one of its groups; the answer is the next step, which is made with it."""
        ...

    def update_run(self, run: str, update: RunUpdate, *, request_id: str) -> int:
        """Changes the aggregation or the admission of a live run; the answer is the next step to be made."""
        ...

    def evict(self, worker: str, cause: str, block_seconds: float | None, *, request_id: str) -> None:
        """Ends a worker's lease from outside; nobody may join under its name for so long. Once for each request id."""
        ...

    def watch(self, run: str, start: WatchStart) -> Watch:
        """Tells what happens to a run. Returns when the watch has begun: nothing that happens later is missed."""
        ...

    def tick_schedule(self, run: str, group: str, *, to: int | None, request_id: str) -> int:
        """Ticks a schedule by hand, once or on to a tick; the answer is its ticks so far."""
        ...

    def join(self, run: str, worker_id: str, lease_seconds: float | None) -> Lease:
        """Takes a lease; None asks for the server's default."""
        ...

    def heartbeat(self, lease: Lease) -> None:
        """Renews a lease."""
        ...

    def leave(self, lease: Lease) -> None:
        """Gives a lease back."""
        ...

    def pull(self, run: str, manifest: Manifest, request: PullRequest) -> WeightsOfStep:
        """Fetches weights without a lease."""
        ...

    def open_exchange(self, manifest: Manifest, lease: Lease | None = None, channel: Channel = "grpc") -> Exchange:
        """Opens a stream for one worker of a run with this manifest; one that may share memory needs its lease.

        Raises:
            KedgeError: SHARED_MEMORY_UNAVAILABLE, only for the channel "shared_memory".
        """
        ...

    def create_checkpoint(self, run: str, metrics: Mapping[str, float]) -> Checkpoint:
        """Takes a checkpoint; returns when it is safe."""
        ...

    def list_checkpoints(self, run: str) -> list[Checkpoint]:
        """Reads the checkpoints of a run, newest first."""
        ...

    def restore_checkpoint(self, name: str, *, request_id: str) -> int:
        """Lets a run go on from one of its checkpoints, once for each request id; the answer is its step."""
        ...

    def fork_checkpoint(self, name: str, run_id: str, *, request_id: str) -> RunInfo:
        """Creates a run that begins with a checkpoint of another; the answer has the manifest."""
        ...

    def close(self) -> None:
        """Ends every call; may be called twice."""
        ...
