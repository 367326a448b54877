"""A journal on a disk that forgets what was not synced: what it promised is there, and nothing wrong is."""

import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forgetful_files import ForgetfulFiles, PowerLost
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from kedge_server.storage.errors import StorageFull, StorageUnavailable
from kedge_server.storage.journal import Entry, Journal, Record

ROOT = Path("/run")
DIRECTORY = ROOT / "journal"
SEGMENT_BYTES = 500
PHASES = [phase for phase in Phase if phase is not Phase.explain]
SYNC_SECONDS, BOUND_SECONDS = 0.5, 1.0

sizes = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 300)), min_size=1, max_size=3)
seeds = st.integers(0, 2**32)
chances = st.sampled_from([0.0, 0.3, 0.7, 0.95, 1.0])
steps = st.none() | st.integers(0, 12)
appends = st.tuples(st.just("append"), sizes)
actions = st.lists(
    st.one_of(
        appends,
        appends,
        appends,
        st.tuples(st.just("sync")),
        st.tuples(st.just("pass_time"), st.sampled_from([0.1, 0.4, 0.9])),
        st.tuples(st.just("rotate")),
        st.tuples(st.just("checkpoint")),
        st.tuples(st.just("checkpoint_and_drop"), st.integers(0, 3)),
        st.tuples(st.just("fill"), st.integers(0, 400), st.booleans()),
        st.tuples(st.just("end")),
        st.tuples(st.just("lose"), seeds, chances, steps),
        st.tuples(st.just("lose_soon"), st.integers(0, 30)),
        st.tuples(st.just("lose_in_sync"), st.integers(0, 3)),
    ),
    min_size=20,
    max_size=50,
)


class World:
    """A journal, what it was given, and what it promised."""

    def __init__(self, page_bytes: int, *, syncs_each: bool) -> None:
        self.files = ForgetfulFiles(page_bytes, ROOT)
        self.syncs_each = syncs_each
        self.now = 0.0
        self.written: dict[int, tuple[Entry, float]] = {}
        self.promised = 0  # every record up to it is on the disk
        self.in_checkpoint = 0  # what came of every record up to it is in a checkpoint
        self.values = random.Random(7)
        self.open()

    def open(self) -> None:
        self.journal = Journal.open(
            DIRECTORY, self.files, segment_bytes=SEGMENT_BYTES, next_index_at_least=self.in_checkpoint + 1
        )

    # What a server does

    def append(self, sizes: list[tuple[int, int]]) -> None:
        self.sync_if_old(BOUND_SECONDS)
        entries = [self.entry(*each) for each in sizes]
        for index, entry in enumerate(entries, self.journal.next_index):
            self.written[index] = entry, self.now
        try:
            self.journal.append(entries)
        except (StorageFull, StorageUnavailable):
            self.files.room, self.files.cuts = None, True
        self.forget_from(self.journal.next_index)
        if self.syncs_each:
            self.sync()

    def entry(self, body_bytes: int, payload_bytes: int) -> Entry:
        payload = np.frombuffer(self.values.randbytes(payload_bytes), np.uint8)
        return Entry(3, self.journal.next_index, self.now, self.values.randbytes(body_bytes), [payload])

    def sync(self) -> None:
        self.journal.sync()
        self.promised = self.journal.next_index - 1
        assert self.journal.synced_index == self.promised

    def sync_if_old(self, seconds: float) -> None:
        ages = [self.now - at for index, (_, at) in self.written.items() if index > self.promised]
        if ages and max(ages) >= seconds:
            self.sync()

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.sync_if_old(SYNC_SECONDS)

    def rotate(self) -> None:
        self.journal.rotate()

    def checkpoint(self) -> None:
        self.journal.sync()  # as a server does, before a checkpoint is complete
        self.in_checkpoint = self.journal.next_index - 1

    def checkpoint_and_drop(self, behind: int) -> None:
        self.checkpoint()
        self.journal.drop_before(max(self.in_checkpoint + 1 - behind, 1))

    def fill(self, room: int, cuts: bool) -> None:
        self.files.room, self.files.cuts = room, cuts

    # What happens to it

    def end(self) -> None:
        """The process ends; what it wrote is there."""
        self.journal.close()
        self.files.room, self.files.cuts = None, True
        self.open()
        self.check()

    def lose_soon(self, steps: int) -> None:
        """The power goes in the middle of what is done next."""
        self.files.steps_left = steps

    def lose_in_sync(self, steps: int) -> None:
        self.lose_soon(steps)
        self.sync()

    def lose(self, seed: int, chance: float, steps: int | None = None) -> None:
        """The power goes now; and once more after so many steps, if that is in the midst of the recovery."""
        source = random.Random(seed)
        self.files = self.files.after_loss(lambda: source.random() < chance)
        self.files.steps_left = steps
        try:
            self.open()
        except PowerLost:
            self.lose(seed + 1, chance)
        self.files.steps_left = None
        for index, (_, at) in self.written.items():
            if at < self.now - BOUND_SECONDS:
                assert index < self.journal.next_index
        self.check()

    def check(self) -> None:
        """Everything that was promised is there, in order and bit for bit, and nothing that was never written."""
        begin, end = self.in_checkpoint + 1, self.journal.next_index
        assert end > self.promised
        assert [self.content(record) for record in self.journal.records(begin)] == [
            (index, *self.given(index)) for index in range(begin, end)
        ]
        for record in self.journal.records(self.journal.first_index):
            assert self.content(record) == (record.index, *self.given(record.index))
        self.forget_from(end)
        self.promised = end - 1

    def forget_from(self, end: int) -> None:
        self.written = {index: given for index, given in self.written.items() if index < end}

    @staticmethod
    def content(record: Record) -> tuple[Any, ...]:
        return record.index, record.kind, record.step, record.time_seconds, record.body, record.payload.tobytes()

    def given(self, index: int) -> tuple[Any, ...]:
        entry, _ = self.written[index]
        return entry.kind, entry.step, entry.time_seconds, entry.body, b"".join(map(bytes, entry.payload))


@pytest.mark.timeout(400)  # it takes seconds; where it fails, hypothesis takes up to five minutes to make it short
@settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck), phases=PHASES)
@given(actions, st.sampled_from([64, 512, 4096]), st.booleans(), seeds, chances)
def test_what_was_promised_outlives_every_loss_of_power(
    actions: list[tuple[Any, ...]], page_bytes: int, syncs_each: bool, seed: int, chance: float
) -> None:
    world = World(page_bytes, syncs_each=syncs_each)
    for name, *arguments in actions:
        act: Callable[..., None] = getattr(world, name)
        try:
            act(*arguments)
        except PowerLost:
            world.lose(seed, chance)
    world.lose(seed, chance)
    world.append([(5, 100)])
    world.sync()
    world.lose(seed, 0.0)


@pytest.mark.parametrize("steps", range(4))
@pytest.mark.parametrize("seed", range(100))
def test_loss_of_power_in_the_middle_of_a_sync_is_no_damage(steps: int, seed: int) -> None:
    world = World(64, syncs_each=False)
    world.append([(5, 100)])
    world.sync()
    world.append([(5, 100)])
    world.lose_soon(steps)
    with suppress(PowerLost):
        world.sync()
    world.lose(seed, 0.5)
