import math

import pytest

from kedge.policies import Checkpoints
from kedge_server.storage.retention import CheckpointInfo, Since, is_due, to_delete

NOW = 1_000_000.0
MIB = 1 << 20


def info(step: int, *, next_index: int | None = None, age_seconds: float = 0.0, **metrics: float) -> CheckpointInfo:
    index = step + 1 if next_index is None else next_index
    return CheckpointInfo(f"{step}-{index}", step, index, NOW - age_seconds, 100, metrics)


def kept_steps(infos: list[CheckpointInfo], rules: Checkpoints, keep: tuple[str, ...] = ()) -> list[int]:
    gone = to_delete(infos, rules, now_seconds=NOW, keep=keep)
    return [info.step for info in infos if info.checkpoint_id not in gone]


TENS = [info(step) for step in range(10, 101, 10)]
LOSSES = [
    info(step, **metrics)
    for step, metrics in {
        1: {"loss": 0.5},
        2: {"loss": 0.1},
        3: {},
        4: {"loss": math.nan},
        5: {"loss": -math.inf},
        6: {"loss": 0.3},
        7: {"loss": 9.0},
        8: {"loss": 9.0},
    }.items()
]


@pytest.mark.parametrize(
    ("infos", "rules", "kept"),
    [
        pytest.param([], Checkpoints(), [], id="none there"),
        pytest.param(TENS[:1], Checkpoints(), [10], id="one there"),
        pytest.param(TENS, Checkpoints(), [90, 100], id="newest two by default"),
        pytest.param(TENS, Checkpoints(keep_latest=4), [70, 80, 90, 100], id="newest four"),
        pytest.param(TENS, Checkpoints(keep_latest=99), list(range(10, 101, 10)), id="more than there are"),
        pytest.param(TENS, Checkpoints(keep_every_steps=40), [40, 80, 90, 100], id="at multiples"),
        pytest.param(TENS, Checkpoints(keep_every_steps=25), [30, 50, 80, 90, 100], id="first after multiples"),
        pytest.param(TENS, Checkpoints(keep_every_steps=1000), [90, 100], id="no multiple reached, and 0 is none"),
        pytest.param(LOSSES, Checkpoints(keep_best=1), [5, 7, 8], id="least"),
        pytest.param(LOSSES, Checkpoints(keep_best=3), [2, 5, 6, 7, 8], id="three least, none without a number"),
        pytest.param(LOSSES, Checkpoints(keep_best=3, is_greater_better=True), [1, 7, 8], id="greatest"),
        pytest.param(LOSSES, Checkpoints(keep_best=3, metric="accuracy"), [7, 8], id="nobody has the metric"),
    ],
)
def test_what_stays(infos: list[CheckpointInfo], rules: Checkpoints, kept: list[int]) -> None:
    assert kept_steps(infos, rules) == kept
    assert kept_steps(infos[::-1], rules) == kept[::-1]


def test_of_two_equally_good_ones_the_newer_stays() -> None:
    infos = [info(step, loss=1.0) for step in (1, 2, 3)] + [info(step) for step in (4, 5)]
    assert kept_steps(infos, Checkpoints(keep_best=1)) == [3, 4, 5]


def test_age_lets_go_of_all_but_the_newest() -> None:
    old = [info(step, age_seconds=3600 - step, loss=step / 100) for step in (10, 20, 30)]
    young = [info(40, age_seconds=50, loss=0.9)]
    newest = [info(50, age_seconds=7000), info(60, age_seconds=7000)]
    rules = Checkpoints(keep_every_steps=10, keep_best=2, max_age_seconds=100)
    assert kept_steps(old + young + newest, rules) == [40, 50, 60]


def test_exactly_the_greatest_age_still_stays() -> None:
    infos = [info(10, age_seconds=100), info(20, age_seconds=100.5), info(30), info(40)]
    assert kept_steps(infos, Checkpoints(keep_every_steps=10, max_age_seconds=100)) == [10, 30, 40]


