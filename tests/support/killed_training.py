"""The known training on a server that is killed at failpoints, and on one that is not."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from durable_server import DurableServer, Revival, essence, inspected
from durable_training import SETTINGS, Training, impatient_client


class Outcome(NamedTuple):
    """What came of a training."""

    deaths: list[str]
    """The failpoints that its server was killed at."""
    exit_code: int
    fast: dict[str, np.ndarray]
    slow: dict[str, np.ndarray]
    kept: dict[str, Any]
    """What its data directory holds in the end."""
    runs: set[str]


def in_threes(failpoints: Sequence[str]) -> list[Sequence[str]]:
    """As many as one training is killed at."""
    return [failpoints[first : first + 3] for first in range(0, len(failpoints), 3)]


def play(data_dir: Path, durability: Any, failpoints: Sequence[str] = ()) -> Outcome:
    """Trains from the first step to the last, and ends the server with SIGTERM."""
    with DurableServer(data_dir, environment=SETTINGS) as server, Revival(server, failpoints) as revival:
        with impatient_client(server.address) as client:
            training = Training(client, durability)
            training.make_all_steps()
            fast, slow = training.run.pull("fast"), training.run.pull("slow")
            training.close()
        code = revival.stop()
    runs = inspected(data_dir)
    assert all(runs["runs/main"]["digests"].values())
    assert runs["runs/main"]["problems"] == []
    return Outcome(revival.deaths, code, fast, slow, essence(runs["runs/main"]), set(runs))


def assert_same(outcome: Outcome, uninterrupted: Outcome) -> None:
    """Nothing is lost, nothing is twice, and no bit is another."""
    for kind in ("fast", "slow"):
        bits = [
            {name: value.tobytes() for name, value in getattr(one, kind).items()} for one in (outcome, uninterrupted)
        ]
        assert bits[0] == bits[1], f"other {kind} weights"
    assert outcome.kept == uninterrupted.kept
    assert outcome.runs == uninterrupted.runs
    assert outcome.exit_code == 0
