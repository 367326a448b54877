"""The engine of a run against a clock that stands still until told, and a writer that only adds."""

import asyncio
from typing import Any

import numpy as np
import pytest
from engine_bench import Bench

from kedge.policies import Asynchronous, Synchronous
from kedge.wire.errors import KedgeError
from kedge_server.engine.snapshots import Snapshot


async def test_quorum_closes_a_round_with_the_mean_weighted_by_examples() -> None:
    bench = Bench(Synchronous(2))
    a, b = bench.join("a"), bench.join("b")
    first = bench.submit("a", a, 1, 4.0, examples=1)
    second = bench.submit("b", b, 1, 8.0, examples=3)
    result = await bench.result(first)
    assert (result.outcome, result.reason, result.step) == ("applied", "QUORUM_REACHED", 1)
    assert (await bench.result(second)).step == 1
    assert bench.run.snapshot.fast[0].tolist() == [-7.0, -7.0]  # -(1 * 4 + 3 * 8) / 4
    assert bench.run.state().loss == 7.0
    assert bench.staging_in_use == 0


async def test_lost_worker_delays_a_round_by_its_lease_and_no_more() -> None:
    bench = Bench(Synchronous(2))
    a = bench.join("a", lease_seconds=10)
    bench.clock.advance_to(4)
    bench.join("b", lease_seconds=5)
    contribution = bench.submit("a", a, 1)
    bench.clock.advance_to(8.999)
    assert not contribution.closed.is_set()
    bench.clock.advance_to(9)
    assert (await bench.result(contribution)).reason == "ALL_LIVE_CONTRIBUTED"


async def test_heartbeat_keeps_a_round_waiting() -> None:
    bench = Bench(Synchronous(2))
    a, b = bench.join("a", lease_seconds=100), bench.join("b", lease_seconds=5)
    contribution = bench.submit("a", a, 1)
    for moment in (4, 8, 12):
        bench.clock.advance_to(moment)
        bench.run.heartbeat("b", b)
    assert not contribution.closed.is_set()


async def test_contribution_and_upload_renew_the_lease() -> None:
    bench = Bench(Synchronous(3))
    a = bench.join("a", lease_seconds=5)
    bench.clock.advance_to(4)
    bench.submit("a", a, 1)
    bench.clock.advance_to(8)
    assert [lease.worker_id for lease in bench.run.state().leases] == ["a"]
    bench.run.check(bench.header("a", a, 2))
    bench.clock.advance_to(12)
    assert [lease.worker_id for lease in bench.run.state().leases] == ["a"]
    bench.clock.advance_to(13)
    assert bench.run.state().leases == []


async def test_thousand_heartbeats_leave_one_timer() -> None:
    bench = Bench(Synchronous(1))
    a = bench.join("a")
    for _ in range(1000):
        bench.run.heartbeat("a", a)
    assert bench.clock.live_timer_count == 1


async def test_leaving_frees_a_round_at_once() -> None:
    bench = Bench(Synchronous(2))
    a, b = bench.join("a"), bench.join("b")
    contribution = bench.submit("a", a, 1)
    bench.run.leave("b", b)
    assert (await bench.result(contribution)).reason == "ALL_LIVE_CONTRIBUTED"


async def test_first_worker_alone_waits_for_the_quorum_to_gather() -> None:
    bench = Bench(Synchronous(3))
    a = bench.join("a", lease_seconds=1000)
    contribution = bench.submit("a", a, 1)
    bench.clock.advance_to(500)
    assert not contribution.closed.is_set()
    assert bench.run.state().waiting_for == "2 more workers to join: the quorum is 3, 1 live"
    assert (await bench.run.result(contribution, 0)).outcome == "deferred"


async def test_timeout_closes_a_round_that_has_a_contribution() -> None:
    bench = Bench(Synchronous(2, timeout_seconds=3))
    a, _ = bench.join("a", lease_seconds=100), bench.join("b", lease_seconds=100)
    bench.clock.advance_to(50)
    contribution = bench.submit("a", a, 1)
    bench.clock.advance_to(52.9)
    assert not contribution.closed.is_set()
    bench.clock.advance_to(53)
    assert (await bench.result(contribution)).reason == "TIMEOUT"


async def test_repeated_sequence_joins_the_first_and_counts_once() -> None:
    bench = Bench(Synchronous(2))
    a, b = bench.join("a"), bench.join("b")
    first = bench.submit("a", a, 1, 3.0)
    assert bench.submit("a", a, 1, 3.0) is first
    bench.submit("b", b, 1, 5.0)
    await bench.result(first)
    assert bench.submit("a", a, 1, 3.0) is first
    assert bench.run.snapshot.fast[0].tolist() == [-4.0, -4.0]
    assert bench.run.state().applied_count == 2
    assert bench.staging_in_use == 0


