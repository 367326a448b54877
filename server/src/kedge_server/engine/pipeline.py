"""What is done to a run's state, one after the other: rounds are applied, copies taken, another state put in its place.

A round is applied and written to the journal at the same time, and published once both are done: nobody is told of a
step, or sees its weights, that a server started anew would not have. Invariant: between two jobs the state on the
device is that of the last step whose commit is written, and no commit of a later step is.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np

from kedge.optim.controls import StepValues
from kedge_server.core import rounds
from kedge_server.core.commits import Judgement, Stepped
from kedge_server.core.contributions import Contribution, Round
from kedge_server.core.stored import Ticket
from kedge_server.engine.contributions import as_failure, pending
from kedge_server.engine.device import DeviceThread, Writer
from kedge_server.engine.durability import RunStore
from kedge_server.engine.snapshots import Snapshot
from kedge_server.telemetry.failpoints import failpoint

ResultT = TypeVar("ResultT")


class ClosedRound(NamedTuple):
    """A round that becomes a step."""

    round: Round
    values: tuple[StepValues, ...]
    """The hyperparameters of the step."""
    ticket: Ticket


class Call(NamedTuple):
    """Something else that is done to the state."""

    run: Callable[[], Awaitable[None]]
    done: "asyncio.Future[Any]"


class Pipeline:
    """The jobs of one run. Belongs to one loop.

    Args:
        writer: the state.
        device: the thread that the writer runs on.
        store: what keeps the run.
        on_applied: is told of each round that has become a durable step, with its snapshot.
        on_failed: is told of the rounds that will never become one, and why.
    """

    def __init__(
        self,
        writer: Writer,
        device: DeviceThread,
        store: RunStore,
        *,
        on_applied: Callable[[Round, Snapshot], None],
        on_failed: Callable[[Sequence[Round], BaseException], None],
    ) -> None:
        self._writer = writer
        self._device = device
        self._store = store
        self._on_applied = on_applied
        self._on_failed = on_failed
        self._jobs: deque[ClosedRound | Call] = deque()
        self._working: asyncio.Task[None] | None = None

    def add(self, closed: Round, values: tuple[StepValues, ...]) -> None:
        """Takes the next round to be applied."""
        self._start(ClosedRound(closed, values, self._store.reserve(_commit_of(closed, values))))

    async def do(self, begin: Callable[[], Callable[[Writer], ResultT]], ticket: Ticket | None = None) -> ResultT:
        """Does something to the state, after what is there to be done already.

        Args:
            begin: called on the loop when it is its turn; what it returns is called on the device thread.
            ticket: a commit that has to be written before the next job.
        """
        done: asyncio.Future[ResultT] = asyncio.get_running_loop().create_future()

        async def run() -> None:
            try:
                result = await self._device.run(begin(), self._writer)
                if ticket is not None:
                    await self._store.written(ticket)
            except Exception as error:
                if not done.done():
                    done.set_exception(error)
            else:
                if not done.done():
                    done.set_result(result)

        self._start(Call(run, done))
        return await done

    @property
    def is_busy(self) -> bool:
        """Whether there is something to be done."""
        return self._working is not None

    async def drain(self) -> None:
        """Returns when everything has been done."""
        while self._working is not None:
            await asyncio.wait([self._working])

    def _start(self, job: ClosedRound | Call) -> None:
        self._jobs.append(job)
        if self._working is None:
            self._working = asyncio.create_task(self._work())

    async def _work(self) -> None:
        try:
            while self._jobs:
                job = self._jobs.popleft()
                if isinstance(job, ClosedRound):
                    await self._apply(job)
                else:
                    await job.run()
        except Exception as error:
            self._on_failed([job.round for job in self._jobs if isinstance(job, ClosedRound)], error)
            for job in self._jobs:
                if isinstance(job, Call) and not job.done.done():
                    job.done.set_exception(as_failure("the run", error))
            self._jobs.clear()
        finally:
            self._working = None

    async def _apply(self, job: ClosedRound) -> None:
        closed = job.round
        held = closed.in_order()
        factors = rounds.factors([c.header.example_count for c in held], [c.staleness for c in held], closed.policy)
        gradients = [pending(c).gradient.padded for c in held]
        combine = rounds.combination(closed.policy, len(held))
        apply = self._writer.apply
        if self._store.keeps_gradients:
            apply = partial(self._writer.apply_combined, on_combined=self._provider(job.ticket))
        try:
            snapshot = await self._device.run(apply, gradients, factors, job.values, combine)
        except BaseException as error:
            self._on_failed([closed], error)
            raise
        if not self._store.keeps_gradients:
            self._store.provide(job.ticket, ())
        try:
            await self._store.written(job.ticket)
        except BaseException as error:
            self._on_failed([closed], error)
            raise
        failpoint("engine.acknowledge.before")
        self._on_applied(closed, snapshot)
        failpoint("engine.acknowledge.after")

    def _provider(self, ticket: Ticket) -> Callable[[Sequence[np.ndarray]], object]:
        """Takes a payload on the device thread to the store."""
        loop = asyncio.get_running_loop()
        return lambda payload: loop.call_soon_threadsafe(self._store.provide, ticket, payload)


def _commit_of(closed: Round, values: tuple[StepValues, ...]) -> Stepped:
    loss, example_count = closed.loss()
    return Stepped(
        step=closed.step,
        reason=closed.close_reason,
        judgements=tuple(map(_judgement, closed.contributions)),
        loss=loss,
        loss_example_count=example_count,
        values=values,
    )


def _judgement(contribution: Contribution) -> Judgement:
    assert contribution.judgement is not None, "what is in a round was judged"
    return contribution.judgement
