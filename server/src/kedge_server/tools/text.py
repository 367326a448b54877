"""What the tools found, as JSON and as lines for people."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kedge_server.tools.inspection import RunReport
from kedge_server.tools.state import Digests
from kedge_server.tools.survey import CheckpointReport, JournalReport
from kedge_server.tools.verification import CheckpointVerdict, RunVerdict

_LABEL = 15
_DIGITS = 12


def as_json(generation: int, runs: Sequence[RunReport | RunVerdict], problems: Sequence[str]) -> str:
    """All of it. JSON has no NaN and no infinity: such a number becomes null."""
    found = {"generation": generation, "runs": list(runs), "problems": list(problems)}
    return json.dumps(_plain(found), indent=2, allow_nan=False)


def title(data_dir: Path, generation: int, run_count: int) -> str:
    """A directory, for people."""
    return f"{data_dir}: {_counted(run_count, 'run')}, {_counted(generation, 'start')} of servers"


def inspection_lines(run: RunReport) -> list[str]:
    """A run, as inspect found it."""
    lines = [_title(run.run, run.durability, run.step, run.problems)]
    if run.step is not None:
        rejected = ", ".join(f"{count} {reason}" for reason, count in sorted(run.rejected_counts.items()))
        lines += [
            _labelled("digests", _digests(run.digests)),
            _labelled("lookahead", _counted(run.lookahead_sync_count or 0, "sync"))
            if run.digests and run.digests.slow
            else "",
            _labelled(
                "contributions", f"{run.applied_count} applied; rejected: {rejected or '0'}; {len(run.held)} held"
            ),
            _labelled("workers", f"{len(run.leases)} live; {_counted(len(run.ledger), 'result')} in the ledger"),
        ]
    lines += [_labelled("journal", _journal(run.journal)), *_checkpoints(map(_checkpoint, run.checkpoints))]
    return [line for line in lines if line] + [_labelled("PROBLEM", problem) for problem in run.problems]


def verification_lines(run: RunVerdict) -> list[str]:
    """A run, as verify found it."""
    origin = "nothing to begin with" if run.replayed_from is None else f"from {run.replayed_from}"
    lines = [
        _title(run.run, None, run.step, run.problems),
        _labelled("journal", _journal(run.journal)),
        _labelled("replay", f"{_counted(run.replayed_step_count, 'step')} applied anew on {run.backend}, {origin}"),
        _labelled("digests", _digests(run.digests)) if run.digests else "",
        *_checkpoints(map(_verdict, run.checkpoints)),
    ]
    return [line for line in lines if line] + [_labelled("PROBLEM", problem) for problem in run.problems]


def _title(run: str, durability: str | None, step: int | None, problems: Sequence[str]) -> str:
    step_said = "cannot be recovered" if step is None else f"step {step}"
    facts = [run, step_said, *([durability] if durability else []), "DAMAGED" if problems else "intact"]
    return "  ".join(facts)


def _digests(digests: Digests | None) -> str:
    found = {} if digests is None else digests._asdict()
    return ", ".join(f"{name} {value[:_DIGITS]}" for name, value in found.items() if value)


def _journal(journal: JournalReport) -> str:
    said = "cannot be opened"
    if journal.first_index is not None and journal.next_index is not None:
        is_empty = journal.first_index == journal.next_index
        said = "no records to apply" if is_empty else f"records {journal.first_index} to {journal.next_index - 1}"
    synced = f", synced up to {journal.synced_index} at least" if journal.synced_index else ""
    cut = f", and {journal.cut_bytes:,} bytes of one that was never whole" if journal.cut_bytes else ""
    return f"{said}{synced}; {_counted(journal.segments, 'segment')}, {journal.bytes:,} bytes{cut}"


def _checkpoint(checkpoint: CheckpointReport) -> list[str]:
    metrics = ", ".join(f"{name}={value:.6g}" for name, value in sorted(checkpoint.metrics.items()))
    size = "-" if checkpoint.size_bytes is None else f"{checkpoint.size_bytes:,} bytes"
    created = (checkpoint.created or "-").partition(".")[0]
    return [checkpoint.id, f"step {checkpoint.step}", created, size, metrics or "-", _intact(checkpoint.intact)]


def _verdict(checkpoint: CheckpointVerdict) -> list[str]:
    said = {
        "same": "the journal leads to the same bits",
        "other": "THE JOURNAL LEADS TO OTHER BITS",
        "start": "the replay began here",
        "not reached": "not reached by the replay",
    }
    return [checkpoint.id, f"step {checkpoint.step}", _intact(checkpoint.intact), said[checkpoint.replay]]


def _intact(is_intact: bool) -> str:
    return "intact" if is_intact else "DAMAGED"


def _checkpoints(rows: Iterable[list[str]]) -> list[str]:
    table = list(rows)
    if not table:
        return [_labelled("checkpoints", "none")]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in table]
    return [_labelled("" if number else "checkpoints", line.rstrip()) for number, line in enumerate(lines)]


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _labelled(label: str, value: str) -> str:
    return f"  {label:<{_LABEL}}{value}"


def _plain(value: Any) -> Any:
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return _plain(value._asdict())
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
