"""A committer takes commits to the journal in order, together where it can, and says what stands in its way."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from kedge import optim
from kedge.policies import Admission, Asynchronous, Durability
from kedge.wire.errors import KedgeError
from kedge.wire.manifest import Manifest
from kedge_server.core.commits import Created, Joined, RunConfig, Stepped
from kedge_server.core.image import RunImage
from kedge_server.storage.committer import Committer
from kedge_server.storage.errors import StorageFull, SyncFailed
from kedge_server.storage.files import OsFiles
from kedge_server.storage.journal import Entry, Journal
from kedge_server.storage.plain import decode

PATIENCE_SECONDS = 20


class WatchedJournal(Journal):
    """A journal whose disk a test can fill, stop, and watch."""

    def prepare(self) -> None:
        self.is_full = False
        self.batches: list[int] = []
        self.sync_count = 0
        self.may_write = threading.Event()
        self.may_write.set()

    def append(self, entries: list[Entry]) -> None:
        assert self.may_write.wait(PATIENCE_SECONDS)
        if self.is_full:
            raise StorageFull("the disk is full: make room")
        super().append(entries)
        self.batches.append(len(entries))

    def sync(self) -> None:
        super().sync()
        self.sync_count += 1


class Desk:
    """A committer over a journal in a directory."""

    def __init__(self, directory: Path, level: Durability, sync_seconds: float) -> None:
        config = RunConfig(
            name="runs/r",
            manifest=Manifest.from_specs([("w", (2,), "float32")]),
            optimizer=optim.SGD(lr=1.0),
            created_at_seconds=0.0,
            durability=level,
            block_elements=2,
            first_epoch=1,
        )
        created = Created(config, Asynchronous(), Admission(), ())
        self.directory = directory
        self.journal = WatchedJournal.open(directory, OsFiles(), segment_bytes=1 << 20)
        self.journal.prepare()
        self.journal.append([Entry(1, 0, 0.0, b'"created"', ())])
        self.journal.batches.clear()
        self.executor = ThreadPoolExecutor(2)
        self.failures: list[SyncFailed] = []
        self.image = RunImage.create(created)
        self.committer = Committer(
            self.image,
            self.journal,
            level=level,
            sync_seconds=sync_seconds,
            executor=self.executor,
            on_sync_failed=self.failures.append,
        )

    def written(self) -> list[object]:
        """What another journal reads from the directory, but for the creation."""
        with_all = Journal.open(self.directory, OsFiles(), segment_bytes=1 << 20, repairs=False)
        records = [decode(record.body) for record in with_all.records(2)]
        with_all.close()
        return records


@pytest.fixture
async def new_desk(tmp_path: Path) -> AsyncIterator[Callable[..., Desk]]:
    desks: list[Desk] = []

    def make(level: Durability = "journal", sync_seconds: float = 0.5) -> Desk:
        desks.append(Desk(tmp_path / "journal", level, sync_seconds))
        return desks[-1]

    yield make
    for desk in desks:
        desk.journal.may_write.set()
        await desk.committer.close(hurry=True)
        desk.executor.shutdown()


def joined(number: int) -> Joined:
    return Joined(f"w{number}", number, 10.0)


def stepped(step: int) -> Stepped:
    return Stepped(step, "EACH_CONTRIBUTION", (), None, 0, ())


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not condition():
            await asyncio.sleep(0.001)


async def test_what_is_acknowledged_is_in_the_journal_and_in_the_image(new_desk: Callable[..., Desk]) -> None:
    desk = new_desk()
    desk.committer.take(joined(1), ())
    assert len(desk.image.leases) == 0, "it is not written yet"
    await desk.committer.acknowledge()
    assert desk.written() == [joined(1)]
    assert desk.image.leases.of_worker("w1").epoch == 1


async def test_commits_behind_one_whose_payload_is_to_come_wait_for_it(new_desk: Callable[..., Desk]) -> None:
    desk = new_desk()
    reserved = desk.committer.take(stepped(1), None)
    after = desk.committer.take(joined(1), ())
    desk.committer.take(joined(2), ())
    await asyncio.sleep(0)
    assert desk.written() == []
    desk.committer.provide(reserved, [np.float32([1, 2])])
    await desk.committer.written(after)
    await desk.committer.acknowledge()
    assert desk.written() == [stepped(1), joined(1), joined(2)]
    assert (desk.image.step, desk.image.next_index) == (1, 5)


async def test_what_comes_while_the_disk_is_busy_is_written_together(new_desk: Callable[..., Desk]) -> None:
    desk = new_desk("journal-sync")
    desk.journal.may_write.clear()
    desk.committer.take(joined(1), ())
    await asyncio.sleep(0)
    for number in range(2, 12):
        desk.committer.take(joined(number), ())
    desk.journal.may_write.set()
    await desk.committer.acknowledge()
    assert desk.journal.batches == [1, 10]
    assert desk.journal.sync_count == 2
    assert desk.written() == [joined(number) for number in range(1, 12)]


async def test_full_disk_is_said_at_once_and_what_was_taken_is_written_when_there_is_room(
    new_desk: Callable[..., Desk],
) -> None:
    desk = new_desk()
    desk.journal.is_full = True
    desk.committer.take(joined(1), ())
    with pytest.raises(KedgeError) as caught:
        await desk.committer.acknowledge()
    assert (caught.value.reason, caught.value.metadata) == ("STORAGE_FULL", {"run": "runs/r"})
    with pytest.raises(KedgeError):
        await desk.committer.until(asyncio.get_running_loop().create_future())
    assert desk.image.next_index == 2
    desk.journal.is_full = False
    await until(lambda: desk.committer.problem is None)
    await desk.committer.acknowledge()
    assert desk.written() == [joined(1)]


async def test_defect_in_writing_is_said_and_stops_no_one_for_ever(new_desk: Callable[..., Desk]) -> None:
    desk = new_desk()
    ticket = desk.committer.take(joined(1), ())
    ticket.commit = object()  # no commit: it cannot be encoded
    with pytest.raises(KedgeError) as caught:
        await desk.committer.acknowledge()
    assert caught.value.reason == "STORAGE_UNAVAILABLE"
    ticket.commit = joined(1)
    await until(lambda: ticket.is_written)


async def test_at_level_journal_nothing_stays_unsynced_for_long(new_desk: Callable[..., Desk]) -> None:
    desk = new_desk(sync_seconds=0.05)
    desk.committer.take(joined(1), ())
    await desk.committer.acknowledge()
    assert desk.journal.synced_index < 2 or desk.journal.sync_count, "acknowledged before it is synced, or just synced"
    await until(lambda: desk.journal.synced_index == 2)


async def test_at_level_journal_a_late_sync_comes_before_the_next_acknowledgement(
    new_desk: Callable[..., Desk],
) -> None:
    """As on a loop so busy that the timer does not run: what is written next brings the older to the disk."""
    desk = new_desk(sync_seconds=0.0)
    for number in range(1, 4):
        desk.committer.take(joined(number), ())
        await desk.committer.acknowledge()
        assert desk.journal.synced_index == number + 1


async def test_run_that_is_closed_tells_those_who_wait_for_what_is_not_written(new_desk: Callable[..., Desk]) -> None:
    desk = new_desk()
    reserved = desk.committer.take(stepped(1), None)
    waiting = asyncio.create_task(desk.committer.written(reserved))
    await asyncio.sleep(0)
    await desk.committer.close(hurry=True)
    with pytest.raises(KedgeError) as caught:
        await waiting
    assert caught.value.reason == "SERVER_DRAINING"


async def test_close_writes_what_is_there_to_be_written(new_desk: Callable[..., Desk]) -> None:
    desk = new_desk()
    for number in range(1, 4):
        desk.committer.take(joined(number), ())
    await desk.committer.close(hurry=False)
    assert desk.written() == [joined(number) for number in range(1, 4)]
    assert desk.journal.synced_index == 4


async def test_close_with_a_full_disk_does_not_wait_for_room(new_desk: Callable[..., Desk]) -> None:
    desk = new_desk()
    desk.journal.is_full = True
    desk.committer.take(joined(1), ())
    with pytest.raises(KedgeError):
        await desk.committer.acknowledge()
    async with asyncio.timeout(PATIENCE_SECONDS):
        await desk.committer.close(hurry=False)
    assert desk.written() == []
