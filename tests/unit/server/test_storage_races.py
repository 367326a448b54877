"""What happens at the same time on a run that is kept: each of it once, and what is written as it was taken."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from storage_bench import GRADIENT_BYTES, SIZE, Bench, until, weight

from kedge.policies import Asynchronous, Buffered, Checkpoints, Synchronous
from kedge.wire.errors import KedgeError
from kedge_server.engine.run import RunEngine
from kedge_server.engine.run_state import RunUpdate
from kedge_server.storage.errors import StorageFull

TRIMMED = Synchronous(3, combine="trimmed_mean", trim_count=1)
"""A round of fewer than three cannot be combined: with another policy in its place it is refused."""


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    await bench.close()


def told(run: RunEngine, kind: str) -> int:
    return sum(event.kind == kind for event in run.feed.reader(after_number=0).take(1000))


@pytest.mark.parametrize(("request_ids", "times"), [(("p", "p"), 1), (("p", "q"), 2)])
async def test_restores_at_once_are_done_one_after_the_other_and_once_for_each_request(
    bench: Bench, request_ids: tuple[str, str], times: int
) -> None:
    server = await bench.start()
    run = await server.create()
    worker = await server.worker(run)
    await worker.push_times(2)
    checkpoint_id = (await run.checkpoint({})).checkpoint_id
    await worker.push_times(2)
    device = server.halt_device()
    worker.send()
    restores = [asyncio.create_task(run.restore(checkpoint_id, request_id=each)) for each in request_ids]
    await until(lambda: run._is_going_back)
    await run.store.load(checkpoint_id)  # whoever came before has it, too
    device.end()
    assert await asyncio.gather(*restores) == [2, 2]
    assert told(run, "restored") == times
    await (await server.worker(run)).push_times(3)
    assert (run.snapshot.step, weight(run)) == (5, -5)
    found = (await bench.after_kill(server)).registry.get("runs/x")
    assert (found.snapshot.step, weight(found)) == (5, -5)


async def test_checkpoint_of_a_deleted_run_does_not_come_to_another_of_its_name(bench: Bench) -> None:
    server = await bench.start()
    old = await server.create()
    await (await server.worker(old)).push_times(5)
    device = server.halt_device()
    saving = asyncio.create_task(old.checkpoint({}))
    await until(lambda: old._pipeline.is_busy)
    await server.registry.delete("runs/x")
    saver = server.halt_checkpoints()
    device.end()
    new = await server.create(initial=7)
    await (await server.worker(new)).push_times(1)
    saver.end()
    with pytest.raises(KedgeError) as caught:
        await saving
    assert caught.value.reason == "STORAGE_UNAVAILABLE"
    assert not list((server.directory / "runs/x/checkpoints").iterdir())
    found = (await bench.after_kill(server)).registry.get("runs/x")
    assert (found.snapshot.step, weight(found)) == (1, 6)


async def test_checkpoint_that_a_restore_has_read_stays(bench: Bench) -> None:
    server = await bench.start()
    run = await server.create(checkpoints=Checkpoints(keep_latest=2))
    worker = await server.worker(run)
    checkpoints = []
    for _ in range(2):
        await worker.push_times(1)
        checkpoints.append((await run.checkpoint({})).checkpoint_id)
    await worker.push_times(1)
    saver = server.halt()
    server.files.after_sync = lambda path: saver.stay() if "checkpoints" in path.parts else None
    saving = asyncio.create_task(run.checkpoint({}))
    await saver.reached()
    device = server.halt_device()
    worker.send()
    restoring = asyncio.create_task(run.restore(checkpoints[0], request_id="p"))
    await until(server.storage._checkpoints._work_queue.qsize)
    saver.end()
    await saving
    device.end()
    assert await restoring == 1
    assert checkpoints[0] in [info.checkpoint_id for info in run.store.checkpoints()]
    await (await server.worker(run)).push_times(1)
    found = (await bench.after_kill(server)).registry.get("runs/x")
    assert (found.snapshot.step, weight(found)) == (2, -2)


async def test_run_is_deleted_only_when_its_journal_is_written_no_more(bench: Bench) -> None:
    """The descriptor of a file that is closed is that of the next one that is opened."""
    server = await bench.start()
    run = await server.create()
    worker = await server.worker(run)
    retry, counts = server.halt(), []

    def before_write(path: Path, count: int) -> None:
        if path.parent.parent.name != "x" or path.suffix != ".log":
            return
        counts.append(count)
        if len(counts) == 1:
            raise StorageFull("the disk is full: make room")
        retry.stay()

    server.files.before_write = before_write
    worker.send()
    await retry.reached()
    deleting = asyncio.create_task(server.registry.delete("runs/x"))
    await server.meanwhile()
    other = await server.create("y")
    retry.end()
    await deleting
    await (await server.worker(other)).push_times(1)
    assert server.files.collisions == []
    found = (await bench.after_kill(server)).registry.list()
    assert [(each.config.name, each.snapshot.step, weight(each)) for each in found] == [("runs/y", 1, -1)]


async def test_gradient_is_written_as_it_came_though_its_round_is_refused_meanwhile(bench: Bench) -> None:
    server = await bench.start()
    run = await server.create(policy=TRIMMED)
    held, other = await server.worker(run, "a"), await server.worker(run, "b")
    writing = server.halt_writes(count=GRADIENT_BYTES)  # its sum is written already
    pushing = asyncio.create_task(held.push(1, wait_seconds=0))
    await writing.reached()
    server.registry.update(run, RunUpdate(policy=Asynchronous()), request_id="p")
    sent = other.send(2)
    writing.end()
    await pushing
    assert (await run.result(sent, None)).outcome == "applied"
    found = (await bench.after_kill(server)).registry.get("runs/x")
    assert (found.snapshot.step, weight(found)) == (1, -2)
    assert found.state().rejected_counts == run.state().rejected_counts != {}


async def test_gradient_of_a_failed_update_is_written_as_it_came(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **named: object) -> None:
        raise RuntimeError("out of memory")

    server = await bench.start()
    run, other = await server.create(), await server.create("y", policy=Buffered(size=3))
    worker, of_other = await server.worker(run), await server.worker(other)
    monkeypatch.setattr(run._pipeline._writer._program, "apply_parts", fail)
    syncing = server.halt_syncs()
    sync = asyncio.create_task(run.store._committer.sync())
    await syncing.reached()
    with pytest.raises(KedgeError) as caught:
        await worker.push(1)
    assert caught.value.reason == "RUN_FAILED"
    of_other.send(1000)
    syncing.end()
    await sync
    await until(lambda: run.store.durable_step == 1)
    found = (await bench.after_kill(server)).registry.get("runs/x")
    assert (found.snapshot.step, weight(found)) == (1, -1)


async def test_rejection_is_told_only_when_it_is_written(bench: Bench) -> None:
    server = await bench.start()
    run = await server.create(policy=TRIMMED, durability="journal-sync")
    worker = await server.worker(run)
    pushing = asyncio.create_task(worker.push())
    await until(lambda: run.state().contribution_count)
    syncing = server.halt_syncs()
    server.registry.update(run, RunUpdate(policy=Asynchronous()), request_id="p")
    await syncing.reached()
    await server.meanwhile()
    assert not pushing.done()
    syncing.end()
    assert (await pushing).outcome == "rejected"
    assert worker.send_again().result == await pushing


async def test_checkpoint_right_after_going_back_is_of_one_state(bench: Bench) -> None:
    server = await bench.start()
    run = await server.create()
    worker = await server.worker(run)
    await worker.push_times(2)
    checkpoint_id = (await run.checkpoint({})).checkpoint_id
    await worker.push_times(3)
    writing = server.halt_writes()
    restoring = asyncio.create_task(run.restore(checkpoint_id, request_id="p"))
    await until(lambda: run._coordinator.closed_step == 2)
    saving = asyncio.create_task(run.checkpoint({"accuracy": 0.5}))
    await writing.reached()
    await server.meanwhile()
    writing.end()
    assert await restoring == 2
    taken = await run.store.load((await saving).checkpoint_id)
    assert (taken.image.step, set(taken.arrays["fast.00000"][:SIZE].tolist())) == (2, {-2})


async def test_server_ends_well_while_the_refusal_of_what_is_held_is_written(bench: Bench) -> None:
    server = await bench.start()
    run = await server.create(policy=TRIMMED)
    assert (await (await server.worker(run)).push(wait_seconds=0)).outcome == "deferred"
    writing = server.halt_writes()
    server.registry.update(run, RunUpdate(policy=Asynchronous()), request_id="p")
    server.registry.end()
    ending = asyncio.create_task(server.registry.store_all(hurry=False))
    await writing.reached()
    await server.meanwhile()
    writing.end()
    await ending
    found = (await bench.after_kill(server)).registry.get("runs/x")
    assert len(found.store.checkpoints()) == 1
    assert (found.state().contribution_count, found.policy) == (0, Asynchronous())
    assert found.state().rejected_counts == run.state().rejected_counts != {}


async def test_who_leaves_when_the_journal_is_closed_is_told_that_it_is_not_stored(bench: Bench) -> None:
    server = await bench.start()
    run = await server.create()
    worker = await server.worker(run)
    server.registry.end()
    await server.registry.store_all(hurry=False)
    worker.leave()
    with pytest.raises(KedgeError) as caught:
        await run.acknowledge()
    assert caught.value.reason == "SERVER_DRAINING"
    found = (await bench.after_kill(server)).registry.get("runs/x")
    assert [lease.worker_id for lease in found.state().leases] == ["a"]
