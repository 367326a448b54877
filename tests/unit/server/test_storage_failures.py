"""Failures of the device and the disk: who waits is told, others go on, and the next server finds what was kept."""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from storage_bench import Bench, Halt, until, weight

from kedge.policies import Buffered
from kedge.wire.errors import KedgeError
from kedge_server import app
from kedge_server.engine.run import RunEngine
from kedge_server.storage.errors import StorageFull


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    await bench.close()


@pytest.fixture
def fail_updates(monkeypatch: pytest.MonkeyPatch) -> Callable[[RunEngine, Halt], None]:
    """Lets the next update of a run fail once a halt is over."""

    def fail_updates(run: RunEngine, halt: Halt) -> None:
        def fail(*arguments: object, **named: object) -> None:
            halt.stay()
            raise RuntimeError("out of memory")

        for name in ("parts", "combined"):
            monkeypatch.setattr(run._pipeline._writer._program, name, fail)

    return fail_updates


def reason_of(outcome: object) -> str:
    return outcome.reason if isinstance(outcome, KedgeError) else repr(outcome)


async def test_failed_update_is_told_to_everyone_who_waits(
    bench: Bench, fail_updates: Callable[[RunEngine, Halt], None]
) -> None:
    server = await bench.start()
    run = await server.create(policy=Buffered(size=2))
    first, second = await server.worker(run, "a"), await server.worker(run, "b")
    updating = server.halt()
    fail_updates(run, updating)
    closed = [run.result(worker.send(), None) for worker in (first, second)]
    await updating.reached()
    waiting = [
        *map(asyncio.create_task, closed),
        asyncio.create_task(first.push(wait_seconds=0)),  # held in the next round, behind the step that fails
        asyncio.create_task(server.worker(run, "c")),
        asyncio.create_task(run.checkpoint({})),
        asyncio.create_task(run.snapshot_for(None, min_step=1, wait_seconds=None)),
    ]
    await server.meanwhile()
    assert not any(task.done() for task in waiting)
    updating.end()
    async with asyncio.timeout(20):
        outcomes = await asyncio.gather(*waiting, return_exceptions=True)
    assert set(map(reason_of, outcomes)) == {"RUN_FAILED"}
    second.leave()
    with pytest.raises(KedgeError) as caught:
        await run.acknowledge()
    assert caught.value.reason == "RUN_FAILED"


async def test_failed_update_of_one_run_does_not_stand_in_the_way_of_checkpoints_of_others(
    bench: Bench, fail_updates: Callable[[RunEngine, Halt], None]
) -> None:
    server = await bench.start()
    run, other = await server.create(), await server.create("y")
    worker, of_other = await server.worker(run), await server.worker(other)
    updating = server.halt()
    fail_updates(run, updating)
    worker.send()
    await updating.reached()
    saving = asyncio.create_task(run.checkpoint({}))
    await until(lambda: run._pipeline._jobs)
    updating.end()
    await of_other.push_times(1)
    async with asyncio.timeout(20):
        assert (await other.checkpoint({})).step == 1
        outcomes = await asyncio.gather(saving, return_exceptions=True)
    assert reason_of(outcomes[0]) == "RUN_FAILED"


async def test_run_that_cannot_go_back_on_the_device_ends_and_the_next_server_has_it_gone_back(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **named: object) -> None:
        raise RuntimeError("out of memory")

    server = await bench.start()
    run = await server.create()
    worker = await server.worker(run)
    await worker.push_times(1)
    checkpoint_id = (await run.checkpoint({})).checkpoint_id
    await worker.push_times(2)
    monkeypatch.setattr(run._pipeline._writer, "go_back", fail)
    with pytest.raises(KedgeError) as caught:
        await run.restore(checkpoint_id, request_id="p")
    assert caught.value.reason == "RUN_FAILED"
    with pytest.raises(KedgeError) as caught:
        await server.worker(run)
    assert caught.value.reason == "RUN_FAILED"
    await until(lambda: run.store.durable_step == 1)
    found = (await bench.after_kill(server)).registry.get("runs/x")
    assert (found.snapshot.step, weight(found)) == (1, -1)


async def test_at_journal_sync_what_was_written_before_the_disk_was_full_is_acknowledged_only_when_synced(
    bench: Bench,
) -> None:
    server = await bench.start()
    run = await server.create(durability="journal-sync")
    committer = run.store._committer
    before = committer.image.next_index
    writes: list[int] = []

    def before_write(path: Path, count: int) -> None:
        if path.suffix == ".log":
            writes.append(count)
            if 2 < len(writes) <= 4:  # each record takes two: the first one fits
                raise StorageFull("the disk is full: make room")

    server.files.before_write = before_write
    join = run.join("a", epoch=server.registry.next_epoch(), duration_seconds=600)
    first = committer._tickets[-1]
    run.join("b", epoch=server.registry.next_epoch(), duration_seconds=600)
    synced_at: list[int] = []
    first.when_written(lambda: synced_at.append(committer._journal.synced_index))
    with pytest.raises(KedgeError) as caught:
        await run.acknowledge()
    assert caught.value.reason == "STORAGE_FULL"
    assert synced_at == [before], "the first record, and it was on the disk when it was said to be written"
    found = (await bench.after_kill(server)).registry.get("runs/x")
    assert [lease.epoch for lease in found.state().leases] == [join.epoch]
    await until(lambda: run.store.problem is None)
    await run.acknowledge()
    found = (await bench.after_kill(server)).registry.get("runs/x")
    assert [lease.worker_id for lease in found.state().leases] == ["a", "b"]


@pytest.mark.parametrize("stuck", ["creation", "contribution", "checkpoint"])
async def test_server_ends_though_the_disk_never_answers(
    bench: Bench, stuck: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "_HURRY_SECONDS", 0.05)
    server = await bench.start()
    run = await server.create("y")
    worker = await server.worker(run)
    syncing = server.halt()
    server.files.after_sync = lambda path: syncing.stay()
    if stuck == "creation":
        waiting = asyncio.create_task(server.create("x"))
    elif stuck == "contribution":
        run.store._committer._unsynced_since = 0.0  # the next one is synced at once
        waiting = asyncio.create_task(worker.push())
    else:
        waiting = asyncio.create_task(run.checkpoint({"accuracy": 0.5}))
    await syncing.reached()
    server.registry.end()
    async with asyncio.timeout(20):
        assert not await app._store(server.registry, app.Stop(), 0.05)
    syncing.end()
    await asyncio.wait([waiting])
