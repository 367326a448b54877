"""Staging buffers: where gradients are put together. Pooled, and bounded by a budget of bytes for the whole server.

A buffer may be read by a compiled update without a copy (JAX aliases aligned host memory on the CPU): release it only
when that update has finished.
"""

from collections import defaultdict

import numpy as np

from kedge.wire.errors import KedgeError

_ALIGNMENT_BYTES = 64
_RETRY_AFTER_SECONDS = 0.5


class StagingBuffer:
    """A float32 array on loan from the pool."""

    def __init__(self, array: np.ndarray, pool: "StagingPool") -> None:
        self.array = array
        self._pool: StagingPool | None = pool

    def release(self) -> None:
        """Gives it back. Doing so again changes nothing."""
        if self._pool is not None:
            self._pool._take_back(self.array)
            self._pool = None


class StagingPool:
    """The buffers of all runs.

    Args:
        limit_bytes: all buffers together, in use or not.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._held_bytes = 0
        self._free: dict[int, list[np.ndarray]] = defaultdict(list)

    def acquire(self, element_count: int) -> StagingBuffer:
        """Lends a buffer whose content is arbitrary.

        Raises:
            KedgeError: STAGING_FULL.
        """
        if self._free[element_count]:
            return StagingBuffer(self._free[element_count].pop(), self)
        size_bytes = 4 * element_count
        if self._held_bytes + size_bytes > self._limit_bytes:
            self._drop_free()
        if self._held_bytes + size_bytes > self._limit_bytes:
            raise KedgeError(
                "STAGING_FULL",
                f"a gradient of {size_bytes} bytes does not fit: {self._held_bytes} of limits.staging_bytes = "
                f"{self._limit_bytes} are in use; push again after {_RETRY_AFTER_SECONDS} s",
                retry_after_seconds=_RETRY_AFTER_SECONDS,
                limit_bytes=self._limit_bytes,
            )
        self._held_bytes += size_bytes
        return StagingBuffer(_aligned(element_count), self)

    def drop_free(self, element_count: int) -> None:
        """Forgets the unused buffers of one size, when a run of that size ends."""
        self._held_bytes -= sum(4 * array.size for array in self._free.pop(element_count, []))

    def _drop_free(self) -> None:
        for element_count in list(self._free):
            self.drop_free(element_count)

    def _take_back(self, array: np.ndarray) -> None:
        self._free[array.size].append(array)


def _aligned(element_count: int) -> np.ndarray:
    raw = np.empty(4 * element_count + _ALIGNMENT_BYTES, np.uint8)
    begin = -raw.ctypes.data % _ALIGNMENT_BYTES
    return raw[begin : begin + 4 * element_count].view(np.float32)
