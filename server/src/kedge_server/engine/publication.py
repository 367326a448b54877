"""The weights that a run's readers get, and those who wait for others."""

import asyncio
from collections.abc import Callable

from kedge.wire.errors import KedgeError
from kedge_server.core.rounds import PullGate
from kedge_server.engine.clock import Clock
from kedge_server.engine.snapshots import Snapshot, Weights
from kedge_server.engine.waiting import within

OPEN = PullGate(is_open=True)


class Publication:
    """The newest snapshot of a run; in lockstep also that of the barrier, which every worker goes on with.

    Args:
        run: its name, for messages.
        snapshot: the first one.
        clock: the time.
    """

    def __init__(self, run: str, snapshot: Snapshot, clock: Clock) -> None:
        self.snapshot = snapshot
        self._barrier = snapshot
        self._run = run
        self._clock = clock
        self._published = asyncio.Event()
        self._gates_changed = asyncio.Event()
        self._end: KedgeError | None = None

    def publish(self, snapshot: Snapshot) -> None:
        """Takes the snapshot of the next step."""
        self.snapshot = snapshot
        self._wake_readers()

    def keep_barrier(self, step: int, *, is_wanted: bool) -> None:
        """Keeps the snapshot of this step, if it is the newest; where nobody wants one, the newest stands for it."""
        if not is_wanted or self.snapshot.step == step:
            self._barrier = self.snapshot

    def serves(self, step: int) -> bool:
        """Whether readers who come now may still get the weights of this step."""
        return step in (self.snapshot.step, self._barrier.step)

    def require_weights(self, weights: Weights) -> None:
        """Refuses slow weights where there are none.

        Raises:
            KedgeError: NO_SLOW_WEIGHTS.
        """
        if weights != "fast" and self.snapshot.slow is None:
            message = f"{self._run} has no Lookahead, so no slow weights: pull the fast ones"
            raise KedgeError("NO_SLOW_WEIGHTS", message, run=self._run)

    def open_gates(self) -> None:
        """Lets those whom a gate keeps look whether it still does."""
        changed, self._gates_changed = self._gates_changed, asyncio.Event()
        changed.set()
        self._wake_readers()

    def _wake_readers(self) -> None:
        published, self._published = self._published, asyncio.Event()
        published.set()

    def end(self, error: KedgeError) -> None:
        """Fails those who wait. What there is can still be read."""
        self._end = error
        self.open_gates()

    async def read(self, gate: Callable[[], PullGate], *, min_step: int, wait_seconds: float | None) -> Snapshot:
        """The newest snapshot, once the gate is open and it is of this step or a later one.

        Raises:
            KedgeError: STEP_NOT_REACHED, WAITING_FOR_SLOWEST, or what `end` was called with.
        """
        deadline = None if wait_seconds is None else self._clock.now() + wait_seconds
        while True:
            now_at = gate()
            snapshot = self._barrier if now_at.is_exact else self.snapshot
            if now_at.is_open and snapshot.step >= max(min_step, now_at.min_step):
                return snapshot
            if self._end is not None:
                raise self._end.with_traceback(None)
            remaining = None if deadline is None else deadline - self._clock.now()
            # Who is kept by a gate is not woken at each step: of many workers that would be many times many.
            if not await within(self._published if now_at.is_open else self._gates_changed, remaining):
                raise self._not_in_time(now_at, snapshot.step, max(min_step, now_at.min_step))

    def _not_in_time(self, gate: PullGate, step: int, min_step: int) -> KedgeError:
        if gate.is_open or gate.facts is None:
            return KedgeError(
                "STEP_NOT_REACHED",
                f"{self._run} is at step {step} and did not reach step {min_step} in time",
                step=step,
                min_step=min_step,
            )
        facts = gate.facts
        return KedgeError(
            "WAITING_FOR_SLOWEST",
            f"the worker is at clock {facts.clock}, the slowest one at {facts.slowest_clock}, the bound is "
            f"{gate.bound}: ask again, or see in the run's status whom it waits for",
            clock=facts.clock,
            slowest_clock=facts.slowest_clock,
            bound=gate.bound,
        )
