"""A contribution in the engine: who hears of its result, and what is kept of it afterwards."""

import asyncio
import gc
import weakref

import pytest

from kedge.wire.errors import KedgeError
from kedge_server.core.values import ContributionHeader, PushResult
from kedge_server.engine.contributions import PendingContribution
from kedge_server.engine.staging import StagingPool

APPLIED = PushResult(1, "applied", "QUORUM_REACHED", "it is part of step 1", 1, 0)


@pytest.fixture
def pool() -> StagingPool:
    return StagingPool(1 << 10)


@pytest.fixture
async def contribution(pool: StagingPool) -> PendingContribution:
    header = ContributionHeader(
        worker_id="a", epoch=1, sequence=1, base_step=0, manifest_digest=b"", example_count=1, loss=None
    )
    return PendingContribution(header, pool.acquire(2))


async def test_who_waits_hears_of_the_result(contribution: PendingContribution) -> None:
    closed, outcome = asyncio.create_task(contribution.closed.wait()), contribution.outcome
    contribution.settle(APPLIED)
    assert await closed
    assert await outcome == APPLIED


async def test_who_asks_later_hears_of_the_same_result(contribution: PendingContribution) -> None:
    contribution.settle(APPLIED)
    assert [await contribution.outcome for _ in range(2)] == [APPLIED] * 2


async def test_settled_contribution_keeps_nothing_to_wait_for(contribution: PendingContribution) -> None:
    parts = [weakref.ref(part) for part in (contribution.closed, contribution.outcome, contribution.gradient)]
    contribution.settle(APPLIED)
    gc.collect()
    assert [part() for part in parts] == [None] * 3


async def test_failure_is_the_outcome_of_one_without_a_result_only(contribution: PendingContribution) -> None:
    contribution.fail(KedgeError("RUN_FAILED", "as the test wants it", run="runs/r"))
    assert contribution.closed.is_set()
    with pytest.raises(KedgeError, match="as the test wants it"):
        await contribution.outcome


async def test_result_is_not_taken_back_by_a_failure(contribution: PendingContribution) -> None:
    contribution.settle(APPLIED)
    contribution.fail(KedgeError("RUN_FAILED", "as the test wants it", run="runs/r"))
    assert await contribution.outcome == APPLIED
