"""What the engine asks of storage, and what stands in its place for a run that is kept in memory only."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from kedge.policies import Durability
from kedge.wire.errors import KedgeError
from kedge_server.core.commits import Commit, Created, Restored
from kedge_server.core.image import ImageState, RunImage
from kedge_server.core.stored import Capture, CheckpointInfo, Replayed, Restorable, Ticket


class RunStore(Protocol):
    """What keeps one run. Belongs to a loop; nothing here blocks it."""

    @property
    def run(self) -> str:
        """runs/{run}."""

    @property
    def level(self) -> Durability:
        """What an acknowledged push survives."""

    @property
    def durable_step(self) -> int:
        """The step that the run would go on from if the process ended now."""

    @property
    def problem(self) -> KedgeError | None:
        """Why nothing can be written at the moment."""

    @property
    def keeps_gradients(self) -> bool:
        """Whether the gradient of every step is written."""

    def commit(self, commit: Commit, payload: Sequence[np.ndarray] = ()) -> Ticket:
        """Takes the next commit. The payload must not change until it is written."""

    def go_back(self, restored: Restored, image: RunImage) -> Ticket:
        """Takes the commit of going back to a checkpoint that `load` gave, with its image."""

    def reserve(self, commit: Commit) -> Ticket:
        """Takes the next commit, whose payload is to follow: see `provide`."""

    def provide(self, ticket: Ticket, payload: Sequence[np.ndarray]) -> None:
        """Gives a commit its payload. It must not change until it is written."""

    async def written(self, ticket: Ticket) -> None:
        """Waits until a commit is as durable as the level asks for, as long as it takes."""

    async def acknowledge(self) -> None:
        """Waits until all commits so far are as durable as the level asks for.

        Raises:
            KedgeError: STORAGE_FULL or STORAGE_UNAVAILABLE, at once when it cannot be; they will be when it can.
        """

    async def until(self, result: "asyncio.Future[Any]") -> None:
        """Waits for a result that depends on commits.

        Raises:
            KedgeError: as `acknowledge`.
        """

    def abandon(self, error: KedgeError) -> None:
        """Lets nobody wait for a commit any more: the run has failed, and payloads will never come."""

    def checkpoint_of_now(self) -> CheckpointInfo | None:
        """The newest one, if the run is as it was then but for its workers."""

    def checkpoint_is_due(self) -> bool:
        """Whether it is time for one."""

    def image_state(self) -> ImageState:
        """What the run is, apart from its arrays, after all commits that are written."""

    async def save(self, capture: Callable[[], Awaitable[Capture]], metrics: Mapping[str, float]) -> CheckpointInfo:
        """Makes a checkpoint of what `capture` gives, which is called when no other is being made.

        Raises:
            KedgeError: as `acknowledge`.
        """

    def checkpoints(self) -> list[CheckpointInfo]:
        """Those that are complete, newest first."""

    def checkpoint_name(self, checkpoint_id: str) -> str:
        """runs/{run}/checkpoints/{checkpoint}."""

    async def load(self, checkpoint_id: str) -> Restorable:
        """Reads a checkpoint.

        Raises:
            KedgeError: CHECKPOINT_NOT_FOUND or CHECKPOINT_DAMAGED.
        """

    async def close(self, *, hurry: bool) -> None:
        """Writes what is there to be written, and closes the files. In a hurry it waits for nothing that is stuck."""

    async def delete(self) -> None:
        """Deletes all of it."""


class Storage(Protocol):
    """What keeps the runs of a server."""

    async def create(self, created: Created, payload: Sequence[np.ndarray]) -> RunStore:
        """Keeps a new run; afterwards it is there after any loss of power.

        Raises:
            KedgeError: STORAGE_FULL or STORAGE_UNAVAILABLE; then nothing is left of it.
        """

    def found(self) -> Sequence["FoundRun"]:
        """The runs that are to be recovered."""

    async def close(self) -> None:
        """Lets go. Only after the stores of all runs are closed."""


class FoundRun(Protocol):
    """A run in storage that is to be recovered."""

    name: str

    async def open(self) -> Restorable | None:
        """What its recovery begins with; None if its creation was never finished.

        Raises:
            Exception: a named error of storage; nothing is changed then.
        """

    def batches(self) -> AsyncIterator[Sequence[Replayed]]:
        """What its journal holds beyond that, in order.

        Raises:
            Exception: as `open`.
        """

    async def restored(self, checkpoint_id: str, index: int) -> Restorable:
        """The checkpoint that the commit of this index names.

        Raises:
            Exception: as `open`.
        """

    def resume(self, image: RunImage) -> RunStore:
        """Its store, which goes on after the last commit."""


class MemoryStore:
    """Keeps nothing: the store of a run of level memory."""

    level: Durability = "memory"
    durable_step = 0
    problem: KedgeError | None = None
    keeps_gradients = False

    def __init__(self, run: str) -> None:
        self.run = run

    def commit(self, commit: Commit, payload: Sequence[np.ndarray] = ()) -> Ticket:
        """Forgets it."""
        ticket = Ticket(commit, payload)
        ticket.note_written()
        return ticket

    def go_back(self, restored: Restored, image: RunImage) -> Ticket:
        """There is nothing to go back to."""
        raise self._unavailable()

    def reserve(self, commit: Commit) -> Ticket:
        """Forgets it."""
        return Ticket(commit, None)

    def provide(self, ticket: Ticket, payload: Sequence[np.ndarray]) -> None:
        """Forgets it."""

    async def written(self, ticket: Ticket) -> None:
        """There is nothing to wait for."""

    async def acknowledge(self) -> None:
        """There is nothing to wait for."""

    def abandon(self, error: KedgeError) -> None:
        """Nobody waits."""

    async def until(self, result: "asyncio.Future[Any]") -> None:
        """Waits for the result alone."""
        await asyncio.wait([result])

    def checkpoint_of_now(self) -> CheckpointInfo | None:
        """There is none."""
        return None

    def checkpoint_is_due(self) -> bool:
        """Never."""
        return False

    def image_state(self) -> ImageState:
        """There is none."""
        raise self._unavailable()

    async def save(self, capture: Callable[[], Awaitable[Capture]], metrics: Mapping[str, float]) -> CheckpointInfo:
        """Refuses."""
        raise self._unavailable()

    def checkpoints(self) -> list[CheckpointInfo]:
        """None."""
        return []

    def checkpoint_name(self, checkpoint_id: str) -> str:
        """There is none."""
        return f"{self.run}/checkpoints/{checkpoint_id}"

    async def load(self, checkpoint_id: str) -> Restorable:
        """Refuses."""
        raise self._unavailable()

    async def close(self, *, hurry: bool) -> None:
        """There is nothing to close."""

    async def delete(self) -> None:
        """There is nothing to delete."""

    def _unavailable(self) -> KedgeError:
        return KedgeError(
            "DURABILITY_UNAVAILABLE",
            f"{self.run} is kept in memory only, so it has no checkpoints: create it with another durability on a "
            "server that has a data directory",
            durability="memory",
        )
