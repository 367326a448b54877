"""What keeps one run: its journal and its checkpoints, behind `kedge_server.engine.durability.RunStore`."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import structlog

from kedge.policies import Durability
from kedge.wire.errors import KedgeError
from kedge_server.core.commits import Commit, Restored
from kedge_server.core.image import ImageState, RunImage
from kedge_server.core.stored import Capture, CheckpointInfo, Restorable, Ticket
from kedge_server.storage import retention
from kedge_server.storage.checkpoints import CheckpointMissing, CheckpointStore
from kedge_server.storage.committer import Committer, as_kedge_error
from kedge_server.storage.errors import CheckpointDamaged, StorageError, StorageUnavailable, SyncFailed
from kedge_server.storage.journal import Journal
from kedge_server.storage.plain import decode, encode

_RETRY_SECONDS = 30.0
"""After a checkpoint that failed, the next one that is due waits so long."""

_HELD = "held."

_log = structlog.get_logger("kedge.storage")

ResultT = TypeVar("ResultT")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the stores of a server share."""

    journal_bytes: int
    """The journal since the last checkpoint after which one is taken; or eight times the state, if that is more."""
    sync_seconds: float
    """At level journal, how long what is written may stay unsynced."""
    journals: Executor
    """For what blocks on journals."""
    checkpoints: Executor
    """One thread: Orbax has event loops of its own."""
    one_at_a_time: asyncio.Lock
    """A checkpoint takes a copy of the state: of one run at once."""
    on_sync_failed: Callable[[SyncFailed], None]
    """Ends the process."""


