"""Staging buffers: where gradients are put together. Pooled, and bounded by a budget of bytes for the whole server.

A round holds its buffers until it is full. Two runs that hold some each could therefore wait for each other's for
ever. So a buffer is lent only if afterwards the runs that hold some can still fill their rounds one after the other:
the banker's algorithm, for one resource. Every state that the pool gets into is safe in this sense.

A buffer may be read by a compiled update without a copy (JAX aliases aligned host memory on the CPU): release it only
when that update has finished.
"""

from collections import defaultdict
from collections.abc import Mapping

import numpy as np

from kedge.wire.errors import KedgeError

_ALIGNMENT_BYTES = 64
_RETRY_AFTER_SECONDS = 0.5


class StagingBuffer:
    """A float32 array on loan from the pool.

    Attributes:
        array: of shape [element_count].
        padded: the same and what the account has room for beyond it, of shape [padded_count].
    """

    def __init__(self, padded: np.ndarray, account: "StagingAccount") -> None:
        self.padded = padded
        self.array = padded[: account.element_count]
        self._account: StagingAccount | None = account

    def release(self) -> None:
        """Gives it back. Doing so again changes nothing."""
        if self._account is not None:
            self._account._pool._take_back(self.padded, self._account)
            self._account = None


class StagingAccount:
    """What one run borrows. It may borrow more than it claims, as long as that keeps no other run from its claim.

    Made by `StagingPool.account`. An account that holds nothing costs nothing, and needs no closing.
    """

    def __init__(self, pool: "StagingPool", element_count: int, claim_count: int, padded_count: int) -> None:
        self._pool = pool
        self.element_count = element_count
        self.padded_count = padded_count
        self.claim_count = claim_count

    def acquire(self) -> StagingBuffer:
        """Lends a buffer whose content is arbitrary.

        Raises:
            KedgeError: STAGING_FULL.
        """
        return self._pool._lend(self)

    def set_claim(self, claim_count: int) -> None:
        """Changes how many buffers the run holds at once before it gives any back.

        Raises:
            KedgeError: STAGING_FULL, and nothing is changed, if runs could then wait for each other for ever.
        """
        before, self.claim_count = self.claim_count, claim_count
        if not self._pool._is_safe(self._pool._lent_counts):
            self.claim_count = before
            raise self._pool._full(f"a round of {claim_count} gradients of {self.buffer_bytes} bytes does not fit now")

    @property
    def buffer_bytes(self) -> int:
        """The size of one buffer, as limits count it: without what it is padded with."""
        return 4 * self.element_count


class StagingPool:
    """The buffers of all runs.

    Args:
        limit_bytes: all buffers together, in use or not.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._held_bytes = 0
        self._free: dict[int, list[np.ndarray]] = defaultdict(list)
        self._lent_counts: dict[StagingAccount, int] = {}

    def account(self, element_count: int, claim_count: int, *, padded_count: int | None = None) -> StagingAccount:
        """An account for a run.

        Args:
            element_count: of a buffer.
            claim_count: the buffers that its rounds hold before they give any back.
            padded_count: the elements that a buffer has room for, so that a block which reaches beyond the gradient is
                a view of it and no copy; None: no more than `element_count`.
        """
        return StagingAccount(self, element_count, claim_count, padded_count or element_count)

    def acquire(self, element_count: int, *, padded_count: int | None = None) -> StagingBuffer:
        """Lends one buffer to somebody who needs no other, as for the initial weights of a run.

        Raises:
            KedgeError: STAGING_FULL.
        """
        return self.account(element_count, 1, padded_count=padded_count).acquire()

    def drop_free(self, padded_count: int) -> None:
        """Forgets the unused buffers of one size, when a run of that size ends."""
        self._held_bytes -= sum(4 * array.size for array in self._free.pop(padded_count, []))

    def _lend(self, account: StagingAccount) -> StagingBuffer:
        count = self._lent_counts.get(account, 0) + 1
        if not self._is_safe({**self._lent_counts, account: count}):
            raise self._full(f"a gradient of {account.buffer_bytes} bytes does not fit")
        buffer = StagingBuffer(self._array(account.padded_count), account)
        self._lent_counts[account] = count
        return buffer

    def _is_safe(self, lent_counts: Mapping[StagingAccount, int]) -> bool:
        """Whether everyone can borrow what is missing to their claim, one after the other, each giving all back."""
        missing_and_lent = [
            (max(0, account.claim_count - count) * account.buffer_bytes, count * account.buffer_bytes)
            for account, count in lent_counts.items()
        ]
        room = self._limit_bytes - sum(lent for _, lent in missing_and_lent)
        for missing, lent in sorted(missing_and_lent):  # who misses least goes first: if they cannot, nobody can
            if missing > room:
                return False
            room += lent
        return True

    def _full(self, what: str) -> KedgeError:
        lent_bytes = sum(count * account.buffer_bytes for account, count in self._lent_counts.items())
        return KedgeError(
            "STAGING_FULL",
            f"{what}: {lent_bytes} of limits.staging_bytes = {self._limit_bytes} are in use, and runs must be able to "
            f"fill the rounds that they have begun; try again after {_RETRY_AFTER_SECONDS} s",
            retry_after_seconds=_RETRY_AFTER_SECONDS,
            limit_bytes=self._limit_bytes,
        )

    def _array(self, padded_count: int) -> np.ndarray:
        if self._free[padded_count]:
            return self._free[padded_count].pop()
        if self._held_bytes + 4 * padded_count > self._limit_bytes:
            for unused in list(self._free):
                self.drop_free(unused)
        array = _aligned(padded_count)
        self._held_bytes += array.nbytes
        return array

    def _take_back(self, array: np.ndarray, account: StagingAccount) -> None:
        self._free[array.size].append(array)
        self._lent_counts[account] -= 1
        if not self._lent_counts[account]:
            del self._lent_counts[account]


def _aligned(element_count: int) -> np.ndarray:
    raw = np.empty(4 * element_count + _ALIGNMENT_BYTES, np.uint8)
    begin = -raw.ctypes.data % _ALIGNMENT_BYTES
    return raw[begin : begin + 4 * element_count].view(np.float32)
