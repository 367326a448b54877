"""The server is killed between a gradient and the disk, again and again, and goes on as if it was not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from killed_training import Outcome, assert_same, in_threes, play

from kedge_server.telemetry.failpoints import FAILPOINTS

POINTS = [name for name in FAILPOINTS if name.startswith(("journal.", "engine."))]
OF_SYNCS = [name for name in POINTS if name.startswith("journal.sync")]
OF_ALL = [name for name in POINTS if name not in OF_SYNCS]


def assert_nothing_is_lost(
    data_dir: Path, uninterrupted: Callable[[Any], Outcome], durability: str, names: list[str]
) -> None:
    """After a kill as the first process comes to its point, one as the second does for the second time, and so on."""
    failpoints = [f"{name}:{time}" for time, name in enumerate(names, start=1)]
    outcome = play(data_dir, durability, failpoints)
    assert outcome.deaths == failpoints
    assert_same(outcome, uninterrupted(durability))


@pytest.mark.slow
@pytest.mark.parametrize("names", [OF_SYNCS, *in_threes(OF_ALL)], ids=" ".join)
def test_server_killed_at_each_point_on_the_way_of_a_gradient_loses_no_bit(
    tmp_path: Path, uninterrupted: Callable[[Any], Outcome], names: list[str]
) -> None:
    durability = "journal-sync" if names == OF_SYNCS else "journal"
    assert_nothing_is_lost(tmp_path, uninterrupted, durability, names)


@pytest.mark.soak
@pytest.mark.parametrize("name", POINTS)
def test_server_killed_three_times_at_a_point_on_the_way_of_a_gradient_loses_no_bit(
    tmp_path: Path, uninterrupted: Callable[[Any], Outcome], name: str
) -> None:
    durability = "journal-sync" if name in OF_SYNCS else "journal"
    assert_nothing_is_lost(tmp_path, uninterrupted, durability, [name] * 3)


def test_there_are_failpoints_enough() -> None:
    assert len(FAILPOINTS) >= 14
    assert len(set(FAILPOINTS)) == len(FAILPOINTS)
