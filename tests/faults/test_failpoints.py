"""The server is killed between a gradient and the disk, three times at each point, and goes on as if it was not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from killed_training import Outcome, assert_same, play

from kedge_server.telemetry.failpoints import FAILPOINTS

POINTS = [name for name in FAILPOINTS if name.startswith(("journal.", "engine."))]


@pytest.mark.slow
@pytest.mark.parametrize("name", POINTS)
def test_server_killed_three_times_on_the_way_of_a_gradient_loses_no_bit(
    tmp_path: Path, uninterrupted: Callable[[Any], Outcome], name: str
) -> None:
    durability = "journal-sync" if name.startswith("journal.sync") else "journal"
    failpoints = [f"{name}:{time}" for time in (1, 2, 3)]
    outcome = play(tmp_path, durability, failpoints)
    assert outcome.deaths == failpoints
    assert_same(outcome, uninterrupted(durability))


def test_there_are_failpoints_enough() -> None:
    assert len(FAILPOINTS) >= 14
    assert len(set(FAILPOINTS)) == len(FAILPOINTS)
