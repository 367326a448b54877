"""Brings a run back to where it stood: the state that storage begins with, and every later step applied again."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from kedge.optim.controls import StepValues
from kedge_server.core.commits import Commit, Held, Rejected, Restored, RunConfig, Stepped
from kedge_server.core.image import HeldKey, RunImage
from kedge_server.core.placement import Placement
from kedge_server.core.plan import Plan
from kedge_server.core.plan import plan as make_plan
from kedge_server.core.stored import Replayed, Restorable
from kedge_server.engine.device import DeviceThread, Writer
from kedge_server.engine.durability import FoundRun


class Recovered(NamedTuple):
    """A run as it stood."""

    image: RunImage
    writer: Writer
    held: Mapping[HeldKey, np.ndarray]
    """The gradients of the contributions that are held."""
    replayed_count: int
    """The steps that were applied again."""


async def recover(found: FoundRun, device: DeviceThread) -> Recovered | None:
    """Recovers a run; None if its creation was never finished.

    Args:
        found: the run in storage.
        device: the thread that its writer runs on.

    Raises:
        Exception: what storage raises: damage is named.
    """
    origin = await found.open()
    if origin is None:
        return None
    writer = await device.run(writer_of, origin.image, origin.arrays, await device.placement())
    replay = Replay(found, origin, writer, device)
    async for batch in found.batches():
        await replay.apply(batch)
    return Recovered(origin.image, writer, replay.held, replay.step_count)


class Replay:
    """The commits of one run on their way.

    Args:
        found: the run in storage.
        origin: where it begins. Its image is taken along.
        writer: of that state.
        device: the thread that the writer runs on.

    Attributes:
        image: what came of the commits so far.
        held: the gradients of the contributions that are held.
        step_count: the steps that were applied.
    """

    def __init__(
        self,
        found: FoundRun,
        origin: Restorable,
        writer: Writer,
        device: DeviceThread,
    ) -> None:
        self.image = origin.image
        self.held = dict(origin.held)
        self.step_count = 0
        self._found = found
        self._writer = writer
        self._device = device

    async def apply(self, batch: Sequence[Replayed]) -> None:
        """Applies commits, in order."""
        steps: list[tuple[np.ndarray, tuple[StepValues, ...]]] = []
        for commit, time_seconds, payload in batch:
            if isinstance(commit, Restored):
                await self._device.run(self._apply_steps, steps)
                steps = []
                await self._go_back(commit)
                continue
            if isinstance(commit, Stepped):
                steps.append((payload.view(np.float32), commit.values))
            self._note_held(commit, payload)
            self.image.apply(commit, time_seconds)
        await self._device.run(self._apply_steps, steps)

    def _apply_steps(self, steps: Sequence[tuple[np.ndarray, tuple[StepValues, ...]]]) -> None:
        for gradient, values in steps:
            self._writer.replay(gradient, values)
            self.step_count += 1

    def _note_held(self, commit: Commit, payload: np.ndarray) -> None:
        judgements = commit.judgements if isinstance(commit, Stepped) else ()
        if isinstance(commit, Rejected):
            judgements = (commit.judgement,)
        for judgement in judgements:
            self.held.pop((judgement.worker_id, judgement.epoch, judgement.sequence), None)
        if isinstance(commit, Held):
            judgement = commit.judgement
            self.held[judgement.worker_id, judgement.epoch, judgement.sequence] = payload.view(np.float32)

    async def _go_back(self, commit: Restored) -> None:
        restorable = await self._found.restored(commit.checkpoint_id, self.image.next_index)
        self.held.clear()
        self.image.go_back(commit, restorable.image)
        values = self.image.controls.values()
        await self._device.run(lambda: self._writer.go_back(restorable.arrays, values, step=commit.step))


def plan_of(config: RunConfig) -> Plan:
    """How a run's state is cut."""
    return make_plan(
        config.optimizer.spec(), config.manifest, groups=config.groups, block_elements=config.block_elements
    )


def writer_of(image: RunImage, arrays: Mapping[str, np.ndarray], placement: Placement | None = None) -> Writer:
    """The writer of a run that stands there. On the device thread.

    Args:
        image: what it is.
        arrays: `weights`, flat, for one that begins; else what `Writer.capture` gave.
        placement: where its state is to live; None for the platform's default.
    """
    plan, values = plan_of(image.config), image.controls.values()
    if "weights" in arrays:
        return Writer(plan, arrays["weights"], values, placement)
    return Writer.resume(plan, arrays, values, step=image.step, placement=placement)
