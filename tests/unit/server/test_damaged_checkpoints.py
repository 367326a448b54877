"""No byte of a checkpoint changes, goes or comes without its being refused."""

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kedge_server.storage.checkpoints import CheckpointStore
from kedge_server.storage.contents import decode
from kedge_server.storage.errors import CheckpointDamaged
from kedge_server.storage.files import OsFiles

DAMAGES = 500
SEED = 20_261_122


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    state = {f"state.0000{n}": rng.standard_normal(3000).astype(np.float32) for n in range(3)}
    return {**state, "zeros": np.zeros(5000, np.float32), "count": np.array(12, np.int32)}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoints")
    store = CheckpointStore(directory, OsFiles())
    for step, next_index in ((5, 10), (8, 20)):
        store.save(
            step=step,
            next_index=next_index,
            created_at_seconds=1e9,
            metrics={"loss": 0.25},
            image=b'{"workers": ["w0", "w1"]}',
            arrays=arrays(),
        )
    return directory


@pytest.fixture
def store(directory: Path) -> Iterator[CheckpointStore]:
    """A store of two checkpoints, whole before and whole afterwards."""
    store = CheckpointStore(directory, OsFiles())
    assert [info.checkpoint_id for info in store.list()] == ["8-20", "5-10"]
    yield store
    for checkpoint_id in ("8-20", "5-10"):
        assert_whole(store, checkpoint_id)


def files_of(directory: Path) -> list[Path]:
    files = sorted(path for path in (directory / "8-20").rglob("*") if path.is_file() and path.stat().st_size)
    assert {"manifest.json", "image.json", "_METADATA"} <= {path.name for path in files}
    assert len(files) >= 7
    return files


def assert_whole(store: CheckpointStore, checkpoint_id: str) -> None:
    loaded = store.load(checkpoint_id).arrays
    assert {name: array.tobytes() for name, array in loaded.items()} == {
        name: array.tobytes() for name, array in arrays().items()
    }


def assert_refused(store: CheckpointStore, directory: Path, what: str) -> None:
    with pytest.raises(CheckpointDamaged) as refused:
        store.load("8-20")
    assert "checkpoint 8-20 is damaged: " in refused.value.message
    assert what in refused.value.message
    assert f"go on from another one, or bring {directory / '8-20'} back from a copy" in refused.value.message
    with pytest.raises(CheckpointDamaged):
        store.verify("8-20")
    assert [info.checkpoint_id for info in store.list()] == ["5-10"]
    assert store.damaged() == {"8-20": refused.value.message}


def test_500_flipped_bits_over_all_files_are_found_each(store: CheckpointStore, directory: Path) -> None:
    chance = random.Random(SEED)
    files = files_of(directory)
    for n in range(DAMAGES):
        path = files[n % len(files)]
        whole = path.read_bytes()
        bit = chance.randrange(8 * len(whole))
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        assert_refused(store, directory, path.name)
        path.write_bytes(whole)


def test_500_truncations_over_all_files_are_found_each(store: CheckpointStore, directory: Path) -> None:
    chance = random.Random(SEED)
    files = files_of(directory)
    for n in range(DAMAGES):
        path = files[n % len(files)]
        whole = path.read_bytes()
        path.write_bytes(whole[: chance.randrange(len(whole))])
        assert_refused(store, directory, path.name)
        path.write_bytes(whole)


def test_no_single_bit_of_the_manifest_can_change_unnoticed(directory: Path) -> None:
    whole = (directory / "8-20" / "manifest.json").read_bytes()
    for bit in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError, match="the checksum is another"):
            decode(bytes(flipped))


def test_every_file_that_is_missing_is_found(store: CheckpointStore, directory: Path, tmp_path: Path) -> None:
    for path in files_of(directory):
        path.rename(tmp_path / "away")
        assert_refused(store, directory, f"it has no {path.name}" if path.name == "manifest.json" else "is missing")
        (tmp_path / "away").rename(path)


@pytest.mark.parametrize("where", ["extra", "state/extra", "state/d/extra", "state/manifest.json", "new/extra"])
def test_a_file_too_many_is_found(store: CheckpointStore, directory: Path, where: str) -> None:
    extra = directory / "8-20" / where
    extra.parent.mkdir(exist_ok=True)
    extra.write_bytes(b"")
    assert_refused(store, directory, f"file {where} is not in its manifest")
    extra.unlink()


def test_bytes_at_the_end_of_a_file_are_found(store: CheckpointStore, directory: Path) -> None:
    for path in files_of(directory):
        whole = path.read_bytes()
        path.write_bytes(whole + b"\0")
        assert_refused(store, directory, path.name)
        path.write_bytes(whole)


def test_a_file_that_is_now_a_directory_is_found(store: CheckpointStore, directory: Path, tmp_path: Path) -> None:
    for path in files_of(directory):
        path.rename(tmp_path / "away")
        path.mkdir()
        assert_refused(store, directory, path.name)
        path.rmdir()
        (tmp_path / "away").rename(path)


def test_a_checkpoint_under_the_name_of_another_is_found(store: CheckpointStore, directory: Path) -> None:
    first, second, between = directory / "5-10", directory / "8-20", directory / "away"
    for old, new in ((first, between), (second, first), (between, second)):
        old.rename(new)
    swapped = CheckpointStore(directory, OsFiles())
    assert swapped.list() == []
    assert "its manifest is that of checkpoint 5-10" in swapped.damaged()["8-20"]
    with pytest.raises(CheckpointDamaged):
        swapped.load("8-20")
    for old, new in ((first, between), (second, first), (between, second)):
        old.rename(new)


def test_one_whose_manifest_is_damaged_is_told_from_the_start_and_may_be_deleted(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, OsFiles())
    for next_index in (1, 2, 3):
        store.save(step=1, next_index=next_index, created_at_seconds=0.0, metrics={}, image=b"", arrays={})
    (tmp_path / "1-1" / "manifest.json").unlink()
    (tmp_path / "1-2" / "manifest.json").write_bytes(b"{}")
    after = CheckpointStore(tmp_path, OsFiles())
    assert [info.checkpoint_id for info in after.list()] == ["1-3"]
    assert sorted(after.damaged()) == ["1-1", "1-2"]
    assert "it has no manifest.json" in after.damaged()["1-1"]
    assert "the checksum is another" in after.damaged()["1-2"]
    after.delete("1-1")
    assert sorted(after.damaged()) == ["1-2"]


def test_one_that_was_written_by_a_later_version_is_said_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(tmp_path, OsFiles())
    monkeypatch.setattr("kedge_server.storage.contents.VERSION", 2)
    store.save(step=1, next_index=1, created_at_seconds=0.0, metrics={}, image=b"", arrays={})
    monkeypatch.undo()
    with pytest.raises(CheckpointDamaged, match="of version 2, and this server reads version 1"):
        CheckpointStore(tmp_path, OsFiles()).load("1-1")
