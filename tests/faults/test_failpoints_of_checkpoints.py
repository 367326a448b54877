"""The server is killed as it starts, makes a run or a checkpoint, three times, and goes on as if it was not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from killed_training import Outcome, assert_same, play

from kedge_server.telemetry.failpoints import FAILPOINTS

POINTS = [name for name in FAILPOINTS if not name.startswith(("journal.", "engine."))]

TIMES = {
    "generation.write": (1, 1, 1),  # a process comes there once
    "checkpoint.retain.before": (1, 1, 1),  # from the third checkpoint on
    "run.create.after": (1, 1, 1),
}
"""Which time that a process comes there is its last, where it does not come there often."""


@pytest.mark.slow
@pytest.mark.parametrize("name", POINTS)
def test_server_killed_three_times_with_a_checkpoint_half_done_loses_no_bit(
    tmp_path: Path, uninterrupted: Callable[[Any], Outcome], name: str
) -> None:
    failpoints = [f"{name}:{time}" for time in TIMES.get(name, (1, 2, 2))]
    outcome = play(tmp_path, "journal", failpoints)
    assert outcome.deaths == failpoints
    assert_same(outcome, uninterrupted("journal"))
