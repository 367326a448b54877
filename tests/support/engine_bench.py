"""The engine of a run with everything around it in a test's hands: a clock that stands still until told, and a writer
that only adds."""

import asyncio
import heapq
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from kedge import optim
from kedge.optim.controls import StepValues
from kedge.policies import Admission, Policy
from kedge.wire.manifest import Manifest
from kedge_server.core.admission import Inspection
from kedge_server.core.commits import Created, RunConfig
from kedge_server.core.coordinator import Bounds
from kedge_server.core.image import RunImage
from kedge_server.core.values import MEAN, Combine, ContributionHeader, PushResult
from kedge_server.engine.contributions import PendingContribution
from kedge_server.engine.durability import MemoryStore
from kedge_server.engine.run import RunEngine
from kedge_server.engine.snapshots import Snapshot
from kedge_server.engine.staging import StagingPool

MANIFEST = Manifest.from_specs([("w", (2,), "float32")])


class ManualClock:
    def __init__(self) -> None:
        self.seconds = 0.0
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._ids = itertools.count()
        self._cancelled: set[int] = set()

    def now(self) -> float:
        return self.seconds

    def call_at(self, at_seconds: float, callback: Callable[[], None]) -> Callable[[], None]:
        number = next(self._ids)
        heapq.heappush(self._timers, (at_seconds, number, callback))
        return lambda: self._cancelled.add(number)

    @property
    def live_timer_count(self) -> int:
        return sum(number not in self._cancelled for _, number, _ in self._timers)

    def advance_to(self, seconds: float) -> None:
        while self._timers and self._timers[0][0] <= seconds:
            at, number, callback = heapq.heappop(self._timers)
            self.seconds = at
            if number not in self._cancelled:
                callback()
        self.seconds = seconds


class AddingWriter:
    """weights -= mean of the gradients; can be told to fail."""

    def __init__(self) -> None:
        self.weights = np.zeros(2)
        self.step = 0
        self.error: Exception | None = None
        self.values: list[Sequence[StepValues]] = []
        self.dtype: type[np.floating[Any]] = np.float64

    def apply(
        self,
        gradients: Sequence[np.ndarray],
        factors: Sequence[float],
        values: Sequence[StepValues],
        combine: Combine = MEAN,
    ) -> Snapshot:
        assert combine == MEAN, "this writer only adds"
        self.values.append(values)
        if self.error is not None:
            raise self.error
        self.step += 1
        for weight, gradient in zip(factors, gradients, strict=True):
            self.weights = (self.weights - self.dtype(weight) * gradient.astype(self.dtype)).astype(self.dtype)
        return Snapshot(self.step, 0, (self.weights.astype(np.float32),), None)


class InlineDevice:
    async def run(self, function: Callable[..., object], *arguments: object) -> object:
        await asyncio.sleep(0)
        return function(*arguments)


class Bench:
    """A run with everything around it in a test's hands."""

    def __init__(
        self,
        policy: Policy,
        *,
        admission: Admission | None = None,
        worker_limit: int = 8,
        contribution_limit: int = 4096,
        kept_events: int = 4096,
    ) -> None:
        self.clock = ManualClock()
        self.writer = AddingWriter()
        self.pool = StagingPool(1 << 20)
        config = RunConfig(
            name="runs/r",
            manifest=MANIFEST,
            optimizer=optim.SGD(lr=1.0),
            created_at_seconds=0.0,
            block_elements=2,
            first_epoch=1,
        )
        self.run = RunEngine(
            RunImage.create(Created(config, policy, admission or Admission(), ())),
            self.writer,
            Snapshot(0, 0, (np.zeros(2, np.float32),), None),
            store=MemoryStore("runs/r"),
            held={},
            device=InlineDevice(),
            clock=self.clock,
            bounds=Bounds(worker_limit, contribution_limit),
            kept_events=kept_events,
        )
        self._epochs = itertools.count(1)

    def join(self, worker_id: str, lease_seconds: float = 10.0) -> int:
        return self.run.join(worker_id, epoch=next(self._epochs), duration_seconds=lease_seconds).epoch

    def submit(
        self, worker_id: str, epoch: int, sequence: int, value: float = 1.0, *, base_step: int = 0, examples: int = 1
    ) -> PendingContribution:
        header = self.header(worker_id, epoch, sequence, base_step=base_step, example_count=examples, loss=value)
        buffer = self.pool.acquire(2)
        buffer.array[:] = value
        inspection = Inspection()
        inspection.add(buffer.array)
        return self.run.submit(header, buffer, inspection)

    def header(self, worker_id: str, epoch: int, sequence: int, **fields: Any) -> ContributionHeader:
        defaults = {"base_step": 0, "manifest_digest": MANIFEST.digest, "example_count": 1, "loss": None}
        return ContributionHeader(worker_id=worker_id, epoch=epoch, sequence=sequence, **(defaults | fields))

    async def result(self, contribution: PendingContribution) -> PushResult:
        return await self.run.result(contribution, None)

    @property
    def staging_in_use(self) -> int:
        free = sum(len(arrays) for arrays in self.pool._free.values())
        return self.pool._held_bytes // 8 - free
