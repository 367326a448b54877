"""The server is killed as it starts, makes a run or a checkpoint, again and again, and goes on as if it was not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from killed_training import Outcome, assert_same, in_threes, play

from kedge_server.telemetry.failpoints import FAILPOINTS

POINTS = [name for name in FAILPOINTS if not name.startswith(("journal.", "engine."))]
OF_CHECKPOINTS = [name for name in POINTS if name.startswith("checkpoint.")]
OF_STARTS = ["run.create.before", "run.create.after", "generation.write"]  # a run that is made is not made again

TIMES = {
    "generation.write": (1, 1, 1),  # a process comes there once
    "checkpoint.retain.before": (1, 1, 1),  # from the third checkpoint on
    "run.create.after": (1, 1, 1),
}
"""Which time that a process comes there is its last, where it does not come there often."""


def assert_nothing_is_lost(data_dir: Path, uninterrupted: Callable[[Any], Outcome], failpoints: list[str]) -> None:
    outcome = play(data_dir, "journal", failpoints)
    assert outcome.deaths == failpoints
    assert_same(outcome, uninterrupted("journal"))


@pytest.mark.slow
@pytest.mark.parametrize("names", [OF_STARTS, *in_threes(OF_CHECKPOINTS)], ids=" ".join)
def test_server_killed_at_each_point_of_a_start_or_a_checkpoint_loses_no_bit(
    tmp_path: Path, uninterrupted: Callable[[Any], Outcome], names: list[str]
) -> None:
    assert_nothing_is_lost(tmp_path, uninterrupted, [f"{name}:1" for name in names])


@pytest.mark.soak
@pytest.mark.parametrize("name", POINTS)
def test_server_killed_three_times_with_a_checkpoint_half_done_loses_no_bit(
    tmp_path: Path, uninterrupted: Callable[[Any], Outcome], name: str
) -> None:
    assert_nothing_is_lost(tmp_path, uninterrupted, [f"{name}:{time}" for time in TIMES.get(name, (1, 2, 2))])


def test_each_failpoint_has_its_play() -> None:
    assert sorted([*OF_STARTS, *OF_CHECKPOINTS]) == sorted(POINTS)
