"""`kedge-server verify`: applies a run's whole journal anew, into nowhere, and compares with what its checkpoints hold.

The bits are the same only on the backend that made them: the same JAX on the same kind of device.
"""

import asyncio
from collections.abc import Collection, Iterator, Sequence
from typing import Literal, NamedTuple

import jax

from kedge_server.core.stored import Replayed
from kedge_server.engine.device import DeviceThread, Writer
from kedge_server.engine.recovery import Replay, writer_of
from kedge_server.storage.run_store import load
from kedge_server.tools.reading import FoundForReading, RunFiles
from kedge_server.tools.state import Digests, digests, fingerprint
from kedge_server.tools.survey import CheckpointReport, JournalReport, note, survey

Outcome = Literal["same", "other", "start", "not reached"]

_CREATION = "creation"

# As the fields of a fingerprint.
_WORDS = ("fast weights", "slow weights", "optimizer state", "counts and ledgers", "held gradients")


class CheckpointVerdict(NamedTuple):
    """A checkpoint."""

    id: str
    step: int
    intact: bool
    replay: Outcome
    """same: the replay came to the same bits; start: it began here; not reached: the journal does not lead there."""
    problem: str | None


class RunVerdict(NamedTuple):
    """A run."""

    run: str
    replayed_from: str | None
    """The id of a checkpoint, or "creation"; None if there is nothing to begin with."""
    replayed_step_count: int
    step: int | None
    """At the end of the journal, or as far as it could be read."""
    digests: Digests | None
    """There."""
    backend: str
    """JAX's, that the replay was made on."""
    journal: JournalReport
    checkpoints: list[CheckpointVerdict]
    """Newest first."""
    problems: list[str]


def verify(runs: Sequence[RunFiles]) -> tuple[list[RunVerdict], list[str]]:
    """Verifies runs.

    Returns:
        The runs, and the names of those whose creation was never finished: a server removes these.
    """
    device = DeviceThread()
    try:
        verdicts = {run.name: asyncio.run(_Verification(run, device).verdict()) for run in runs}
    finally:
        device.close()
    return [verdict for verdict in verdicts.values() if verdict], [name for name, each in verdicts.items() if not each]


class _Verification:
    """That of one run."""

    def __init__(self, run: RunFiles, device: DeviceThread) -> None:
        self._run = run
        self._device = device
        self._surveyed = survey(run)
        self._problems = self._surveyed.problems
        self._intact = {each.next_index: each.id for each in self._surveyed.checkpoints if each.intact}
        self._others: dict[str, list[str]] = {}
        """By the id of a checkpoint that the replay came to, what was other than it holds."""
        self._origin: str | None = None
        self._replay: Replay | None = None
        self._digests: Digests | None = None

    async def verdict(self) -> RunVerdict | None:
        """None if the run's creation was never finished."""
        try:
            if not await self._replay_all():
                return None
        except Exception as error:  # what it is that damage breaks is not foreseen
            note(self._problems, error)
        replay = self._replay
        return RunVerdict(
            run=self._run.name,
            replayed_from=self._origin,
            replayed_step_count=0 if replay is None else replay.step_count,
            step=None if replay is None else replay.image.step,
            digests=self._digests,
            backend=await self._device.run(jax.default_backend),
            journal=self._surveyed.journal,
            checkpoints=[self._verdict_of(each) for each in self._surveyed.checkpoints],
            problems=self._problems,
        )

    async def _replay_all(self) -> bool:
        found = FoundForReading(self._run, from_oldest=True)
        origin = await found.open()
        if origin is None:
            return False
        self._surveyed.note_lost(origin.image.config.durability)
        writer = await self._device.run(writer_of, origin.image, origin.arrays)
        replay = self._replay = Replay(found, origin, writer, self._device)
        if self._surveyed.journal.first_index == 1:
            self._origin = _CREATION
            await self._compare(replay, writer)
        else:
            self._origin = self._intact[replay.image.next_index]
        async for batch in found.batches():
            for piece in _pieces(batch, replay.image.next_index, self._intact):
                await replay.apply(piece)
                await self._compare(replay, writer)
        self._digests = await self._device.run(lambda: digests(replay.image, writer.capture()))
        return True

    async def _compare(self, replay: Replay, writer: Writer) -> None:
        """Compares with the checkpoint that is of this moment, if there is one."""
        checkpoint_id = self._intact.get(replay.image.next_index)
        if checkpoint_id is None:
            return
        image = replay.image
        got = await self._device.run(lambda: fingerprint(image, writer.capture(), replay.held))
        there = await asyncio.to_thread(load, self._run.store(), checkpoint_id)
        expected = fingerprint(there.image, there.arrays, there.held)
        others = [word for word, one, other in zip(_WORDS, got, expected, strict=True) if one != other]
        self._others[checkpoint_id] = others
        if others:
            self._problems.append(_difference(checkpoint_id, others))

    def _verdict_of(self, checkpoint: CheckpointReport) -> CheckpointVerdict:
        others = self._others.get(checkpoint.id)
        replay: Outcome = "not reached"
        if others is not None:
            replay = "other" if others else "same"
        elif checkpoint.id == self._origin:
            replay = "start"
        problem = _difference(checkpoint.id, others) if others else checkpoint.problem
        return CheckpointVerdict(checkpoint.id, checkpoint.step, checkpoint.intact, replay, problem)


def _difference(checkpoint_id: str, others: Sequence[str]) -> str:
    return (
        f"checkpoint {checkpoint_id} holds other {', '.join(others)} than the journal leads to on this backend "
        f"({jax.default_backend()}): if it was trained on another one, verify it there; else one of the two is damaged"
    )


def _pieces(batch: Sequence[Replayed], next_index: int, ends: Collection[int]) -> Iterator[Sequence[Replayed]]:
    """A batch in parts, of which each ends where one of these indices is the next."""
    start = 0
    for end in range(1, len(batch) + 1):
        if next_index + end in ends or end == len(batch):
            yield batch[start:end]
            start = end