def test_one_from_the_future_is_young() -> None:
    infos = [info(10, age_seconds=-1e6), info(20), info(30)]
    assert kept_steps(infos, Checkpoints(keep_every_steps=10, max_age_seconds=1)) == [10, 20, 30]


def test_what_must_stay_stays_whatever_its_age() -> None:
    infos = [info(10, age_seconds=1e6), info(20), info(30), info(40)]
    assert kept_steps(infos, Checkpoints(max_age_seconds=1), keep=("10-11", "no-such")) == [10, 30, 40]


def test_after_a_restore_newest_goes_by_the_journal_and_not_by_the_step() -> None:
    before = [info(100, next_index=200), info(200, next_index=400)]
    after = [info(110, next_index=450), info(120, next_index=470)]
    assert to_delete(after + before, Checkpoints(), now_seconds=NOW) == ["100-200", "200-400"]


def test_the_oldest_goes_first() -> None:
    assert to_delete(TENS[::-1], Checkpoints(keep_latest=8), now_seconds=NOW) == ["10-11", "20-21"]


@pytest.mark.parametrize("every", [1, 7, 25])
def test_to_delete_again_and_again_keeps_what_one_look_at_all_would(every: int) -> None:
    rules = Checkpoints(keep_every_steps=every, keep_latest=3)
    there: list[CheckpointInfo] = []
    for one in TENS:
        gone = to_delete([*there, one], rules, now_seconds=NOW)
        there = [info for info in [*there, one] if info.checkpoint_id not in gone]
    assert [one.step for one in there] == kept_steps(TENS, rules)


@pytest.mark.parametrize(
    ("durability", "rules", "since", "due"),
    [
        ("memory", Checkpoints(every_steps=1, every_seconds=1), Since(9, 9e9, 1 << 50), False),
        ("checkpoint", Checkpoints(), Since(1, 599.9, 0), False),
        ("checkpoint", Checkpoints(), Since(1, 600.0, 0), True),
        ("checkpoint", Checkpoints(), Since(0, 9e9, 0), False),
        ("checkpoint", Checkpoints(every_steps=100), Since(99, 9e9, 0), False),
        ("checkpoint", Checkpoints(every_steps=100), Since(100, 0.0, 0), True),
        ("checkpoint", Checkpoints(every_seconds=5), Since(1, 5.0, 0), True),
        ("checkpoint", Checkpoints(every_seconds=5000), Since(1, 700.0, 0), False),
        ("checkpoint", Checkpoints(), Since(1, 0.0, 1 << 50), False),
        ("journal", Checkpoints(), Since(10**6, 9e9, 63 * MIB), False),
        ("journal", Checkpoints(), Since(1, 0.0, 64 * MIB), True),
        ("journal", Checkpoints(), Since(0, 0.0, 64 * MIB), True),
        ("journal-sync", Checkpoints(every_steps=10**9), Since(1, 0.0, 64 * MIB), True),
        ("journal", Checkpoints(every_steps=10), Since(10, 0.0, 0), True),
        ("journal", Checkpoints(every_seconds=10, every_steps=10), Since(9, 9.9, 0), False),
        ("journal", Checkpoints(every_seconds=10, every_steps=10), Since(9, 10.0, 0), True),
        ("journal", Checkpoints(every_seconds=10), Since(0, 10.0, 0), False),
    ],
)
def test_when_one_is_due(durability: str, rules: Checkpoints, since: Since, due: bool) -> None:
    assert is_due(since, rules, durability=durability, state_bytes=MIB, journal_limit_bytes=64 * MIB) is due


@pytest.mark.parametrize(("journal_bytes", "due"), [(799, False), (800, True)])
def test_a_journal_is_let_grow_to_eight_times_the_state(journal_bytes: int, due: bool) -> None:
    since = Since(5, 0.0, journal_bytes)
    assert is_due(since, Checkpoints(), durability="journal", state_bytes=100, journal_limit_bytes=1) is due
