"""Copies out of and into memory that is lent: small and large ones, and those whose stream ends meanwhile."""

import asyncio
import threading

import numpy as np
import pytest

from kedge_server.core.admission import Inspection
from kedge_server.engine.staging import StagingPool
from kedge_server.rpc import copies
from kedge_server.rpc.copies import Copies

SIZES = [1, 300, 262_144, 262_145, 700_001]


def values(size: int) -> np.ndarray:
    return np.random.default_rng(size).standard_normal(size).astype(np.float32)


@pytest.mark.parametrize("size", SIZES)
async def test_gradient_is_copied_and_its_norm_is_the_copys(size: int) -> None:
    source, buffer = values(size), StagingPool(1 << 30).acquire(size)
    inspection = await Copies().take(source, buffer)
    assert buffer.array.tobytes() == source.tobytes()
    assert inspection.norm == pytest.approx(np.linalg.norm(source.astype(np.float64)), rel=1e-5)
    assert inspection.rejection() is None


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [0, 299_999, 700_000])
async def test_first_element_that_is_not_finite_is_found(bad: float, at: int) -> None:
    source, buffer = values(700_001), StagingPool(1 << 30).acquire(700_001)
    source[at] = source[-1] = bad
    inspection = await Copies().take(source, buffer)
    assert inspection.non_finite_element == at


@pytest.mark.parametrize("size", SIZES)
async def test_weights_of_many_blocks_come_one_after_the_other(size: int) -> None:
    whole = values(size)
    target = np.zeros(size, np.float32)
    cut = size // 3
    await Copies().give((whole[:cut], whole[cut:].reshape(1, -1)), target)
    assert target.tobytes() == whole.tobytes()


async def test_buffer_is_given_back_only_when_nothing_writes_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pool, began, go_on = StagingPool(1 << 30), threading.Event(), threading.Event()

    def slow(source: np.ndarray, target: np.ndarray) -> Inspection:
        began.set()
        assert go_on.wait(30)
        np.copyto(target, source)
        return Inspection()

    monkeypatch.setattr(copies, "_taken", slow)
    buffer = pool.acquire(700_001)
    taking = asyncio.create_task(Copies().take(values(700_001), buffer))
    assert await asyncio.to_thread(began.wait, 30)
    taking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await taking
    assert pool.acquire(700_001).padded is not buffer.padded

    go_on.set()
    async with asyncio.timeout(30):
        while not any(free is buffer.padded for free in pool._free[700_001]):
            await asyncio.sleep(0.01)
