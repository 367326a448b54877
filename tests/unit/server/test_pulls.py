"""Who waits at a pull, for what, and with which weights they go on."""

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from engine_bench import Bench

from kedge.policies import Asynchronous, BoundedStaleness, Synchronous
from kedge.wire.errors import KedgeError
from kedge_server.engine.run_state import RunUpdate
from kedge_server.engine.snapshots import Snapshot


async def pull(bench: Bench, worker_id: str | None, *, min_step: int = 0, wait: float | None = 0.0) -> Snapshot:
    return await bench.run.snapshot_for(worker_id, min_step=min_step, wait_seconds=wait)


async def contribute(bench: Bench, worker_id: str, epoch: int, sequence: int, value: float = 1.0) -> None:
    await bench.result(bench.submit(worker_id, epoch, sequence, value))


async def refused(bench: Bench, worker_id: str) -> KedgeError:
    with pytest.raises(KedgeError) as caught:
        await pull(bench, worker_id)
    return caught.value


async def test_worker_beyond_the_bound_waits_and_is_told_for_what() -> None:
    bench = Bench(BoundedStaleness(1))
    a, _ = bench.join("a"), bench.join("b")
    await contribute(bench, "a", a, 1)
    assert (await pull(bench, "a")).step == 1, "one ahead is within the bound"
    await contribute(bench, "a", a, 2)
    error = await refused(bench, "a")
    assert error.reason == "WAITING_FOR_SLOWEST"
    assert error.metadata == {"clock": "2", "slowest_clock": "0", "bound": "1"}
    assert (await pull(bench, "b")).step == 2, "the slowest never waits"
    assert (await pull(bench, None)).step == 2, "nor does who only reads"
    assert bench.run.state().waiting_for == (
        "runs/r/workers/b to contribute: it is at clock 0, others wait at 2, the bound is 1"
    )


@pytest.mark.parametrize("how", ["contribution", "leave", "expiry", "eviction", "policy"])
async def test_pull_that_waits_goes_on_when_the_slowest_does_or_is_gone(how: str) -> None:
    bench = Bench(BoundedStaleness(0))
    a, b = bench.join("a", lease_seconds=100), bench.join("b", lease_seconds=5)
    await contribute(bench, "a", a, 1)
    waiting = asyncio.create_task(pull(bench, "a", wait=None))
    await asyncio.sleep(0)
    assert not waiting.done()
    ways: dict[str, Callable[[], Any]] = {
        "contribution": lambda: bench.submit("b", b, 1),
        "leave": lambda: bench.run.leave("b", b),
        "expiry": lambda: bench.clock.advance_to(5),
        "eviction": lambda: bench.run.evict("b", "too slow", None, request_id=""),
        "policy": lambda: bench.run.update(RunUpdate(policy=Asynchronous()), request_id=""),
    }
    ways[how]()
    snapshot = await asyncio.wait_for(waiting, 10)
    assert snapshot.step == (2 if how == "contribution" else 1)


async def test_in_lockstep_everyone_goes_on_with_the_weights_of_the_barrier() -> None:
    bench = Bench(BoundedStaleness(0))
    a, b = bench.join("a"), bench.join("b")
    await contribute(bench, "a", a, 1, 3.0)
    assert (await pull(bench, "b")).step == 0, "what others have done since the barrier is not seen"
    await contribute(bench, "b", b, 1, 5.0)
    assert (await pull(bench, "a")).step == 2
    await contribute(bench, "a", a, 2, 7.0)
    late = await pull(bench, "b")
    assert late.step == 2
    np.testing.assert_array_equal(late.fast[0], [-8.0, -8.0])
    assert (await pull(bench, None)).step == 3


async def test_pull_within_the_bound_sees_what_the_slowest_clock_stands_for_though_it_is_still_queued() -> None:
    bench = Bench(BoundedStaleness(1))
    a, b = bench.join("a"), bench.join("b")
    bench.submit("a", a, 1)
    bench.submit("b", b, 1)  # closed, but nothing is applied before the loop turns
    assert bench.run.snapshot.step == 0
    assert (await refused(bench, "a")).reason == "STEP_NOT_REACHED"
    assert (await pull(bench, "a", wait=None)).step == 2


async def test_push_without_the_pull_is_rejected_and_does_not_tick_the_clock() -> None:
    bench = Bench(BoundedStaleness(0))
    a, b = bench.join("a"), bench.join("b")
    await contribute(bench, "a", a, 1)
    for sequence in (2, 3):
        result = await bench.result(bench.submit("a", a, sequence))
        assert (result.outcome, result.reason) == ("rejected", "AHEAD_OF_BOUND")
    await contribute(bench, "b", b, 1)
    assert (await pull(bench, "a")).step == 2
    assert [lease.clock for lease in bench.run.state().leases] == [1, 1]


async def test_worker_that_sends_nan_holds_nobody_up() -> None:
    bench = Bench(BoundedStaleness(0))
    a, b = bench.join("a"), bench.join("b")
    await contribute(bench, "a", a, 1)
    result = await bench.result(bench.submit("b", b, 1, float("nan")))
    assert result.reason == "NON_FINITE_GRADIENT"
    assert (await pull(bench, "a")).step == 1


async def test_who_joins_begins_at_the_slowest_clock_and_who_joins_again_keeps_its_own() -> None:
    bench = Bench(BoundedStaleness(1))
    a, b = bench.join("a"), bench.join("b")
    for sequence in (1, 2):
        await contribute(bench, "a", a, sequence)
        await contribute(bench, "b", b, sequence)
    await contribute(bench, "a", a, 3)
    bench.join("c")
    bench.join("a")
    assert {lease.worker_id: lease.clock for lease in bench.run.state().leases} == {"a": 3, "b": 2, "c": 2}


async def test_lockstep_begins_at_the_step_of_the_change() -> None:
    bench = Bench(Synchronous(2))
    a, b = bench.join("a"), bench.join("b")
    first, second = bench.submit("a", a, 1), bench.submit("b", b, 1)
    bench.run.update(RunUpdate(policy=BoundedStaleness(0)), request_id="")
    waiting = asyncio.create_task(pull(bench, "a", wait=None))
    assert {(await bench.result(first)).step, (await bench.result(second)).step} == {1}
    assert (await waiting).step == 1
