"""Who reads superseded weights is dropped when they take too much memory, the slowest first."""

import contextlib
from collections.abc import Callable

import numpy as np
import pytest

from kedge_server.engine.readers import Readers
from kedge_server.engine.snapshots import Encoding, Snapshot

MIB = 1 << 20


class Bench:
    """Readers of snapshots of one MiB each; the newest is told by its step."""

    def __init__(self, limit_bytes: int) -> None:
        self.readers = Readers(limit_bytes)
        self.newest_step = 0
        self.dropped: list[str] = []
        self._stack = contextlib.ExitStack()

    def encoding(self, step: int) -> Encoding:
        self.newest_step = step
        return Snapshot(step, 0, (np.zeros(MIB // 4, np.float32),), None).encoding("fast", "float32")

    def read(self, name: str, step: int, encoding: Encoding | None = None) -> Callable[[], None]:
        return self._stack.enter_context(
            self.readers.reading(
                encoding or self.encoding(step),
                is_served=lambda: step == self.newest_step,
                drop=lambda: self.dropped.append(name),
            )
        )

    def __enter__(self) -> "Bench":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def test_over_the_bound_those_go_that_made_no_progress_for_longest() -> None:
    with Bench(2 * MIB) as bench:
        moved = [bench.read(f"r{step}", step) for step in range(3)]
        assert bench.dropped == [], "the bound is kept: two are superseded, the third is the newest"
        moved[0]()
        bench.read("r3", 3)
        assert bench.dropped == ["r1"]
        bench.read("r4", 4)
        assert bench.dropped == ["r1", "r2"]
        bench.read("r5", 5)
        assert bench.dropped == ["r1", "r2", "r0"]


def test_who_reads_the_newest_weights_is_never_dropped() -> None:
    with Bench(1) as bench:
        encoding = bench.encoding(7)
        for number in range(5):
            bench.read(f"r{number}", 7, encoding)
        assert bench.dropped == []
        bench.read("later", 8)
        assert bench.dropped == [f"r{number}" for number in range(5)]


def test_weights_that_many_read_count_once() -> None:
    with Bench(2 * MIB) as bench:
        encoding = bench.encoding(1)
        for number in range(10):
            bench.read(f"r{number}", 1, encoding)
        bench.read("later", 2)
        bench.read("last", 3)
        assert bench.dropped == []


def test_dropping_one_of_many_readers_frees_nothing_so_all_of_them_go() -> None:
    with Bench(MIB) as bench:
        encoding = bench.encoding(1)
        for number in range(3):
            bench.read(f"r{number}", 1, encoding)
        bench.read("middle", 2)
        bench.read("last", 3)
        assert bench.dropped == ["r0", "r1", "r2"]


def test_reader_that_has_ended_counts_no_more() -> None:
    with Bench(MIB) as bench:
        with bench.readers.reading(
            bench.encoding(1), is_served=lambda: False, drop=lambda: bench.dropped.append("ended")
        ):
            pass
        bench.read("middle", 2)
        bench.read("last", 3)
        assert bench.dropped == []


def test_dropped_reader_may_still_say_that_it_moved() -> None:
    with Bench(1) as bench:
        moved = bench.read("slow", 1)
        bench.read("last", 2)
        moved()
        bench.read("more", 3)
        assert bench.dropped.count("slow") == 1


@pytest.mark.parametrize("fails", [True, False])
def test_reader_is_forgotten_however_it_ends(fails: bool) -> None:
    bench = Bench(1)
    with (
        contextlib.suppress(RuntimeError),
        bench.readers.reading(bench.encoding(1), is_served=lambda: False, drop=lambda: None),
    ):
        if fails:
            raise RuntimeError
    assert not bench.readers._by_progress