async def test_repetition_after_the_lease_ended_still_finds_its_result() -> None:
    bench = Bench(Asynchronous())
    a = bench.join("a", lease_seconds=5)
    first = bench.submit("a", a, 1)
    await bench.result(first)
    bench.clock.advance_to(6)
    assert bench.submit("a", a, 1) is first
    with pytest.raises(KedgeError) as caught:
        bench.submit("a", a, 2, base_step=1)
    assert caught.value.reason == "LEASE_EXPIRED"
    assert bench.run.snapshot.step == 1
    assert bench.staging_in_use == 0


async def test_new_epoch_fences_the_old_one() -> None:
    bench = Bench(Asynchronous())
    old = bench.join("a")
    new = bench.join("a")
    with pytest.raises(KedgeError) as caught:
        bench.submit("a", old, 1)
    assert caught.value.reason == "WORKER_SUPERSEDED"
    assert caught.value.metadata["current_epoch"] == str(new)
    with pytest.raises(KedgeError):
        bench.run.heartbeat("a", old)
    assert (await bench.result(bench.submit("a", new, 1))).outcome == "applied"


async def test_contribution_of_a_worker_that_died_since_still_counts() -> None:
    bench = Bench(Synchronous(2))
    a, b = bench.join("a", lease_seconds=1), bench.join("b", lease_seconds=100)
    first = bench.submit("a", a, 1, 2.0)
    bench.clock.advance_to(0.5)
    second = bench.submit("b", b, 1, 4.0)
    bench.clock.advance_to(2)
    assert (await bench.result(first)).step == (await bench.result(second)).step == 1


async def test_round_waits_for_the_living_when_only_the_dead_have_contributed() -> None:
    bench = Bench(Synchronous(3))
    a = bench.join("a", lease_seconds=1)
    b, c = bench.join("b", lease_seconds=100), bench.join("c", lease_seconds=100)
    first = bench.submit("a", a, 1)
    bench.clock.advance_to(0.5)
    second = bench.submit("b", b, 1)
    bench.clock.advance_to(10)  # a is gone; two contributions, two live workers, but c has yet to contribute
    assert not first.closed.is_set()
    third = bench.submit("c", c, 1)
    results = [await bench.result(contribution) for contribution in (first, second, third)]
    assert {(result.reason, result.step) for result in results} == {("QUORUM_REACHED", 1)}


async def test_second_contribution_of_a_worker_to_a_round_is_rejected() -> None:
    bench = Bench(Synchronous(2))
    a, _ = bench.join("a"), bench.join("b")
    bench.submit("a", a, 1)
    result = await bench.result(bench.submit("a", a, 2))
    assert (result.outcome, result.reason) == ("rejected", "ALREADY_CONTRIBUTED")


async def test_backup_worker_comes_too_late_for_a_closed_round() -> None:
    bench = Bench(Synchronous(2))
    epochs = [bench.join(name) for name in "abc"]
    for name, epoch in zip("ab", epochs, strict=False):
        bench.submit(name, epoch, 1)
    # The update has not run yet: the round is closed all the same.
    result = await bench.result(bench.submit("c", epochs[2], 1))
    assert (result.outcome, result.reason, result.step) == ("rejected", "STALE_GRADIENT", 1)


async def test_asynchronous_bound_and_inverse_scaling() -> None:
    bench = Bench(Asynchronous(max_staleness=1, scaling="inverse"))
    a = bench.join("a")
    for sequence, value in ((1, 1.0), (2, 1.0)):
        await bench.result(bench.submit("a", a, sequence, value))
    # The second was one step stale: half of it counted.
    assert bench.run.snapshot.fast[0].tolist() == [-1.5, -1.5]
    result = await bench.result(bench.submit("a", a, 3))
    assert (result.outcome, result.reason, result.staleness) == ("rejected", "STALE_GRADIENT", 2)
    assert "2 steps old, the limit is 1" in result.message


async def test_ending_a_run_fails_whatever_waits_in_it() -> None:
    bench = Bench(Synchronous(2))
    a, _ = bench.join("a"), bench.join("b")
    contribution = bench.submit("a", a, 1)
    waiting = asyncio.create_task(bench.run.snapshot_for(None, min_step=1, wait_seconds=None))
    await asyncio.sleep(0)
    bench.run.end(KedgeError("RUN_NOT_FOUND", "deleted", run="runs/r"))
    for pending in (bench.result(contribution), waiting):
        with pytest.raises(KedgeError) as caught:
            await pending
        assert caught.value.reason == "RUN_NOT_FOUND"
    assert bench.staging_in_use == 0