class StoredRun:
    """A run that is kept. Belongs to a loop.

    Args:
        image: what comes of the commits that are written.
        journal: at level checkpoint None.
        store: its checkpoints.
        settings: what is shared.
        delete: removes its directory; it blocks.

    Attributes:
        restored_from: the checkpoints that the journal names, by id, with their commit's index. They have to stay.
    """

    def __init__(
        self,
        image: RunImage,
        journal: Journal | None,
        store: CheckpointStore,
        *,
        settings: Settings,
        delete: Callable[[], None],
    ) -> None:
        self._run = image.config.name
        self._rules = image.config.checkpoints
        self._store = store
        self._settings = settings
        self._delete = delete
        self._committer = Committer(
            image,
            journal,
            level=image.config.durability,
            sync_seconds=settings.sync_seconds,
            executor=settings.journals,
            on_sync_failed=settings.on_sync_failed,
        )
        last = next(iter(store.list()), None)
        self._counted_from = -(journal.size_bytes(last.next_index if last else 1) if journal is not None else 0)
        self._last_step = last.step if last else 0
        age_seconds = time.time() - (last.created_at_seconds if last else image.config.created_at_seconds)
        self._last_at_seconds = time.monotonic() - max(0.0, age_seconds)
        self._state_bytes = last.size_bytes if last else 0
        self._wait_until_seconds = 0.0
        self.restored_from: dict[str, int] = {}
        self._is_deleted = False

    @property
    def run(self) -> str:
        """runs/{run}."""
        return self._run

    @property
    def level(self) -> Durability:
        """What an acknowledged push survives."""
        return self._committer.image.config.durability

    @property
    def keeps_gradients(self) -> bool:
        """Whether the gradient of every step is written."""
        return self.level != "checkpoint"

    @property
    def durable_step(self) -> int:
        """The step that the run would go on from if the process ended now."""
        return self._committer.image.step if self.keeps_gradients else self._last_step

    @property
    def problem(self) -> KedgeError | None:
        """Why nothing can be written at the moment."""
        return self._committer.problem

    # Commits

    def commit(self, commit: Commit, payload: Sequence[np.ndarray] = ()) -> Ticket:
        """Takes the next commit."""
        return self._committer.take(commit, payload)

    def go_back(self, restored: Restored, image: RunImage) -> Ticket:
        """Takes the commit of going back to a checkpoint."""
        self.restored_from[restored.checkpoint_id] = self._committer.next_index
        self._last_step = restored.step
        return self._committer.take(restored, (), image)

    def reserve(self, commit: Commit) -> Ticket:
        """Takes the next commit, whose payload is to follow."""
        return self._committer.take(commit, None)

    def provide(self, ticket: Ticket, payload: Sequence[np.ndarray]) -> None:
        """Gives a commit its payload."""
        self._committer.provide(ticket, payload)

    async def written(self, ticket: Ticket) -> None:
        """Waits until a commit is as durable as the level asks for."""
        await self._committer.written(ticket)

    async def acknowledge(self) -> None:
        """Waits until all commits so far are; see `Committer.acknowledge`."""
        await self._committer.acknowledge()

    def abandon(self, error: KedgeError) -> None:
        """A commit that was reserved will never get its payload."""
        self._committer.abandon(error)

    async def until(self, result: "asyncio.Future[Any]") -> None:
        """Waits for a result; see `Committer.until`."""
        await self._committer.until(result)

    # Checkpoints

    def checkpoint_of_now(self) -> CheckpointInfo | None:
        """The newest one, if the run is as it was then but for its workers."""
        newest = next(iter(self._store.list()), None)
        return newest if newest is not None and newest.next_index >= self._committer.state_index else None

    def checkpoint_is_due(self) -> bool:
        """Whether it is time for one."""
        if time.monotonic() < self._wait_until_seconds:
            return False
        since = retention.Since(
            steps=max(0, self._committer.image.step - self._last_step),
            seconds=time.monotonic() - self._last_at_seconds,
            journal_bytes=self._committer.written_bytes - self._counted_from,
        )
        return retention.is_due(
            since,
            self._rules,
            durability=self.level,
            state_bytes=self._state_bytes,
            journal_limit_bytes=self._settings.journal_bytes,
        )

    def image_state(self) -> ImageState:
        """What the run is, apart from its arrays, after all commits that are written."""
        return self._committer.image.state()

    async def save(self, capture: Callable[[], Awaitable[Capture]], metrics: Mapping[str, float]) -> CheckpointInfo:
        """Makes a checkpoint, and lets go of what it makes superfluous.

        Raises:
            KedgeError: STORAGE_FULL or STORAGE_UNAVAILABLE.
        """
        self._wait_until_seconds = time.monotonic() + _RETRY_SECONDS
        async with self._settings.one_at_a_time:
            counted_from = self._committer.written_bytes
            captured = await capture()
            try:
                await self._committer.sync()  # a checkpoint is not to be ahead of the journal after loss of power
                journal_sum = await self._committer.sum_of(captured.image.next_index - 1)
                captured = captured._replace(image=captured.image._replace(journal_sum=journal_sum))
                info = await self._on_thread(self._save, captured, metrics)
                self._counted_from, self._last_step = counted_from, info.step
                self._last_at_seconds, self._state_bytes = time.monotonic(), info.size_bytes
                self._wait_until_seconds = 0.0
                await self._let_go()
            except StorageError as error:
                raise as_kedge_error(error, self._run) from error
        return info

    def checkpoints(self) -> list[CheckpointInfo]:
        """Those that are complete, newest first."""
        return self._store.list()

    def checkpoint_name(self, checkpoint_id: str) -> str:
        """runs/{run}/checkpoints/{checkpoint}."""
        return f"{self._run}/checkpoints/{checkpoint_id}"

    async def load(self, checkpoint_id: str) -> Restorable:
        """Reads a checkpoint.

        Raises:
            KedgeError: CHECKPOINT_NOT_FOUND or CHECKPOINT_DAMAGED.
        """
        name = self.checkpoint_name(checkpoint_id)
        # From now on it has to stay, since a commit may be about to name it.
        self.restored_from[checkpoint_id] = self._committer.image.next_index
        try:
            restorable = await self._on_thread(load, self._store, checkpoint_id)
        except CheckpointMissing as error:
            raise KedgeError(
                "CHECKPOINT_NOT_FOUND", f"there is no {name}: look at the list of checkpoints", checkpoint=name
            ) from error
        except CheckpointDamaged as error:
            raise KedgeError("CHECKPOINT_DAMAGED", error.message, checkpoint=name) from error
        except StorageError as error:
            raise as_kedge_error(error, self._run) from error
        return restorable

    def _save(self, captured: Capture, metrics: Mapping[str, float]) -> CheckpointInfo:
        if self._is_deleted:  # and another may have its name by now
            raise StorageUnavailable(f"{self._run} was deleted")
        image = captured.image
        own = {} if image.loss is None else {"loss": image.loss}
        held = {f"{_HELD}{number:05}": captured.held[key] for number, key in enumerate(image.held)}
        return self._store.save(
            step=image.step,
            next_index=image.next_index,
            created_at_seconds=time.time(),
            metrics={**own, **metrics},
            image=encode(image),
            arrays={**captured.arrays, **held},
        )

    async def _let_go(self) -> None:
        """Deletes the checkpoints that no rule keeps, and what of the journal no recovery needs."""
        await self._on_thread(self._retain)
        infos = self._store.list()
        if len(infos) > 1:
            needed_from = infos[1].next_index
            if self.keeps_gradients:
                await self._committer.drop_before(needed_from)
            self.restored_from = {name: index for name, index in self.restored_from.items() if index >= needed_from}

    def _retain(self) -> None:
        infos = self._store.list()
        for checkpoint_id in retention.to_delete(
            infos, self._rules, now_seconds=time.time(), keep=set(self.restored_from)
        ):
            self._store.delete(checkpoint_id)

    # The end

    async def close(self, *, hurry: bool) -> None:
        """Writes what is there to be written, and closes the files."""
        await self._committer.close(hurry=hurry)

    async def delete(self) -> None:
        """Deletes all of it.

        Raises:
            KedgeError: STORAGE_UNAVAILABLE.
        """
        self._is_deleted = True
        await self._committer.close(hurry=True)
        try:
            await self._on_thread(self._delete)
        except StorageError as error:
            raise as_kedge_error(error, self._run) from error

    async def _on_thread(self, call: Callable[..., ResultT], *arguments: object) -> ResultT:
        return await asyncio.get_running_loop().run_in_executor(
            self._settings.checkpoints, self._guarded, call, *arguments
        )

    def _guarded(self, call: Callable[..., ResultT], *arguments: object) -> ResultT:
        try:
            return call(*arguments)
        except SyncFailed as error:
            self._settings.on_sync_failed(error)
            raise


def load(store: CheckpointStore, checkpoint_id: str) -> Restorable:
    """Reads a checkpoint.

    Raises:
        CheckpointDamaged, CheckpointMissing, StorageError.
    """
    checkpoint = store.load(checkpoint_id)
    state: ImageState = decode(checkpoint.image)
    arrays = {name: array for name, array in checkpoint.arrays.items() if not name.startswith(_HELD)}
    held = {key: checkpoint.arrays[f"{_HELD}{number:05}"] for number, key in enumerate(state.held)}
    return Restorable(RunImage.of(state), arrays, held, state.journal_sum)
