"""What is kept of a run is what it is, whatever it has been through, and how much of it there is, is counted whole."""

import asyncio
import shutil
import time
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from storage_bench import Bench, Server, Worker, until, weight

from kedge.policies import Buffered, Checkpoints
from kedge.wire.errors import KedgeError
from kedge_server.core import image
from kedge_server.engine.registry import RecoveryFailed
from kedge_server.engine.run import RunEngine
from kedge_server.storage.errors import DataDirError
from kedge_server.storage.files import OsFiles
from kedge_server.storage.recovery import Recovery


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    await bench.close()


async def close_round(server: Server, run: RunEngine, missing_count: int) -> None:
    """A worker that has sent nothing yet sends what is missing."""
    worker = await server.worker(run, "last")
    sent = [worker.send() for _ in range(missing_count)]
    async with asyncio.timeout(20):
        assert {(await run.result(each, None)).outcome for each in sent} == {"applied"}


@pytest.mark.parametrize("is_checkpointed", [True, False])
async def test_more_contributions_of_one_worker_are_held_than_its_ledger_remembers(
    bench: Bench, is_checkpointed: bool
) -> None:
    server = await bench.start()
    run = await server.create(policy=Buffered(size=100))
    worker = await server.worker(run)
    sent = [worker.send() for _ in range(70)]
    results = await asyncio.gather(*(run.result(each, 0) for each in sent))
    assert {result.outcome for result in results} == {"deferred"}
    if is_checkpointed:
        await run.checkpoint({})
    after = await bench.after_kill(server)
    found = after.registry.get("runs/x")
    assert found.state().contribution_count == 70
    await close_round(after, found, 30)
    assert (found.snapshot.step, weight(found)) == (1, pytest.approx(-1))


@pytest.mark.parametrize("is_checkpointed", [True, False])
async def test_contributions_are_held_of_more_workers_that_left_than_are_remembered(
    bench: Bench, is_checkpointed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image, "_REMEMBERED_EPOCHS", 1024)  # as many as the coordinator remembers
    server = await bench.start(workers_per_run=256)
    run = await server.create(policy=Buffered(size=2000))
    expected = {}
    for group in range(5):
        workers = [Worker(server, run, f"w{group}-{number}") for number in range(256)]
        sent = {worker.send(number): number for number, worker in enumerate(workers, 256 * group)}
        results = await asyncio.gather(*(run.result(each, 0) for each in sent))
        assert {result.outcome for result in results} == {"deferred"}
        for worker in workers:
            worker.leave()
        expected |= {each.header.identity: {number} for each, number in sent.items()}
    await run.acknowledge()
    if is_checkpointed:
        await run.checkpoint({})
    found = (await bench.after_kill(server)).registry.get("runs/x")
    assert found.state().contribution_count == 1280
    gradients = found._held.gradients(expected)
    assert {key: set(gradient.tolist()) for key, gradient in gradients.items()} == expected


@pytest.mark.parametrize("level", ["checkpoint", "journal"])
async def test_run_that_went_back_is_not_taken_for_what_it_was_at_the_same_step(bench: Bench, level: Any) -> None:
    server = await bench.start()
    run = await server.create(durability=level)
    worker = await server.worker(run)
    await worker.push_times(2)
    second = await run.checkpoint({})
    await worker.push_times(2)
    abandoned = await run.checkpoint({})
    await run.restore(second.checkpoint_id, request_id="p")
    worker = await server.worker(run)
    for _ in range(2):
        await worker.push(10)
    assert (run.snapshot.step, weight(run)) == (4, -22)
    assert run.store.durable_step == (4 if level == "journal" else 2)
    server.registry.end()
    await server.registry.store_all(hurry=False)
    after = await bench.after_kill(server)
    found = after.registry.get("runs/x")
    assert (found.snapshot.step, weight(found)) == (4, -22)
    assert found.store.checkpoints()[0].checkpoint_id != abandoned.checkpoint_id
    assert found.store.checkpoints()[0].step == 4


async def test_steps_count_from_where_a_run_went_back_to_until_a_checkpoint_is_due(bench: Bench) -> None:
    server = await bench.start()
    run = await server.create(checkpoints=Checkpoints(keep_latest=9, every_steps=2))

    def newest() -> tuple[int, ...]:
        return tuple(info.step for info in run.store.checkpoints()[:1])

    worker = await server.worker(run)
    for step in (2, 4):
        await worker.push_times(2)
        await until(lambda step=step: newest() == (step,))
        await until(lambda: run._checkpointer._taking is None)
    earlier = run.store.checkpoints()[1]
    await run.restore(earlier.checkpoint_id, request_id="p")
    before = len(run.store.checkpoints())
    await (await server.worker(run)).push_times(2)
    await until(lambda: len(run.store.checkpoints()) > before)
    assert newest() == (4,)


async def test_without_a_journal_a_restore_is_durable_when_it_is_acknowledged(bench: Bench) -> None:
    server = await bench.start()
    run = await server.create(durability="checkpoint")
    worker = await server.worker(run)
    await worker.push_times(2)
    checkpoint_id = (await run.checkpoint({})).checkpoint_id
    await worker.push_times(2)
    await run.checkpoint({})
    assert await run.restore(checkpoint_id, request_id="p") == 2
    found = (await bench.after_kill(server)).registry.get("runs/x")
    assert (found.snapshot.step, weight(found)) == (2, -2)


