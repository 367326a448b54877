"""Calls whose caller has gone in the middle: what they began is done whole, and a repetition finds it."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from storage_bench import GRADIENT_BYTES, Bench, until, weight

from kedge.policies import Buffered
from kedge.wire.errors import KedgeError


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    await bench.close()


async def leave_alone(call: "asyncio.Task[object]") -> None:
    """What becomes of an RPC whose client has gone."""
    call.cancel()
    await asyncio.wait([call])
    assert call.cancelled()


async def test_journal_is_written_only_when_the_sync_of_a_cancelled_checkpoint_is_done(bench: Bench) -> None:
    """Else what was written during that sync would count as synced."""
    server = await bench.start()
    run = await server.create()
    worker = await server.worker(run)
    await worker.push_times(1)
    syncing = server.halt_syncs()
    saving = asyncio.create_task(run.checkpoint({}))
    await syncing.reached()
    covered = run.store._committer._journal.next_index - 1
    await leave_alone(saving)
    pushing = asyncio.create_task(worker.push())
    await server.meanwhile()
    assert not pushing.done()
    assert run.store._committer._journal.next_index - 1 == covered
    syncing.end()
    assert (await pushing).outcome == "applied"


async def test_cancelled_creation_is_done_whole_and_its_repetition_finds_the_run(bench: Bench) -> None:
    server = await bench.start()
    other = await server.create("y", policy=Buffered(size=3))
    worker = await server.worker(other)
    writing = server.halt_writes(count=GRADIENT_BYTES)  # its sum is written already
    creating = asyncio.create_task(server.create(initial=1, request_id="p"))
    await writing.reached()
    await leave_alone(creating)
    worker.send(9)  # gets no buffer that is still being read
    writing.end()
    run = await server.create(initial=1, request_id="p")
    assert server.registry.get("runs/x") is run
    found = (await bench.after_kill(server)).registry.get("runs/x")
    assert (weight(run), weight(found)) == (1, 1)


async def test_cancelled_fork_is_done_whole_and_its_repetition_finds_the_run(bench: Bench) -> None:
    server = await bench.start()
    run = await server.create()
    await (await server.worker(run)).push_times(2)
    checkpoint_id = (await run.checkpoint({})).checkpoint_id
    writing = server.halt_writes("y")
    forking = asyncio.create_task(server.registry.fork(run, checkpoint_id, "runs/y", request_id="p"))
    await writing.reached()
    await leave_alone(forking)
    writing.end()
    forked = await server.registry.fork(run, checkpoint_id, "runs/y", request_id="p")
    assert server.registry.get("runs/y") is forked
    found = (await bench.after_kill(server)).registry.get("runs/y")
    assert [(each.snapshot.step, weight(each)) for each in (forked, found)] == [(2, -2), (2, -2)]


async def test_cancelled_deletion_is_done_whole_and_its_name_is_free(bench: Bench) -> None:
    server = await bench.start()
    await server.create(initial=1)
    saver = server.halt_checkpoints()
    deleting = asyncio.create_task(server.registry.delete("runs/x"))
    await until(server.storage._checkpoints._work_queue.qsize)
    await leave_alone(deleting)
    saver.end()
    await server.create(initial=2)
    with pytest.raises(KedgeError) as caught:
        await server.registry.delete("runs/y")
    assert caught.value.reason == "RUN_NOT_FOUND"
    found = (await bench.after_kill(server)).registry.list()
    assert [weight(run) for run in found] == [2]


async def test_cancelled_restore_is_done_whole_and_its_repetition_is_told_the_step(bench: Bench) -> None:
    server = await bench.start()
    run = await server.create()
    worker = await server.worker(run)
    await worker.push_times(2)
    checkpoint_id = (await run.checkpoint({})).checkpoint_id
    await worker.push_times(3)
    writing = server.halt_writes()
    restoring = asyncio.create_task(run.restore(checkpoint_id, request_id="p"))
    await writing.reached()
    await leave_alone(restoring)
    writing.end()
    assert await run.restore(checkpoint_id, request_id="p") == 2
    assert (run.snapshot.step, weight(run)) == (2, -2)
    await (await server.worker(run)).push_times(1)
    found = (await bench.after_kill(server)).registry.get("runs/x")
    assert [(each.snapshot.step, weight(each)) for each in (run, found)] == [(3, -3), (3, -3)]
