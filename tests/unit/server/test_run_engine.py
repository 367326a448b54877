"""The engine of a run against a clock that stands still until told, and a writer that only adds."""

import asyncio
import heapq
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from kedge import optim
from kedge.optim.controls import StepValues
from kedge.policies import Asynchronous, Policy, Synchronous
from kedge.wire.errors import KedgeError
from kedge.wire.manifest import Manifest
from kedge_server.core.admission import Inspection
from kedge_server.core.values import ContributionHeader, PushResult
from kedge_server.engine.contributions import Contribution
from kedge_server.engine.run import RunConfig, RunEngine
from kedge_server.engine.snapshots import Snapshot
from kedge_server.engine.staging import StagingPool

MANIFEST = Manifest.from_specs([("w", (2,), "float32")])


class ManualClock:
    def __init__(self) -> None:
        self.seconds = 0.0
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._ids = itertools.count()
        self._cancelled: set[int] = set()

    def now(self) -> float:
        return self.seconds

    def call_at(self, at_seconds: float, callback: Callable[[], None]) -> Callable[[], None]:
        number = next(self._ids)
        heapq.heappush(self._timers, (at_seconds, number, callback))
        return lambda: self._cancelled.add(number)

    @property
    def live_timer_count(self) -> int:
        return sum(number not in self._cancelled for _, number, _ in self._timers)

    def advance_to(self, seconds: float) -> None:
        while self._timers and self._timers[0][0] <= seconds:
            at, number, callback = heapq.heappop(self._timers)
            self.seconds = at
            if number not in self._cancelled:
                callback()
        self.seconds = seconds


class AddingWriter:
    """weights -= mean of the gradients; can be told to fail."""

    def __init__(self) -> None:
        self.weights = np.zeros(2)
        self.step = 0
        self.error: Exception | None = None
        self.values: list[Sequence[StepValues]] = []
        self.dtype: type[np.floating[Any]] = np.float64

    def apply(
        self, gradients: Sequence[np.ndarray], mean_weights: Sequence[float], values: Sequence[StepValues]
    ) -> Snapshot:
        self.values.append(values)
        if self.error is not None:
            raise self.error
        self.step += 1
        for weight, gradient in zip(mean_weights, gradients, strict=True):
            self.weights = (self.weights - self.dtype(weight) * gradient.astype(self.dtype)).astype(self.dtype)
        return Snapshot(self.step, 0, (self.weights.astype(np.float32),), None)


class InlineDevice:
    async def run(self, function: Callable[..., object], *arguments: object) -> object:
        await asyncio.sleep(0)
        return function(*arguments)


class Bench:
    """A run with everything around it in a test's hands."""

    def __init__(self, policy: Policy, *, worker_limit: int = 8) -> None:
        self.clock = ManualClock()
        self.writer = AddingWriter()
        self.pool = StagingPool(1 << 20)
        config = RunConfig(
            name="runs/r",
            manifest=MANIFEST,
            optimizer=optim.SGD(lr=1.0),
            policy=policy,
            created_at_seconds=0.0,
            request_id="",
        )
        self.run = RunEngine(
            config,
            self.writer,
            Snapshot(0, 0, (np.zeros(2, np.float32),), None),
            device=InlineDevice(),
            clock=self.clock,
            worker_limit=worker_limit,
            first_epoch=1,
        )
        self._epochs = itertools.count(1)

    def join(self, worker_id: str, lease_seconds: float = 10.0) -> int:
        return self.run.join(worker_id, epoch=next(self._epochs), duration_seconds=lease_seconds).epoch

    def submit(
        self, worker_id: str, epoch: int, sequence: int, value: float = 1.0, *, base_step: int = 0, examples: int = 1
    ) -> Contribution:
        header = self.header(worker_id, epoch, sequence, base_step=base_step, example_count=examples, loss=value)
        buffer = self.pool.acquire(2)
        buffer.array[:] = value
        return self.run.submit(header, buffer, Inspection())

    def header(self, worker_id: str, epoch: int, sequence: int, **fields: Any) -> ContributionHeader:
        defaults = {"base_step": 0, "manifest_digest": MANIFEST.digest, "example_count": 1, "loss": None}
        return ContributionHeader(worker_id=worker_id, epoch=epoch, sequence=sequence, **(defaults | fields))

    async def result(self, contribution: Contribution) -> PushResult:
        return await self.run.result(contribution, None)

    @property
    def staging_in_use(self) -> int:
        free = sum(len(arrays) for arrays in self.pool._free.values())
        return self.pool._held_bytes // 8 - free


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
    assert not contribution.round.closed.is_set()
    bench.clock.advance_to(9)
    assert (await bench.result(contribution)).reason == "ALL_LIVE_CONTRIBUTED"


async def test_heartbeat_keeps_a_round_waiting() -> None:
    bench = Bench(Synchronous(2))
    a, b = bench.join("a", lease_seconds=100), bench.join("b", lease_seconds=5)
    contribution = bench.submit("a", a, 1)
    for moment in (4, 8, 12):
        bench.clock.advance_to(moment)
        bench.run.heartbeat("b", b)
    assert not contribution.round.closed.is_set()


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
    assert not contribution.round.closed.is_set()
    assert bench.run.state().waiting_for == "2 more workers to join: the quorum is 3, 1 live"
    assert (await bench.run.result(contribution, 0)).outcome == "deferred"


async def test_timeout_closes_a_round_that_has_a_contribution() -> None:
    bench = Bench(Synchronous(2, timeout_seconds=3))
    a, _ = bench.join("a", lease_seconds=100), bench.join("b", lease_seconds=100)
    bench.clock.advance_to(50)
    contribution = bench.submit("a", a, 1)
    bench.clock.advance_to(52.9)
    assert not contribution.round.closed.is_set()
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
    assert not first.round.closed.is_set()
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
    waiting = asyncio.create_task(bench.run.wait_for_step(1, None))
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
        await bench.run.wait_for_step(1, 0)
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
    waiting = asyncio.create_task(bench.run.wait_for_step(100, 0.2))
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
    assert (await bench.run.wait_for_step(1, 0)).step == 1  # its weights can still be read
    assert bench.staging_in_use == 0


async def test_decided_contributions_do_not_keep_their_rounds() -> None:
    bench = Bench(Asynchronous())
    a = bench.join("a")
    contribution = bench.submit("a", a, 1)
    await bench.result(contribution)
    assert contribution.round is None


async def test_cohort_that_left_must_gather_again() -> None:
    bench = Bench(Synchronous(2))
    a, b = bench.join("a"), bench.join("b")
    bench.run.leave("a", a)
    bench.run.leave("b", b)
    again = bench.join("a")
    contribution = bench.submit("a", again, 1)
    assert not contribution.round.closed.is_set()
