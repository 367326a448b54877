"""The registry of runs: creating, deleting, and ending while others create."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import numpy as np
import pytest

from kedge import optim
from kedge.policies import Admission, Buffered, Synchronous
from kedge.wire.errors import KedgeError
from kedge.wire.manifest import Manifest
from kedge_server.core.plan import Plan, plan
from kedge_server.engine.limits import Limits
from kedge_server.engine.registry import NewRun, Registry
from kedge_server.engine.run import RunEngine
from kedge_server.engine.run_state import RunUpdate

LIMITS = Limits(
    contributions_per_run=4096,
    events_per_run=4096,
    staging_bytes=1 << 20,
    runs=2,
    workers_per_run=4,
    parameters_per_run=1000,
    streams=8,
    upload_idle_seconds=1,
    upload_min_bytes_per_second=1 << 16,
    read_idle_seconds=1,
    reading_bytes=1 << 20,
    lease_seconds=10,
    min_lease_seconds=1,
    max_lease_seconds=100,
)


def new(name: str, *, request_id: str = "", count: int = 3) -> NewRun:
    manifest = Manifest.from_specs([("w", (count,), "float32")])
    return NewRun(
        name=f"runs/{name}",
        manifest=manifest,
        optimizer=optim.SGD(),
        policy=Synchronous(1),
        admission=Admission(),
        groups=(),
        request_id=request_id,
    )


@pytest.fixture
async def registry() -> AsyncIterator[Registry]:
    registry = Registry(LIMITS)
    yield registry
    registry.end()
    await registry.store_all(hurry=False)
    registry.close()


async def create(registry: Registry, run: NewRun) -> RunEngine:
    weights = registry.staging.acquire(run.manifest.element_count)
    weights.array[:] = 1
    return await registry.create(run, plan_of(run), weights)


def plan_of(run: NewRun) -> Plan:
    return plan(run.optimizer.spec(), run.manifest, block_elements=2)


def reason_of(outcome: object) -> str:
    return outcome.reason if isinstance(outcome, KedgeError) else "created"


async def test_creations_of_one_name_at_once_make_one_run(registry: Registry) -> None:
    outcomes = await asyncio.gather(
        create(registry, new("a", request_id="x")),
        create(registry, new("a", request_id="x")),
        create(registry, new("a", request_id="y")),
        create(registry, new("a", request_id="x")),
        return_exceptions=True,
    )
    assert [reason_of(outcome) for outcome in outcomes] == ["created", "created", "RUN_ALREADY_EXISTS", "created"]
    assert outcomes[0] is outcomes[1] is outcomes[3] is registry.get("runs/a")
    assert registry.staging._held_bytes == 4 * 3 * sum(map(len, registry.staging._free.values()))


async def test_no_more_runs_than_allowed_and_room_again_after_a_deletion(registry: Registry) -> None:
    outcomes = await asyncio.gather(*(create(registry, new(name)) for name in "abc"), return_exceptions=True)
    assert sorted(map(reason_of, outcomes)) == ["TOO_MANY_RUNS", "created", "created"]
    await registry.delete(registry.list()[0].config.name)
    await create(registry, new("d"))


async def test_model_larger_than_allowed_is_refused(registry: Registry) -> None:
    with pytest.raises(KedgeError) as caught:
        await registry.find_created(new("a", count=1001))
    assert caught.value.reason == "RUN_TOO_LARGE"


async def test_quorum_of_more_workers_than_allowed_is_refused(registry: Registry) -> None:
    room_for_four = replace(new("a"), policy=Synchronous(4))
    with pytest.raises(KedgeError, match=r"a quorum of 5 workers .* limits\.workers_per_run is 4") as caught:
        await registry.find_created(replace(room_for_four, policy=Synchronous(5)))
    assert (caught.value.reason, caught.value.metadata["limit"]) == ("RUN_TOO_LARGE", "4")

    run = await create(registry, room_for_four)
    with pytest.raises(KedgeError, match="a quorum of 5 workers"):
        registry.update(run, RunUpdate(policy=Synchronous(5)), request_id="")
    assert run.policy == Synchronous(4)
    registry.update(run, RunUpdate(policy=Buffered(5)), request_id="")
    assert run.policy == Buffered(5)


async def test_initial_weights_are_copied_out_of_the_staging_buffer(registry: Registry) -> None:
    weights = registry.staging.acquire(3)
    weights.array[:] = 1
    array = weights.array
    run = await registry.create(new("a"), plan_of(new("a")), weights)
    array[:] = 99
    assert np.concatenate(run.snapshot.fast).tolist() == [1, 1, 1]


async def test_ending_waits_for_a_creation_and_ends_its_run(registry: Registry) -> None:
    creation = asyncio.create_task(create(registry, new("a")))
    while not registry._creating:
        await asyncio.sleep(0)
    registry.end()
    await registry.store_all(hurry=False)
    run = await creation
    for call in (lambda: run.join("w", epoch=1, duration_seconds=1), lambda: run.heartbeat("w", 1)):
        with pytest.raises(KedgeError) as caught:
            call()
        assert caught.value.reason == "SERVER_DRAINING"
    with pytest.raises(KedgeError) as caught:
        await create(registry, new("b"))
    assert caught.value.reason == "SERVER_DRAINING"


async def test_run_may_be_deleted_while_the_server_ends(registry: Registry) -> None:
    for name in "ab":
        await create(registry, new(name))
    registry.end()
    ending = asyncio.create_task(registry.store_all(hurry=False))
    await registry.delete("runs/a")
    await ending


async def test_lease_is_held_to_the_bounds(registry: Registry) -> None:
    assert [registry.lease_seconds(wanted) for wanted in (None, 0.01, 5, 1e9)] == [10, 1, 5, 100]


async def test_epochs_grow_from_one_registry_to_the_next() -> None:
    first = Registry(replace(LIMITS, runs=1))
    epochs = [first.next_epoch() for _ in range(3)]
    first.close()
    second = Registry(LIMITS)
    assert epochs == sorted(set(epochs))
    assert second.next_epoch() > epochs[0]
    second.close()
