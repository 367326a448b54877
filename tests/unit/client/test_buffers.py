"""Buffers that are received into: reused when nobody has anything of them, and never before."""

import threading

import numpy as np
import pytest

from kedge.buffers import KEPT_COUNT, Buffers


def address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def test_buffer_is_float32_flat_writable_and_of_the_length_asked_for() -> None:
    array = Buffers().take(7)
    assert (array.dtype, array.shape, array.flags.writeable) == (np.float32, (7,), True)


def test_buffer_that_nobody_holds_is_reused() -> None:
    buffers = Buffers()
    first = buffers.take(1000)
    begins = address(first)
    del first
    assert address(buffers.take(1000)) == begins


@pytest.mark.parametrize(
    "part_of",
    [
        lambda array: array,
        lambda array: array[3:5],
        lambda array: array[::7].reshape(-1, 1).T,
        lambda array: array.view(np.uint32)[10:][:1],
        lambda array: memoryview(array)[2:3],
        lambda array: {"nested": [np.frombuffer(array, np.uint8)]},
        lambda array: array.__dlpack__(),
    ],
    ids=["itself", "slice", "reshaped", "view of a view", "memoryview", "in a tree", "dlpack"],
)
def test_buffer_is_left_alone_as_long_as_anything_of_it_lives(part_of) -> None:
    buffers = Buffers()
    held = buffers.take(1001)
    begins = address(held)
    held = part_of(held)
    for _ in range(2 * KEPT_COUNT):
        assert address(buffers.take(1001)) != begins
    del held


def test_buffer_that_another_thread_holds_is_left_alone() -> None:
    buffers, may_end = Buffers(), threading.Event()
    array = buffers.take(1000)
    begins = address(array)
    thread = threading.Thread(target=lambda held: may_end.wait(), args=(array,), daemon=True)
    thread.start()
    del array
    try:
        assert address(buffers.take(1000)) != begins
    finally:
        may_end.set()
        thread.join()


def test_loop_that_holds_one_step_while_it_receives_the_next_needs_two_buffers() -> None:
    buffers = Buffers()
    weights, seen = None, set()
    for _ in range(10):
        weights = buffers.take(1000)
        seen.add(address(weights))
    assert len(seen) == 2


def test_buffer_of_another_length_is_not_handed_out() -> None:
    buffers = Buffers()
    for element_count in (1000, 2000, 10, 0, 1000):
        assert buffers.take(element_count).size == element_count


def test_what_is_kept_is_bounded_whatever_is_held() -> None:
    buffers = Buffers()
    held = [buffers.take(1000) for _ in range(10)]
    assert len({address(array) for array in held}) == 10
    assert len(buffers._kept) == KEPT_COUNT
