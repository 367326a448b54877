"""Takes a run's commits to its journal, in order, and to its image once they are there.

Whoever waits is woken when they are as durable as the level asks for: one write, and one fdatasync where the level asks
for it, serves all that came meanwhile. What cannot be written now is tried again until it can; meanwhile `problem` says
why. Invariant: the image is what comes of the commits that are written, and of no others.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from itertools import takewhile
from typing import Any, TypeVar, get_args

import numpy as np
import structlog

from kedge.policies import Durability
from kedge.wire.errors import KedgeError
from kedge_server.core.commits import Commit, CommitKind, Restored, Stepped, Ticked, Updated
from kedge_server.core.image import RunImage
from kedge_server.core.stored import Ticket
from kedge_server.storage.errors import StorageError, StorageFull, SyncFailed
from kedge_server.storage.journal import Entry, Journal
from kedge_server.storage.plain import encode
from kedge_server.storage.records import RECORD_BYTES

_RETRY_SECONDS = 0.25
_OF_STATE = (Stepped, Restored, Updated, Ticked)
_KINDS = {name: number for number, name in enumerate(get_args(CommitKind), 1)}

_log = structlog.get_logger("kedge.storage")

ResultT = TypeVar("ResultT")


class Committer:
    """The commits of one run on their way. Belongs to one loop.

    Args:
        image: what comes of the commits that are written.
        journal: where they go; None where nothing but checkpoints is kept.
        level: the run's durability.
        sync_seconds: at level journal, how long what is written may stay unsynced.
        executor: for what blocks.
        on_sync_failed: ends the process; it is called on a thread of the executor.

    Attributes:
        problem: why nothing can be written at the moment; None when it can.
        written_bytes: what was written so far.
        state_index: of the journal: a checkpoint from there on has the run's state, if not all of its workers'.
    """

    def __init__(
        self,
        image: RunImage,
        journal: Journal | None,
        *,
        level: Durability,
        sync_seconds: float,
        executor: Executor,
        on_sync_failed: Callable[[SyncFailed], None],
    ) -> None:
        self.image = image
        self.problem: KedgeError | None = None
        self.written_bytes = 0
        self.state_index = image.next_index
        self._journal = journal
        self._level = level
        self._sync_seconds = sync_seconds
        self._executor = executor
        self._on_sync_failed = on_sync_failed
        self._tickets: deque[Ticket] = deque()
        self._changed = asyncio.Event()
        self._troubled = asyncio.Event()
        self._using_journal = asyncio.Lock()
        self._working: asyncio.Task[None] | None = None
        self._unsynced_since: float | None = None
        self._sync_timer: asyncio.TimerHandle | None = None
        self._syncing: asyncio.Task[None] | None = None  # kept, since a loop does not
        self._is_closed = False
        self._end: KedgeError | None = None

    # Commits

    def take(self, commit: Commit, payload: Sequence[np.ndarray] | None, image: RunImage | None = None) -> Ticket:
        """Takes the next commit; without a payload those behind it wait until `provide`."""
        ticket = Ticket(commit, payload, time.time())
        ticket.image = image
        self._tickets.append(ticket)
        self._go_on()
        return ticket

    @property
    def next_index(self) -> int:
        """That of the next commit to be taken."""
        return self.image.next_index + len(self._tickets)

    def provide(self, ticket: Ticket, payload: Sequence[np.ndarray]) -> None:
        """Gives a commit its payload."""
        ticket.payload = payload
        self._go_on()

    async def written(self, ticket: Ticket) -> None:
        """Waits until a commit is written, as long as it takes.

        Raises:
            KedgeError: SERVER_DRAINING after `close`: it never will be.
        """
        while not ticket.is_written:
            self._require_open()
            await self._changed.wait()

    async def acknowledge(self) -> None:
        """Waits until all commits so far are written.

        Raises:
            KedgeError: `problem`, as soon as there is one.
        """
        last = self._tickets[-1] if self._tickets else None
        while last is not None and not last.is_written:
            self._require_no_problem()
            self._require_open()
            await self._changed.wait()

    async def until(self, result: "asyncio.Future[Any]") -> None:
        """Waits for a result that may depend on commits.

        Raises:
            KedgeError: `problem`, as soon as there is one.
        """
        while not result.done():
            self._require_no_problem()
            troubled = asyncio.ensure_future(self._troubled.wait())
            try:
                await asyncio.wait([result, troubled], return_when=asyncio.FIRST_COMPLETED)
            finally:
                troubled.cancel()

    def abandon(self, error: KedgeError) -> None:
        """Lets nobody wait any more: a commit's payload will never come."""
        self._end = error
        self._wake()

    def _require_open(self) -> None:
        if self._end is not None:
            raise self._end.with_traceback(None)
        if self._is_closed:
            raise KedgeError("SERVER_DRAINING", "the run was closed before this was stored")

    def _require_no_problem(self) -> None:
        if self.problem is not None:
            raise self.problem.with_traceback(None)

    # The journal

    async def sync(self) -> None:
        """Brings what is written to the disk."""
        await self._use(lambda journal: journal.sync())

    async def sum_of(self, index: int) -> int | None:
        """The sum of a record; None without a journal, or if it is not there."""
        return await self._use(lambda journal: journal.sum_of(index))

    async def drop_before(self, index: int) -> None:
        """Drops what no recovery needs any more.

        Raises:
            StorageError: the rest of it is still there.
        """
        await self._use(lambda journal: journal.drop_before(index))

    async def close(self, *, hurry: bool) -> None:
        """Writes what is there to be written, unless it is stuck or in a hurry, and closes the journal."""
        while self._working is not None and self.problem is None and not (hurry and not self._ready()):
            await self._changed.wait()
        self._is_closed = True
        self._wake()
        if self._working is not None:
            self._working.cancel()
            await asyncio.wait([self._working])
        if self._sync_timer is not None:
            self._sync_timer.cancel()
        await self._use(_close)
        self._journal = None

    async def _use(self, use: Callable[[Journal], ResultT]) -> ResultT | None:
        """Uses the journal on a thread, alone."""
        # Whoever waits may be cancelled; the thread goes on, and has the journal until it is done.
        return await asyncio.shield(asyncio.ensure_future(self._use_alone(use)))

    async def _use_alone(self, use: Callable[[Journal], ResultT]) -> ResultT | None:
        async with self._using_journal:
            if self._journal is None:
                return None
            return await asyncio.get_running_loop().run_in_executor(self._executor, self._guarded, use, self._journal)

    def _guarded(self, use: Callable[[Journal], ResultT], journal: Journal) -> ResultT:
        try:
            return use(journal)
        except SyncFailed as error:
            self._on_sync_failed(error)
            raise

    # The work

    def _go_on(self) -> None:
        if self._is_closed:
            return
        if self._journal is None:
            self._note(self._ready())
        elif self._working is None and not self._is_closed and self._ready():
            self._working = asyncio.create_task(self._work())

    def _ready(self) -> list[Ticket]:
        return list(takewhile(lambda ticket: ticket.payload is not None, self._tickets))

    async def _work(self) -> None:
        try:
            while batch := self._ready():
                await self._write(batch)
        except Exception as error:
            # What is written may not be in the image: to write it once more would be to apply it twice.
            _log.exception("storing ends", run=self.image.config.name)
            self._is_closed = True
            self.abandon(_broken(self.image.config.name, error))
        finally:
            self._working = None
            self._wake()

    async def _write(self, batch: list[Ticket]) -> None:
        before = self.image.next_index
        try:
            end = await self._use(lambda journal: self._append(journal, batch))
        except Exception as error:
            assert self._journal is not None, "it was just used"
            self._note(batch[: self._journal.next_index - before])
            self._say(error)
            self._sync_later()
            await asyncio.sleep(_RETRY_SECONDS)
            return
        assert end == before + len(batch), "a journal numbers its records one after the other"
        if self.problem is not None:
            _log.warning("storing goes on", run=self.image.config.name)
            self.problem = None
            self._troubled.clear()
        self._note(batch)
        self._sync_later()

    def _append(self, journal: Journal, batch: list[Ticket]) -> int:
        """On a thread. After an error, `next_index` says how many were written."""
        try:
            journal.append([_entry(ticket) for ticket in batch])
        finally:  # what was written before the disk was full counts as written, too
            now = time.monotonic()
            if self._unsynced_since is None:
                self._unsynced_since = now
            if self._level == "journal-sync" or now - self._unsynced_since >= self._sync_seconds:
                journal.sync()
                self._unsynced_since = None
        return journal.next_index

    def _note(self, written: list[Ticket]) -> None:
        for ticket in written:
            assert ticket is self._tickets[0], "they are written in order"
            self._tickets.popleft()
            if isinstance(ticket.commit, Restored):
                assert ticket.image is not None, "it says where the run goes back to"
                self.image.go_back(ticket.commit, ticket.image)
            else:
                self.image.apply(ticket.commit, ticket.time_seconds)
            if isinstance(ticket.commit, _OF_STATE):
                self.state_index = self.image.next_index
            self.written_bytes += ticket.size_bytes
            ticket.note_written()
        if written:
            self._wake()

    def _say(self, error: Exception) -> None:
        if self.problem is None:
            is_defect = not isinstance(error, StorageError)
            cause = str(error)
            _log.error(
                "nothing can be stored; it is tried again", run=self.image.config.name, cause=cause, exc_info=is_defect
            )
        self.problem = as_kedge_error(error, self.image.config.name)
        self._troubled.set()
        self._wake()

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def _sync_later(self) -> None:
        if self._unsynced_since is None or self._sync_timer is not None:
            return
        self._sync_timer = asyncio.get_running_loop().call_later(self._sync_seconds, self._on_sync_timer)

    def _on_sync_timer(self) -> None:
        self._sync_timer = None
        if not self._is_closed:
            self._syncing = asyncio.create_task(self._sync_unsynced())

    async def _sync_unsynced(self) -> None:
        def sync(journal: Journal) -> None:
            journal.sync()
            self._unsynced_since = None

        await self._use(sync)


def _broken(run: str, error: Exception) -> KedgeError:
    return KedgeError(
        "RUN_FAILED",
        f"storing {run} failed ({type(error).__name__}), which is a defect: start the server anew, and it goes on from "
        "what is stored",
        run=run,
    )


def as_kedge_error(error: Exception, run: str) -> KedgeError:
    """What callers are told of an error of storage that may pass."""
    reason = "STORAGE_FULL" if isinstance(error, StorageFull) else "STORAGE_UNAVAILABLE"
    return KedgeError(reason, f"nothing can be stored: {error}", run=run, retry_after_seconds=_RETRY_SECONDS)


def _entry(ticket: Ticket) -> Entry:
    commit, payload = ticket.commit, ticket.payload
    assert payload is not None, "only what is ready is written"
    body = encode(commit)
    ticket.size_bytes = RECORD_BYTES + len(body) + sum(array.nbytes for array in payload)
    return Entry(_KINDS[type(commit).__name__], getattr(commit, "step", 0), ticket.time_seconds, body, payload)


def _close(journal: Journal) -> None:
    journal.sync()
    journal.close()
