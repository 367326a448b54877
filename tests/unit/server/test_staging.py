"""The pool of staging buffers: reused, aligned, bounded, and never lent so that runs wait for each other for ever."""

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kedge.wire.errors import KedgeError, ResourceExhaustedError
from kedge_server.engine.staging import StagingAccount, StagingBuffer, StagingPool

KIB = 1024


def test_buffer_is_float32_of_its_length_and_aligned_for_jax() -> None:
    array = StagingPool(1 << 20).acquire(1000).array
    assert (array.dtype, array.shape) == (np.float32, (1000,))
    assert array.ctypes.data % 64 == 0


def test_buffer_may_have_room_beyond_its_elements() -> None:
    buffer = StagingPool(1 << 20).account(1000, 1, padded_count=4096).acquire()
    assert (buffer.array.shape, buffer.padded.shape) == ((1000,), (4096,))
    assert buffer.array.ctypes.data == buffer.padded.ctypes.data


def test_released_buffer_is_lent_again() -> None:
    pool = StagingPool(1 << 20)
    first = pool.acquire(10)
    padded = first.padded
    first.release()
    first.release()
    assert pool.acquire(10).padded is padded
    assert pool.acquire(10).padded is not padded, "releasing twice puts nothing into the pool twice"


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


def lends(account: StagingAccount) -> StagingBuffer | None:
    try:
        return account.acquire()
    except ResourceExhaustedError:
        return None


def test_two_rounds_of_four_in_room_for_five_both_get_full() -> None:
    pool = StagingPool(5 * 4)
    first, second = pool.account(1, 4), pool.account(1, 4)
    held = [first.acquire() for _ in range(3)]
    assert lends(second)
    assert lends(second) is None, "with a second one the first run could not get its fourth, nor this one its third"
    held.append(first.acquire())
    for buffer in held:
        buffer.release()
    assert [bool(lends(second)) for _ in range(3)] == [True] * 3


def test_run_may_borrow_more_than_its_claim_while_nobody_else_misses_any() -> None:
    pool = StagingPool(8 * 4)
    busy, other = pool.account(1, 1), pool.account(1, 4)
    held = [busy.acquire() for _ in range(6)]
    assert lends(other), "the busy run needs no more to give all back"
    held.append(busy.acquire())
    assert lends(busy) is None
    for buffer in held:
        buffer.release()
    assert [bool(lends(other)) for _ in range(3)] == [True] * 3


def test_claim_that_could_not_be_met_is_refused_and_not_made() -> None:
    pool = StagingPool(5 * 4)
    first, second = pool.account(1, 2), pool.account(1, 5)
    held = [first.acquire(), first.acquire()]
    assert lends(second)
    assert lends(second)
    with pytest.raises(KedgeError) as caught:  # three more for each, and one is left
        first.set_claim(5)
    assert caught.value.reason == "STAGING_FULL"
    assert caught.value.retry_after_seconds > 0
    assert first.claim_count == 2
    for buffer in held:
        buffer.release()
    first.set_claim(5)
    assert first.claim_count == 5


class Run:
    """A run that holds its buffers until its round is full."""

    def __init__(self, pool: StagingPool, size: int, claim: int) -> None:
        self.size, self.claim = size, claim
        self.account = pool.account(size, claim)
        self.held: list[StagingBuffer] = []

    def tries(self) -> bool:
        buffer = lends(self.account)
        if buffer is not None:
            self.held.append(buffer)
        return buffer is not None

    def ends_a_full_round(self) -> None:
        if len(self.held) >= self.claim:
            self.loses(len(self.held))

    def loses(self, count: int) -> None:
        for buffer in self.held[:count]:
            buffer.release()
        del self.held[:count]


LIMIT = 12
SIZES_AND_CLAIMS = st.lists(
    st.tuples(st.integers(1, 5), st.integers(1, 6)).filter(lambda drawn: drawn[0] * drawn[1] <= LIMIT),
    min_size=1,
    max_size=4,
)


def could_all_end(runs: list[Run], lent: list[int]) -> bool:
    """Whether there is an order in which everyone who holds some gets the rest of its claim: every order is tried."""
    holders = [(run.size, run.claim, count) for run, count in zip(runs, lent, strict=True) if count]

    def works(order: tuple[tuple[int, int, int], ...]) -> bool:
        room = LIMIT - sum(size * count for size, _, count in holders)
        for size, claim, count in order:
            if room < max(0, claim - count) * size:
                return False
            room += count * size
        return room >= 0

    total = sum(size * count for size, _, count in holders)
    return total <= LIMIT and any(works(order) for order in permutations(holders))


@given(st.data(), SIZES_AND_CLAIMS)
def test_buffer_is_lent_exactly_if_afterwards_all_rounds_can_be_filled(
    data: st.DataObject, drawn: list[tuple[int, int]]
) -> None:
    pool = StagingPool(4 * LIMIT)
    runs = [Run(pool, *one) for one in drawn]
    for _ in range(data.draw(st.integers(0, 30))):
        run = data.draw(st.sampled_from(runs))
        if data.draw(st.booleans()):
            run.loses(data.draw(st.integers(0, len(run.held))))
        after = [len(one.held) + (one is run) for one in runs]
        expected = could_all_end(runs, after)
        assert run.tries() == expected
        assert sum(4 * one.size * len(one.held) for one in runs) <= 4 * LIMIT
        assert pool._held_bytes <= 4 * LIMIT


@given(SIZES_AND_CLAIMS, st.lists(st.integers(0, 3), max_size=60))
def test_rounds_that_have_begun_always_end(drawn: list[tuple[int, int]], turns: list[int]) -> None:
    pool = StagingPool(4 * LIMIT)
    runs = [Run(pool, *one) for one in drawn]
    for turn in turns:
        run = runs[turn % len(runs)]
        run.tries()
        run.ends_a_full_round()
    while any(run.held for run in runs):
        before = [len(run.held) for run in runs]
        for run in runs:
            if run.held:
                run.tries()
                run.ends_a_full_round()
        assert before != [len(run.held) for run in runs], "they wait for each other"