async def problems_of(directory: Path) -> list[str]:
    recovery = Recovery("runs/x", directory, OsFiles(), segment_bytes=1 << 20, repairs=False)
    await asyncio.to_thread(recovery.open)
    return recovery.problems


async def test_run_without_a_journal_goes_on_from_its_checkpoint_and_says_so_but_not_without_segments(
    bench: Bench,
) -> None:
    server = await bench.start()
    run = await server.create()
    worker = await server.worker(run)
    await worker.push_times(2)
    await run.checkpoint({})
    assert await problems_of(server.directory / "runs/x") == []
    await worker.push_times(3)
    await run.store._committer.sync()

    def remove(pattern: str, runs: Path) -> None:
        for path in (runs / "x/journal").glob(pattern):
            path.unlink()

    for pattern in ("*.log", "*"):
        with pytest.raises(RecoveryFailed, match=r"runs/x: .*journal"):
            await bench.after_kill(server, partial(remove, pattern))
    shutil.copytree(server.directory / "runs/x", copy := server.directory.parent / "copy")
    shutil.rmtree(copy / "journal")
    assert [problem for problem in await problems_of(copy) if "no journal" in problem]
    after = await bench.after_kill(server, lambda runs: shutil.rmtree(runs / "x/journal"))
    found = after.registry.get("runs/x")
    assert (found.snapshot.step, weight(found)) == (2, -2)


async def test_checkpoints_come_due_though_the_clock_is_set_back(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    server = await bench.start()
    run = await server.create(checkpoints=Checkpoints(keep_latest=9, every_seconds=0.05))
    worker = await server.worker(run)
    await worker.push_times(1)
    await run.checkpoint({"accuracy": 0.5})
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() - 86400)
    await worker.push_times(1)

    def is_taken() -> bool:
        server.registry.take_due_checkpoints()
        return run.store.checkpoints()[0].step == 2

    await until(is_taken)


async def test_all_of_the_journal_counts_toward_the_next_checkpoint(bench: Bench) -> None:
    server = await bench.start()
    run = await server.create(policy=Buffered(size=2))
    worker = await server.worker(run)
    written, on_disk = run.store._committer.written_bytes, server.journal_bytes()
    other = await server.worker(run, "b")
    await worker.push(wait_seconds=0)
    await other.push()
    other.leave()
    await run.acknowledge()
    assert run.store._committer.written_bytes - written == server.journal_bytes() - on_disk > 2 * 256


async def test_checkpoint_of_another_history_is_not_mixed_with_the_journal(bench: Bench, tmp_path: Path) -> None:
    """A run is deleted and created anew under its name; a checkpoint of the first is brought back from a copy."""
    server = await bench.start()
    run = await server.create()
    await (await server.worker(run)).push_times(5)
    old = await run.checkpoint({})
    copy = tmp_path / "copy"
    checkpoints = server.directory / "runs" / "x" / "checkpoints"
    shutil.copytree(checkpoints / old.checkpoint_id, copy)
    await server.registry.delete("runs/x")
    run = await server.create()
    worker = await server.worker(run)
    for _ in range(9):
        await worker.push(10)
    after = await bench.after_kill(
        server, lambda runs: shutil.copytree(copy, runs / "x" / "checkpoints" / old.checkpoint_id)
    )
    found = after.registry.get("runs/x")
    assert (found.snapshot.step, weight(found)) == (9, -90)


async def test_directory_that_is_no_run_is_left_alone_and_said(bench: Bench) -> None:
    server = await bench.start()
    await server.create()

    def add(runs: Path) -> None:
        (runs / "Nov22_host").mkdir()
        (runs / "Nov22_host" / "events.out.tfevents.1").write_bytes(bytes(8))

    with pytest.raises(DataDirError, match=r"Nov22_host holds events\.out\.tfevents\.1"):
        await bench.after_kill(server, add)


async def test_run_whose_journal_and_checkpoints_are_gone_is_not_taken_for_one_never_created(bench: Bench) -> None:
    server = await bench.start()
    await server.create()
    with pytest.raises(RecoveryFailed, match="its journal is gone"):
        await bench.after_kill(server, lambda runs: shutil.rmtree(runs / "x" / "journal"))


async def test_who_waits_when_a_run_is_closed_in_a_hurry_is_told_that_the_server_ends(bench: Bench) -> None:
    server = await bench.start()
    run = await server.create()
    worker = await server.worker(run)
    halt = server.halt_writes()
    sent = [worker.send() for _ in range(3)]
    waiting = [asyncio.create_task(run.result(each, None)) for each in sent]
    await halt.reached()
    server.registry.end()
    closing = asyncio.create_task(server.registry.store_all(hurry=True))
    await asyncio.sleep(0)
    halt.end()
    await closing
    outcomes = await asyncio.gather(*waiting, return_exceptions=True)
    said = {outcome.reason for outcome in outcomes if isinstance(outcome, KedgeError)}
    assert said <= {"SERVER_DRAINING"}
    assert all(isinstance(outcome, KedgeError) or outcome.outcome == "applied" for outcome in outcomes)
