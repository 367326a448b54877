"""A run whose weights count what was applied, and its two workers, each in a process of its own."""

from collections import Counter
from typing import Any

import numpy as np
from marking_worker import Task
from worker_fleet import Fleet

import kedge
from kedge import optim

SIZE = 16


class CountingRun:
    """Each worker marks an element of its own, and a step takes a power of two from those that are in it.

    Args:
        client: makes the run.
        fleet: starts the workers.
        address: how they reach the server.
        name: of the run.
        aggregation: of at most two contributions.
        pace_seconds: how long a worker computes.
        options: of `create_run`.
    """

    def __init__(
        self,
        client: kedge.Client,
        fleet: Fleet,
        *,
        address: str,
        name: str,
        aggregation: kedge.Synchronous | kedge.Asynchronous,
        pace_seconds: float = 0.01,
        **options: Any,
    ) -> None:
        self._keeps_leases = options.get("durability") != "checkpoint"
        self._rate = 2.0 if isinstance(aggregation, kedge.Synchronous) else 1.0
        self.run = client.create_run(
            name,
            params={"w": np.zeros(SIZE, np.float32)},
            optimizer=optim.SGD(lr=self._rate),
            aggregation=aggregation,
            **options,
        )
        task = Task(address=address, run=name, name="", mark=0, lease_seconds=60, pace_seconds=pace_seconds)
        self.members = fleet.start(*(task.called(f"{name}-{mark}", mark) for mark in range(2)))

    @property
    def told_count(self) -> int:
        """How many contributions the workers were told are applied."""
        return sum(len(member.applied) for member in self.members)

    def expected_weights(self) -> list[float]:
        """By what the workers were told of their steps, and who else was in them."""
        sharers = Counter(event["result_step"] for member in self.members for event in member.applied)
        taken = [sum(self._rate / sharers[event["result_step"]] for event in one.applied) for one in self.members]
        return [-total for total in taken] + [0.0] * (SIZE - 2)

    def assert_each_contribution_is_applied_once(self) -> None:
        """Only when the workers have ended, and none of them in the middle of a contribution."""
        events = [event for member in self.members for event in member.events]
        assert "error" not in {event["event"] for event in events}
        assert {event["outcome"] for event in events if event["event"] == "step"} == {"applied"}
        if self._keeps_leases:
            epochs = [{event["epoch"] for event in member.events if "epoch" in event} for member in self.members]
            assert [len(of_member) for of_member in epochs] == [1, 1], f"a worker of {self.run.id} joined again"
        assert self.run.pull()["w"].tolist() == self.expected_weights()
        status = self.run.status()
        assert (status.applied_count, status.rejected_counts) == (self.told_count, {})


def wait_for_more(fleet: Fleet, count: int) -> None:
    """Waits until each worker has made so many steps more."""
    goals = [len(member.steps) + count for member in fleet.members]
    fleet.wait_until(lambda: all(len(m.steps) >= goal for m, goal in zip(fleet.members, goals, strict=True)))
