"""Failpoints: a process that ends where it is told to, and nowhere else."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kedge_server.storage.files import OsFiles
from kedge_server.storage.journal import Entry, Journal
from kedge_server.telemetry.failpoints import FAILPOINTS, VARIABLE, Failpoint

PROGRAM = """
import sys
from pathlib import Path
import numpy as np
from kedge_server.storage.files import OsFiles
from kedge_server.storage.journal import Entry, Journal

journal = Journal.open(Path(sys.argv[1]), OsFiles(), segment_bytes=300)
for number in range(12):
    journal.append([Entry(1, number, 0.0, b"body", [np.full(100, number, np.uint8)])])
    print(journal.next_index - 1, flush=True)
    if number % 3 == 2:
        journal.sync()
    if number == 9:
        journal.drop_before(6)
print("end", flush=True)
"""
JOURNAL_FAILPOINTS = [name for name in FAILPOINTS if name.startswith("journal.")]


def run(directory: Path, setting: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {VARIABLE: setting}
    command = [sys.executable, "-c", PROGRAM, str(directory)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize("name", JOURNAL_FAILPOINTS)
@pytest.mark.parametrize("time", [1, 2])
def test_journal_that_is_killed_at_a_failpoint_has_all_that_was_said_to_be_written(
    tmp_path: Path, name: str, time: int
) -> None:
    done = run(tmp_path / "journal", f"{name}:{time}")
    assert done.returncode == -signal.SIGKILL, done.stderr
    written = int(done.stdout.split()[-1]) if done.stdout else 0
    journal = Journal.open(tmp_path / "journal", OsFiles(), segment_bytes=300)
    assert journal.next_index - 1 in (written, written + 1)
    for record in journal.records(journal.first_index):
        assert record.step == record.index - 1
        assert record.payload.tolist() == [record.index - 1] * 100
    journal.append([Entry(2, 0, 0.0, b"", [np.zeros(3, np.uint8)])])
    assert [record.kind for record in journal.records(journal.next_index - 1)] == [2]


def test_nothing_happens_where_none_is_set(tmp_path: Path) -> None:
    done = run(tmp_path / "journal", "")
    assert (done.returncode, done.stdout.split()[-1]) == (0, "end"), done.stderr


def test_failpoint_that_is_reached_too_seldom_ends_nothing(tmp_path: Path) -> None:
    done = run(tmp_path / "journal", "journal.write.before:13")
    assert (done.returncode, done.stdout.split()[-1]) == (0, "end"), done.stderr


@pytest.mark.parametrize(("setting", "ends_at"), [("run.create.after", 1), ("run.create.after:3", 3)])
def test_only_the_time_that_is_set_counts(setting: str, ends_at: int) -> None:
    ends: list[None] = []
    failpoint = Failpoint(setting, lambda: ends.append(None))
    for time in range(1, 6):
        failpoint.reached("run.create.before")
        failpoint.reached("run.create.after")
        assert len(ends) == (time >= ends_at)


@pytest.mark.parametrize("setting", ["journal", "journal.write.before:0", "journal.write.before:x", ":1"])
def test_setting_that_names_none_is_refused(setting: str) -> None:
    with pytest.raises(ValueError, match=VARIABLE):
        Failpoint(setting, lambda: None)


def test_names_are_all_different() -> None:
    assert len(set(FAILPOINTS)) == len(FAILPOINTS) >= 14
