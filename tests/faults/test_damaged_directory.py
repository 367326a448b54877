"""Files of a data directory are changed: a server says so, and goes on from what is intact or not at all."""

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from damage import Damage, files_of, flip, flip_somewhere, truncate_somewhere
from durable_server import DurableServer, essence, inspected, kedge_server
from durable_training import SETTINGS, Training, impatient_client
from recovered_content import SEGMENT_BYTES, Content, Recovered, content_of, recovered
from server_process import ServerEndedError

from kedge_server.storage.files import OsFiles
from kedge_server.storage.journal import Journal
from kedge_server.storage.records import parsed_mark

CASES = 500
SEED = 17


class Kept(NamedTuple):
    """A data directory as a killed server left it, and what is in it. Not to be changed."""

    path: Path
    essence: dict
    synced_bytes: int
    """Of the last segment."""

    @property
    def run(self) -> Path:
        return self.path / "runs" / "main"


@pytest.fixture(scope="module")
def synced(tmp_path_factory: pytest.TempPathFactory) -> Kept:
    """Of a run whose every commit was synced before it was acknowledged."""
    path = tmp_path_factory.mktemp("synced") / "data"
    with DurableServer(path, environment=SETTINGS).start() as server, impatient_client(server.address) as client:
        Training(client, "journal-sync").make_all_steps()
        server.kill()
    return Kept(path, essence(inspected(path)["runs/main"]), segments_of(path)[-1].stat().st_size)


@pytest.fixture(scope="module")
def unsynced(tmp_path_factory: pytest.TempPathFactory) -> Kept:
    """Of a run whose last step was not synced yet, so that a loss of power might have torn it."""
    for _ in range(5):
        path = tmp_path_factory.mktemp("unsynced") / "data"
        synced_bytes = train_but_for_the_last_sync(path)
        if synced_index_of(path) < last_index_of(path):
            return Kept(path, essence(inspected(path)["runs/main"]), synced_bytes)
    raise AssertionError("a sync is always faster than the kill")


def train_but_for_the_last_sync(path: Path) -> int:
    """Leaves the server no time to sync the last step, it is to be hoped; the bytes of the segment before that step."""
    settings = SETTINGS | {"KEDGE_STORAGE__SEGMENT_BYTES": "10000000", "KEDGE_STORAGE__SYNC_SECONDS": "0.5"}
    with DurableServer(path, environment=settings).start() as server, impatient_client(server.address) as client:
        training = Training(client, "journal")
        for step in range(10):
            training.make_step(step)
        while synced_index_of(path) < last_index_of(path):
            pass
        synced_bytes = segments_of(path)[-1].stat().st_size
        training.make_step(10)
        server.kill()
    return synced_bytes


def last_index_of(data_dir: Path) -> int:
    """That of the last record that is whole."""
    journal = Journal.open(data_dir / "runs/main/journal", OsFiles(), segment_bytes=SEGMENT_BYTES, repairs=False)
    return journal.next_index - 1


def synced_index_of(data_dir: Path) -> int:
    """As the journal itself has noted it."""
    return parsed_mark((data_dir / "runs/main/journal/synced").read_bytes())


@pytest.fixture
def data_dir(synced: Kept, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(synced.path, tmp_path / "data"))


@pytest.fixture
def server(data_dir: Path) -> Iterator[DurableServer]:
    with DurableServer(data_dir, environment=SETTINGS) as durable:
        yield durable


def checkpoints_of(data_dir: Path) -> list[Path]:
    """Oldest first."""
    return sorted((data_dir / "runs/main/checkpoints").iterdir(), key=lambda path: int(path.name.split("-")[1]))


def segments_of(data_dir: Path) -> list[Path]:
    """Oldest first."""
    return sorted((data_dir / "runs/main/journal").glob("*.log"))


