"""The tools as the command calls them: each reads a directory, prints what it found, and says how to exit."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from kedge.wire.errors import KedgeError
from kedge_server.storage.errors import DataDirError, StorageError
from kedge_server.telemetry import logging
from kedge_server.tools import export, inspection, text, verification
from kedge_server.tools.reading import MisuseError, RunFiles, chosen_runs, opened
from kedge_server.tools.state import Weights

INTACT, DAMAGED, MISUSED = 0, 1, 2
"""The codes to exit with."""

ReportT = TypeVar("ReportT", inspection.RunReport, verification.RunVerdict)


class ToolError(Exception):
    """A tool could not do what it was asked to; the message says why.

    Attributes:
        code: to exit with.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def inspect(data_dir: Path, *, run: str | None, as_json: bool) -> int:
    """Prints what there is, and whether it is intact.

    Raises:
        ToolError: the directory or the run cannot be looked at.
    """
    return _report(data_dir, run, inspection.inspect, None if as_json else text.inspection_lines)


def verify(data_dir: Path, *, run: str | None, as_json: bool) -> int:
    """Prints whether the journal leads to what the checkpoints hold.

    Raises:
        ToolError: the directory or the run cannot be looked at.
    """
    return _report(data_dir, run, verification.verify, None if as_json else text.verification_lines)


def export_weights(data_dir: Path, path: Path, *, run: str, checkpoint: str | None, weights: Weights) -> None:
    """Writes weights to a file, and prints how much.

    Raises:
        ToolError: nothing was written.
    """
    with _telling(), opened(data_dir) as opened_dir:
        (files,) = chosen_runs(opened_dir, run)
        written = export.export(files, path, checkpoint=checkpoint, weights=weights)
    print(f"step {written.step}: {written.tensor_count:,} tensors, {written.element_count:,} elements in {path}")


def _report(
    data_dir: Path,
    run: str | None,
    look: Callable[[Sequence[RunFiles]], tuple[list[ReportT], list[str]]],
    lines: Callable[[ReportT], list[str]] | None,
) -> int:
    with _telling(), opened(data_dir) as opened_dir:
        reports, unfinished = look(chosen_runs(opened_dir, run))
    problems = opened_dir.problems
    if lines is None:
        print(text.as_json(opened_dir.generation, reports, problems))
    else:
        print(text.title(data_dir, opened_dir.generation, len(reports)))
        for problem in problems:
            print(f"PROBLEM {problem}")
        for report in reports:
            print("", *lines(report), sep="\n")
        for name in unfinished:
            print(f"\n{name}  its creation was never finished: the next server removes it")
    is_damaged = bool(problems) or any(report.problems for report in reports)
    return DAMAGED if is_damaged else INTACT


@contextmanager
def _telling() -> Iterator[None]:
    logging.configure(level="error", format="text")  # what recovery would log is in the report
    try:
        yield
    except (MisuseError, DataDirError, KedgeError) as error:
        message = error.message if isinstance(error, KedgeError) else str(error)
        raise ToolError(message, MISUSED) from error
    except StorageError as error:
        raise ToolError(error.message, DAMAGED) from error
