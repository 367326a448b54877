import contextlib
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kedge_server.storage import data_dir
from kedge_server.storage.data_dir import DataDir
from kedge_server.storage.errors import DataDirError, StorageFull
from kedge_server.storage.files import OsFiles

HOLD = """
import sys
from pathlib import Path
from kedge_server.storage.data_dir import DataDir
from kedge_server.storage.files import OsFiles
held = DataDir.open(Path(sys.argv[1]), OsFiles())
print(held.generation, flush=True)
sys.stdin.read()
"""

HOLD_AND_FORK = """
import os, subprocess, sys
from pathlib import Path
from kedge_server.storage.data_dir import DataDir
from kedge_server.storage.files import OsFiles
held = DataDir.open(Path(sys.argv[1]), OsFiles())
child = os.fork()
if child == 0:
    sys.stdin.read()
    os._exit(0)
subprocess.Popen(["cat"], close_fds=False)
print(child, flush=True)
os._exit(0)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data"


@contextlib.contextmanager
def process(script: str, path: Path) -> Iterator[subprocess.Popen[str]]:
    started = subprocess.Popen(
        [sys.executable, "-c", script, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with started:
        try:
            yield started
        finally:
            started.kill()


def opened(path: Path) -> DataDir:
    return DataDir.open(path, OsFiles())


def tree(path: Path) -> dict[str, bytes | None]:
    return {
        str(each.relative_to(path)): each.read_bytes() if each.is_file() else None for each in sorted(path.rglob("*"))
    }


def test_a_new_directory_is_its_owners_alone_and_begins_with_generation_1(path: Path) -> None:
    with opened(path) as held:
        assert (held.generation, held.run_names(), held.problems) == (1, [], ())
    assert stat.S_IMODE(path.stat().st_mode) == 0o700


def test_each_start_has_the_next_generation(path: Path) -> None:
    for generation in range(1, 5):
        with opened(path) as held:
            assert held.generation == generation


def test_each_process_that_starts_has_the_next_generation(path: Path) -> None:
    for generation in ("1", "2", "3"):
        with process(HOLD, path) as started:
            assert started.stdout is not None
            assert started.stdout.readline().strip() == generation


def test_a_second_server_is_refused_with_the_process_that_holds_it_and_what_to_do(path: Path) -> None:
    with process(HOLD, path) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "1\n"
        before = tree(path)
        for take in (opened, DataDir.look):
            with pytest.raises(DataDirError) as refused:
                take(path)
            message = refused.value.message
            assert str(path) in message
            assert f"process id {first.pid}" in message
            assert "stop that one first" in message
        assert tree(path) == before


def test_it_is_free_again_when_the_process_is_killed(path: Path) -> None:
    with process(HOLD, path) as first:
        assert first.stdout is not None
        first.stdout.readline()
        first.send_signal(signal.SIGKILL)
        first.wait(30)
        with opened(path) as held:
            assert held.generation == 2
        assert (path / "lock").read_text() == f"{os.getpid()}\n"


def test_children_do_not_hold_it_when_its_process_is_gone(path: Path) -> None:
    with process(HOLD_AND_FORK, path) as first:
        assert first.stdout is not None
        child = int(first.stdout.readline())
        first.wait(30)
        os.kill(child, 0)  # it lives, and waits for an end of its input
        with opened(path) as held:
            assert held.generation == 2


def test_two_in_one_process_are_refused_too(path: Path) -> None:
    with opened(path), pytest.raises(DataDirError, match="in use"):
        opened(path)
    with opened(path):
        pass


def test_closing_twice_lets_go_of_nothing_else(path: Path) -> None:
    first = opened(path)
    first.close()
    with opened(path):
        first.close()
        with pytest.raises(DataDirError, match="in use"):
            opened(path)


def test_looking_changes_nothing_and_keeps_servers_out(path: Path) -> None:
    with opened(path) as held:
        held.create_run("digits")
    (path / "runs" / ".deleted-old-0").mkdir()
    before = tree(path)
    with DataDir.look(path) as looked:
        assert (looked.generation, looked.run_names(), looked.problems) == (1, ["digits"], ())
        with pytest.raises(DataDirError, match="in use"):
            opened(path)
    assert tree(path) == before


@pytest.mark.parametrize("content", [b"", b"3\n", b"3\ncrc32c 00000000\n", b"\x00" * 17])
def test_a_damaged_generation_stops_a_server_and_is_told_to_who_looks(path: Path, content: bytes) -> None:
    opened(path).close()
    (path / "generation").write_bytes(content)
    with pytest.raises(DataDirError, match="generation is damaged: bring it back from a copy, or remove it"):
        opened(path)
    with DataDir.look(path) as looked:
        assert "generation is damaged" in looked.problems[0]
    assert (path / "generation").read_bytes() == content
    (path / "generation").unlink()
    with opened(path) as held:
        assert held.generation == 1


def test_no_single_bit_of_the_generation_can_change_unnoticed(path: Path) -> None:
    opened(path).close()
    whole = (path / "generation").read_bytes()
    for bit in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        (path / "generation").write_bytes(flipped)
        with pytest.raises(DataDirError, match="damaged"):
            opened(path)


def test_a_start_that_ends_before_the_generation_has_its_name_did_not_count(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class KilledError(BaseException):
        pass

    def kill(name: str) -> None:
        assert name == "generation.write"
        raise KilledError

    opened(path).close()
    with monkeypatch.context() as patch:
        patch.setattr(data_dir, "failpoint", kill)
        with pytest.raises(KilledError):
            opened(path)
    with opened(path) as held:
        assert held.generation == 2


def test_a_full_disk_is_said_and_the_lock_is_free_again(path: Path) -> None:
    class Full(OsFiles):
        def rename(self, old: Path, new: Path) -> None:
            raise StorageFull(f"{old} cannot be renamed, as the disk is full: make room")

    opened(path).close()
    with pytest.raises(DataDirError, match=r"cannot be used: .*make room"):
        DataDir.open(path, Full())
    with opened(path) as held:
        assert held.generation == 2


def test_a_file_is_no_data_directory(path: Path) -> None:
    path.write_text("notes")
    with pytest.raises(DataDirError, match="is a file: give a directory"):
        opened(path)
    assert path.read_text() == "notes"


def test_the_directory_above_must_be_there(path: Path) -> None:
    with pytest.raises(DataDirError, match=rf"there is no {path / 'a'}: make that first"):
        opened(path / "a" / "b")
    assert not path.exists()


def test_a_directory_without_permission_is_said(path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    path.mkdir(mode=0o500)
    with pytest.raises(DataDirError, match=r"cannot be used .*see to its permissions"):
        opened(path)


@pytest.mark.parametrize("what", ["missing", "a file", "another directory"])
def test_looking_needs_a_data_directory(path: Path, what: str) -> None:
    if what == "a file":
        path.write_text("notes")
    elif what == "another directory":
        path.mkdir()
    with pytest.raises(DataDirError, match="is no data directory"):
        DataDir.look(path)
    assert not path.is_dir() or not list(path.iterdir())


def test_runs_are_made_listed_and_deleted(path: Path) -> None:
    with opened(path) as held:
        for run_id in ("b", "a.b-c_1"):
            directory = held.create_run(run_id)
            assert sorted(each.name for each in directory.iterdir()) == ["checkpoints", "journal"]
            assert directory == held.run_directory(run_id) == path / "runs" / run_id
        assert held.run_names() == ["a.b-c_1", "b"]
        (path / "runs" / "b" / "journal" / "1.log").write_text("records")
        held.delete_run("b")
        held.delete_run("b")
        assert held.run_names() == ["a.b-c_1"]
        assert [each.name for each in (path / "runs").iterdir()] == ["a.b-c_1"]


def test_a_run_of_a_name_that_is_taken_is_refused(path: Path) -> None:
    with opened(path) as held:
        (held.create_run("a") / "journal" / "1.log").write_text("records")
        with pytest.raises(DataDirError, match="is there already"):
            held.create_run("a")
        assert (path / "runs" / "a" / "journal" / "1.log").read_text() == "records"


@pytest.mark.parametrize("run_id", ["", ".", "..", ".deleted-a-0", "a/b", "../../etc"])
def test_no_name_leads_out_of_the_directory(path: Path, run_id: str) -> None:
    with opened(path) as held:
        for use in (held.run_directory, held.create_run, held.delete_run):
            with pytest.raises(ValueError, match="cannot name"):
                use(run_id)


def test_a_run_whose_deletion_was_cut_off_is_gone_and_removed_at_the_next_start(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(path) as held, monkeypatch.context() as patch:
        patch.setattr(data_dir.shutil, "rmtree", lambda *_, **__: None)
        for _ in range(3):
            held.create_run("a")
            held.delete_run("a")
        assert held.run_names() == []
        assert len(list((path / "runs").iterdir())) == 3
    with opened(path) as held:
        assert list((path / "runs").iterdir()) == []


def test_a_new_run_and_a_deletion_are_brought_to_the_disk(path: Path) -> None:
    synced: list[str] = []

    class Recording(OsFiles):
        def sync_directory(self, directory: Path) -> None:
            super().sync_directory(directory)
            synced.append(str(directory.relative_to(path)))

    with DataDir.open(path, Recording()) as held:
        synced.clear()
        held.create_run("a")
        assert synced == ["runs/a/journal", "runs/a/checkpoints", "runs/a", "runs"]
        synced.clear()
        held.delete_run("a")
        assert synced == ["runs"]


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (["train.py", "runs/exp1/events.out"], "is not empty, and no data directory"),
        (["runs/exp1/events.out"], "holds events.out, which is no part of a run"),
        (["lock", "runs/lost+found/x"], "holds x, which is no part of a run"),
    ],
)
def test_directory_of_somebody_else_is_refused_and_left_as_it_is(tmp_path: Path, made: list[str], message: str) -> None:
    for name in made:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("theirs")
    with pytest.raises(DataDirError, match=message):
        DataDir.open(tmp_path, OsFiles())
    assert [(tmp_path / name).read_text() for name in made] == ["theirs"] * len(made)
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()} == set(made)
