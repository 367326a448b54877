"""`kedge-server inspect`: what a data directory holds, and what a server would go on from."""

import asyncio
from collections.abc import Sequence
from typing import Any, NamedTuple

from kedge_server.core.image import ImageState, LeaseState
from kedge_server.engine.device import DeviceThread
from kedge_server.engine.recovery import Recovered, recover
from kedge_server.tools.reading import FoundForReading, RunFiles
from kedge_server.tools.state import Digests, digest, digests
from kedge_server.tools.survey import CheckpointReport, JournalReport, note, survey


class LedgerReport(NamedTuple):
    """What became of a contribution."""

    worker: str
    epoch: int
    sequence: int
    outcome: str
    """applied, rejected, or deferred: held in the open round."""
    reason: str | None
    step: int | None
    staleness: int


class LeaseReport(NamedTuple):
    """A live lease."""

    worker: str
    epoch: int
    duration_seconds: float
    clock: int
    last_sequence: int
    applied_count: int
    rejected_count: int


class HeldReport(NamedTuple):
    """A contribution of the open round whose worker was told that it is held."""

    worker: str
    epoch: int
    sequence: int
    digest: str
    """SHA-256 of the gradient."""


class RunReport(NamedTuple):
    """A run. What cannot be recovered is None, or empty."""

    run: str
    durability: str | None
    step: int | None
    lookahead_sync_count: int | None
    digests: Digests | None
    applied_count: int | None
    rejected_counts: dict[str, int]
    ledger: list[LedgerReport]
    leases: list[LeaseReport]
    held: list[HeldReport]
    journal: JournalReport
    checkpoints: list[CheckpointReport]
    problems: list[str]


def inspect(runs: Sequence[RunFiles]) -> tuple[list[RunReport], list[str]]:
    """Reads runs.

    Returns:
        The runs, and the names of those whose creation was never finished: a server removes these.
    """
    device = DeviceThread()
    try:
        reports = {run.name: asyncio.run(_inspect(run, device)) for run in runs}
    finally:
        device.close()
    return [report for report in reports.values() if report], [name for name, report in reports.items() if not report]


async def _inspect(run: RunFiles, device: DeviceThread) -> RunReport | None:
    surveyed = survey(run)
    on_disk: dict[str, Any] = {
        "journal": surveyed.journal,
        "checkpoints": surveyed.checkpoints,
        "problems": surveyed.problems,
    }
    try:
        recovered = await recover(FoundForReading(run), device)
        if recovered is None:
            return None
        surveyed.note_lost(recovered.image.config.durability)
        report = await device.run(_recovered, recovered)
        return report._replace(**on_disk)
    except Exception as error:  # what it is that damage breaks is not foreseen
        note(surveyed.problems, error)
    return RunReport(run.name, None, None, None, None, None, {}, [], [], [], **on_disk)


def _recovered(recovered: Recovered) -> RunReport:
    """On the device thread. What is of the disk is still missing."""
    image, writer = recovered.image, recovered.writer
    if image.config.durability == "checkpoint":
        image.leases.end_all()  # as a server does that recovers it
    state = image.state()
    return RunReport(
        run=image.config.name,
        durability=image.config.durability,
        step=image.step,
        lookahead_sync_count=writer.snapshot().lookahead_sync_count,
        digests=digests(image, writer.capture()),
        applied_count=image.applied_count,
        rejected_counts=state.rejected_counts,
        ledger=_ledger(state),
        leases=[_lease(lease) for lease in state.live],
        held=[HeldReport(*key, digest(recovered.held[key])) for key in state.held],
        journal=JournalReport(None, None, None, 0, 0, 0),
        checkpoints=[],
        problems=[],
    )


def _ledger(state: ImageState) -> list[LedgerReport]:
    return [
        LedgerReport(
            lease.worker_id,
            lease.epoch,
            entry.sequence,
            "deferred" if entry.result is None else entry.result.outcome,
            None if entry.result is None else entry.result.reason,
            None if entry.result is None else entry.result.step,
            entry.staleness,
        )
        for lease in sorted((*state.live, *state.ended), key=lambda lease: (lease.worker_id, lease.epoch))
        for entry in lease.entries
    ]


def _lease(lease: LeaseState) -> LeaseReport:
    return LeaseReport(
        lease.worker_id,
        lease.epoch,
        lease.duration_seconds,
        lease.clock,
        lease.last_sequence,
        lease.applied_count,
        lease.rejected_count,
    )