async def test_failed_update_ends_the_run_with_an_error_to_everyone() -> None:
    bench = Bench(Asynchronous())
    a = bench.join("a")
    bench.writer.error = RuntimeError("out of memory")
    first, second = bench.submit("a", a, 1), bench.submit("a", a, 2)
    for contribution in (first, second):
        with pytest.raises(KedgeError) as caught:
            await bench.result(contribution)
        assert caught.value.reason == "RUN_FAILED"
    with pytest.raises(KedgeError):
        bench.join("b")
    assert bench.staging_in_use == 0


async def test_more_workers_than_allowed_are_refused_and_a_known_one_may_rejoin() -> None:
    bench = Bench(Asynchronous(), worker_limit=1)
    bench.join("a")
    with pytest.raises(KedgeError) as caught:
        bench.join("b")
    assert caught.value.reason == "TOO_MANY_WORKERS"
    bench.join("a")


async def test_waiting_for_a_step_that_does_not_come_ends_in_time() -> None:
    bench = Bench(Asynchronous())
    with pytest.raises(KedgeError) as caught:
        await bench.run.snapshot_for(None, min_step=1, wait_seconds=0)
    assert caught.value.reason == "STEP_NOT_REACHED"


async def test_buffers_stay_out_of_the_pool_until_the_update_is_done() -> None:
    bench = Bench(Asynchronous())
    a = bench.join("a")
    seen: list[int] = []
    apply = bench.writer.apply

    def apply_and_look(*arguments: Any) -> Snapshot:
        seen.append(bench.staging_in_use)
        return apply(*arguments)

    bench.writer.apply = apply_and_look
    await bench.result(bench.submit("a", a, 1))
    assert seen == [1]
    assert bench.staging_in_use == 0


async def test_sum_does_not_depend_on_who_came_first() -> None:
    values = {"a": 1e8, "b": 1.0, "c": -1e8}  # in float32 the order of this sum shows

    async def train(order: str) -> bytes:
        bench = Bench(Synchronous(3))
        bench.writer.dtype = np.float32
        epochs = {name: bench.join(name) for name in "abc"}
        held = [bench.submit(name, epochs[name], 1, values[name]) for name in order]
        await bench.result(held[0])
        return bench.run.snapshot.fast[0].tobytes()

    assert await train("abc") == await train("cab") == await train("bca")


async def test_waiting_for_a_far_step_ends_in_time_though_other_steps_come() -> None:
    bench = Bench(Asynchronous())
    a = bench.join("a", lease_seconds=1000)
    waiting = asyncio.create_task(bench.run.snapshot_for(None, min_step=100, wait_seconds=0.2))
    sequence = 0
    while not waiting.done():  # steps go on for as long as it waits; the clock of the wait is the engine's
        bench.clock.advance_to(bench.clock.now() + 0.01)
        sequence += 1
        await bench.result(bench.submit("a", a, sequence, base_step=sequence - 1))
        assert sequence < 100
    with pytest.raises(KedgeError) as caught:
        waiting.result()
    assert caught.value.reason == "STEP_NOT_REACHED"


async def test_ending_fails_what_waits_and_applies_what_is_closed() -> None:
    bench = Bench(Synchronous(2))
    a, b = bench.join("a"), bench.join("b")
    closed = [bench.submit("a", a, 1), bench.submit("b", b, 1)]
    waiting = bench.submit("a", a, 2, base_step=1)
    bench.run.end(KedgeError("SERVER_DRAINING", "going"))
    await bench.run.drain()
    assert [(await bench.result(held)).outcome for held in closed] == ["applied", "applied"]
    with pytest.raises(KedgeError):
        await bench.result(waiting)
    with pytest.raises(KedgeError) as caught:
        bench.submit("b", b, 2, base_step=1)
    assert caught.value.reason == "SERVER_DRAINING"
    assert (await bench.run.snapshot_for(None, min_step=1, wait_seconds=0)).step == 1  # its weights can still be read
    assert bench.staging_in_use == 0


async def test_cohort_that_left_must_gather_again() -> None:
    bench = Bench(Synchronous(2))
    a, b = bench.join("a"), bench.join("b")
    bench.run.leave("a", a)
    bench.run.leave("b", b)
    again = bench.join("a")
    contribution = bench.submit("a", again, 1)
    assert not contribution.closed.is_set()
