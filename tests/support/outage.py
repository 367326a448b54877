"""Workers whose way to the server fails and is healed: what they contribute before, during and after it."""

import threading
import time
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import numpy as np
from marking_worker import Task
from worker_fleet import Fleet

import kedge
from kedge import optim
from kedge.transport import RunStatus

Moment = Literal["pushing", "waiting"]
"""What the workers do as it fails: push a large gradient, or wait for their round to close."""
MOMENTS: tuple[Moment, ...] = get_args(Moment)

RESUME_SECONDS = 10.0
"""How long after the healing everyone is to go on."""
WORKERS = 2
CONTRIBUTIONS = 3
_LARGE, _SMALL = 2 << 20, 64
LARGE_BYTES = 4 * _LARGE
_MARKS = WORKERS * CONTRIBUTIONS


class Outcome(NamedTuple):
    """What came of it."""

    resumed_after_seconds: float
    """From the healing until the last worker had its step; negative if none had to wait for it."""
    weights: np.ndarray
    status: RunStatus
    exit_codes: list[int]


class Outage:
    """A run and its workers. Where they wait for a round, a companion closes it whose own way does not fail.

    The gradients are zero but for an element that is theirs alone, the optimizer is plain SGD and the shares are powers
    of two: the weights are exactly -1 where a contribution was applied once, 0 where it was lost, -2 where it was
    applied twice.

    Args:
        client: a connection that does not fail.
        fleet: starts the workers.
        address: how the workers reach the server.
        name: of the run.
        moment: what they do as it fails.
    """

    def __init__(self, client: kedge.Client, fleet: Fleet, *, address: str, name: str, moment: Moment) -> None:
        self._fleet, self._is_waiting = fleet, moment == "waiting"
        self._run = client.create_run(
            name,
            params={"w": np.zeros(_SMALL if self._is_waiting else _LARGE, np.float32)},
            # The companion speaks for two examples, each worker for one: their shares are 1/2, 1/4 and 1/4.
            optimizer=optim.SGD(lr=4.0 if self._is_waiting else 1.0),
            aggregation=kedge.Synchronous(WORKERS + 1) if self._is_waiting else kedge.Asynchronous(),
        )
        self._companion = self._run.join("companion", lease_seconds=60) if self._is_waiting else None
        task = Task(
            address=address,
            run=self._run.id,
            name="",
            mark=0,
            is_moving=True,
            is_gated=True,
            lease_seconds=60,
            applied_limit=CONTRIBUTIONS,
            transport="grpc",  # through what fails
        )
        fleet.start(*(task.called(f"w{index}", index * CONTRIBUTIONS) for index in range(WORKERS)))

    def play(self, fail: Callable[[], None], heal: Callable[[], None], *, seconds: float) -> Outcome:
        """One contribution of each before it, one that falls into it, one after it.

        Args:
            fail: lets the network fail at the moment that is due; by then the second contributions are asked for.
            heal: heals it.
            seconds: how long it fails.
        """
        self.contribute()
        self._close_round()
        self._wait_for_contributions(1, seconds=45)
        fail()
        self._close_round()
        threading.Event().wait(seconds)
        heal()
        healed_at = time.monotonic()
        self._wait_for_contributions(2, seconds=RESUME_SECONDS + 2)
        resumed_at = max(member.applied[1]["at"] for member in self._fleet.members)
        self.contribute()
        self._close_round()
        codes = [member.process.wait(timeout=30) for member in self._fleet.members]
        if self._companion is not None:
            self._companion.close()
        return Outcome(resumed_at - healed_at, self._run.pull()["w"], self._run.status(), codes)

    def contribute(self) -> None:
        """Lets each worker make its next contribution."""
        for member in self._fleet.members:
            member.contribute()

    def wait_until_all_wait(self) -> None:
        """Waits until only the companion's contribution is missing in the round."""
        give_up_at = time.monotonic() + 30
        while (held := self._run.status().round) is None or held.contribution_count < WORKERS:
            assert time.monotonic() < give_up_at, self._fleet

    def _close_round(self) -> None:
        if self._companion is not None:
            gradient = np.zeros(_SMALL, np.float32)
            gradient[_MARKS] = 0.5
            self._companion.pull()
            self._companion.push({"w": gradient}, example_count=2)

    def _wait_for_contributions(self, count: int, *, seconds: float) -> None:
        members = self._fleet.members
        self._fleet.wait_until(lambda: all(len(member.applied) >= count for member in members), seconds=seconds)


def assert_resumed_with_each_contribution_applied_once(outcome: Outcome, moment: Moment) -> None:
    applied_count = _MARKS
    assert outcome.weights[:_MARKS].tolist() == [-1.0] * _MARKS
    if moment == "waiting":
        assert outcome.weights[_MARKS] == -CONTRIBUTIONS
        applied_count += CONTRIBUTIONS
    assert (outcome.status.applied_count, outcome.status.rejected_counts) == (applied_count, {})
    assert outcome.exit_codes == [0] * WORKERS
    assert outcome.resumed_after_seconds <= RESUME_SECONDS