def damage_checkpoint(checkpoint: Path) -> None:
    """In the largest of its files, in the middle."""
    path = max((path for path in checkpoint.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    flip(path, path.stat().st_size // 2)


def refusal_to_start(server: DurableServer) -> str:
    """What is said; every file is as it was."""
    before = files_of(server.data_dir)
    with pytest.raises(ServerEndedError) as ended:
        server.start()
    assert ended.value.process.process.returncode > 0
    assert "Traceback" not in server.log
    assert files_of(server.data_dir) == before
    return server.log


def test_newest_checkpoint_is_damaged_so_it_goes_back_to_the_one_before_and_comes_to_the_same_state(
    server: DurableServer, synced: Kept
) -> None:
    newest = checkpoints_of(server.data_dir)[-1]
    damage_checkpoint(newest)
    server.start()
    assert f"checkpoint {newest.name} is damaged" in server.log
    server.kill()
    assert essence(inspected(server.data_dir)["runs/main"]) == synced.essence


def test_all_checkpoints_are_damaged_and_the_journal_is_not_whole_so_it_refuses_to_start(server: DurableServer) -> None:
    for checkpoint in checkpoints_of(server.data_dir):
        damage_checkpoint(checkpoint)
    assert segments_of(server.data_dir)[0].name != f"{1:020}.log"
    said = refusal_to_start(server)
    assert "runs/main" in said
    assert "cannot be recovered" in said


def test_only_checkpoint_is_damaged_and_the_journal_is_whole_so_it_begins_at_the_beginning(
    tmp_path: Path,
) -> None:
    with DurableServer(tmp_path / "data") as server:
        server.start()
        with impatient_client(server.address) as client:
            training = Training(client, "journal")
            for step in range(6):  # a checkpoint is made after three
                training.make_step(step)
            server.kill()
        expected = essence(inspected(server.data_dir)["runs/main"])
        for checkpoint in checkpoints_of(server.data_dir):
            damage_checkpoint(checkpoint)
        server.start()
        assert "is damaged" in server.log
        server.kill()
        assert essence(inspected(server.data_dir)["runs/main"]) == expected


def test_journal_is_damaged_in_the_middle_so_it_refuses_to_start_and_names_the_place(server: DurableServer) -> None:
    segment = segments_of(server.data_dir)[-1]
    flip(segment, segment.stat().st_size // 3)
    said = refusal_to_start(server)
    assert str(segment) in said
    assert "is damaged at byte" in said


def test_segment_is_missing_so_it_refuses_to_start(server: DurableServer) -> None:
    for checkpoint in checkpoints_of(server.data_dir)[1:]:
        shutil.rmtree(checkpoint)
    segments_of(server.data_dir)[-2].unlink()
    assert str(server.data_dir / "runs/main/journal") in refusal_to_start(server)


def test_second_server_on_a_directory_is_refused_and_the_first_one_goes_on(server: DurableServer) -> None:
    server.start()
    second = kedge_server("serve", "--listen", "127.0.0.1:0", "--data-dir", server.data_dir)
    assert second.returncode == 2
    assert str(server.data_dir) in second.stderr
    assert "in use" in second.stderr
    with impatient_client(server.address) as client:
        assert client.get_run("main").status().step == 12


def broken(kept: Kept, at: Path, damage: Callable[[Path, random.Random], Damage], dice: random.Random) -> Damage:
    """A copy of the run's directory with one damage."""
    shutil.rmtree(at, ignore_errors=True)
    shutil.copytree(kept.run, at)
    return damage(at, dice)


def assert_is_of(found: Recovered, content: Content, said: str) -> None:
    """Nothing was recovered that was not written."""
    assert found.state == content.states[found.origin], said
    for index, commit in found.commits.items():
        assert commit == content.commits[index], said


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("damage", [flip_somewhere, truncate_somewhere])
@pytest.mark.parametrize("level", ["synced", "unsynced"])
def test_no_damage_is_loaded_silently(
    request: pytest.FixtureRequest, tmp_path: Path, damage: Callable[..., Damage], level: str
) -> None:
    kept: Kept = request.getfixturevalue(level)
    content = content_of(Path(shutil.copytree(kept.run, tmp_path / "whole")))
    dice = random.Random(f"{SEED} {damage.__name__} {level}")
    fates = {"refused": 0, "whole": 0, "less": 0}
    for case in range(CASES // 2):
        done = broken(kept, tmp_path / "broken", damage, dice)
        said = f"case {case}: {damage.__name__} of {done}"
        found = recovered(tmp_path / "broken")
        if not isinstance(found, Recovered):
            assert str(found), said
            fates["refused"] += 1
            continue
        assert_is_of(found, content, said)
        if found.next_index == content.next_index:
            fates["whole"] += 1
            continue
        # Only what was not synced, and not without a word; of a file that is cut nobody can tell what it had.
        fates["less"] += 1
        assert level == "unsynced", said
        assert done.path.suffix == ".log", said
        assert done.offset >= kept.synced_bytes or damage is truncate_somewhere, said
        assert found.next_index > synced_index_of(kept.path), said
        assert found.problems, said
    print(f"{damage.__name__} of what was {level}: {fates}")
    assert fates["whole"], fates
    assert fates["refused"] or level == "unsynced", fates
    assert bool(fates["less"]) == (level == "unsynced"), fates
