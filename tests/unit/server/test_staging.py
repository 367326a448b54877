"""The pool of staging buffers: reused, aligned, and bounded."""

import numpy as np
import pytest

from kedge.wire.errors import KedgeError
from kedge_server.engine.staging import StagingPool

KIB = 1024


def test_buffer_is_float32_of_its_length_and_aligned_for_jax() -> None:
    array = StagingPool(1 << 20).acquire(1000).array
    assert (array.dtype, array.shape) == (np.float32, (1000,))
    assert array.ctypes.data % 64 == 0


def test_released_buffer_is_lent_again() -> None:
    pool = StagingPool(1 << 20)
    first = pool.acquire(10)
    array = first.array
    first.release()
    first.release()
    assert pool.acquire(10).array is array
    assert pool.acquire(10).array is not array, "releasing twice puts nothing into the pool twice"


def test_over_the_limit_is_refused_with_a_delay_and_possible_after_a_release() -> None:
    pool = StagingPool(8 * KIB)
    held = [pool.acquire(KIB), pool.acquire(KIB)]
    with pytest.raises(KedgeError) as caught:
        pool.acquire(1)
    assert caught.value.reason == "STAGING_FULL"
    assert caught.value.retry_after_seconds > 0
    assert caught.value.metadata == {"limit_bytes": str(8 * KIB)}
    held[0].release()
    pool.acquire(KIB)


def test_unused_buffers_of_another_size_make_room() -> None:
    pool = StagingPool(8 * KIB)
    for buffer in [pool.acquire(KIB), pool.acquire(KIB)]:
        buffer.release()
    pool.acquire(2 * KIB)
    with pytest.raises(KedgeError):
        pool.acquire(KIB)


def test_buffers_of_a_size_can_be_forgotten() -> None:
    pool = StagingPool(8 * KIB)
    buffer = pool.acquire(2 * KIB)
    buffer.release()
    pool.drop_free(2 * KIB)
    assert pool._held_bytes == 0
