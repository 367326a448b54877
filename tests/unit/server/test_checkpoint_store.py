import asyncio
import contextlib
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest

from kedge_server.storage import checkpoints
from kedge_server.storage.checkpoints import CheckpointInfo, CheckpointMissing, CheckpointStore
from kedge_server.storage.errors import StorageFull, StorageUnavailable, SyncFailed
from kedge_server.storage.files import OsFile, OsFiles

MIB = 1 << 20
SAVE_FAILPOINTS = (
    "checkpoint.write.before",
    "checkpoint.write.after",
    "checkpoint.sync.before",
    "checkpoint.manifest.before",
    "checkpoint.manifest.written",
    "checkpoint.manifest.renamed",
)


class KilledError(BaseException):
    """Stands in for the end of the process: nothing may tidy up after it."""


def some_arrays(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "fast.00000": rng.standard_normal(1000).astype(np.float32),
        "slow.00000": rng.standard_normal((10, 100)).astype(np.float32),
        "state.00003.1": np.array(7 + seed, np.int32),
    }


def save(store: CheckpointStore, step: int = 3, next_index: int = 7, **changes: Any) -> CheckpointInfo:
    given: dict[str, Any] = {
        "created_at_seconds": 1234.5,
        "metrics": {},
        "image": b'{"step": 3}',
        "arrays": some_arrays(),
        **changes,
    }
    return store.save(step=step, next_index=next_index, **given)


def assert_loads(store: CheckpointStore, checkpoint_id: str, arrays: Mapping[str, np.ndarray]) -> None:
    loaded = store.load(checkpoint_id).arrays
    assert list(loaded) == list(arrays)
    for name, array in arrays.items():
        assert (loaded[name].dtype, loaded[name].shape) == (array.dtype, array.shape), name
        assert loaded[name].tobytes() == array.tobytes(), name


def ids(store: CheckpointStore) -> list[str]:
    return [info.checkpoint_id for info in store.list()]


def names(path: Path) -> list[str]:
    return sorted(each.name for each in path.iterdir())


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path, OsFiles())


@pytest.fixture
def killed_at(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    @contextlib.contextmanager
    def kill(name: str, error: type[BaseException] = KilledError) -> Iterator[None]:
        def reached(other: str) -> None:
            if other == name:
                raise error(name)

        with monkeypatch.context() as patch:
            patch.setattr(checkpoints, "failpoint", reached)
            with pytest.raises(error):
                yield

    return kill


def test_it_loads_as_it_was_saved(store: CheckpointStore, tmp_path: Path) -> None:
    info = save(store, metrics={"loss": np.float32(0.5), "accuracy": 1})
    assert info[:4] == ("3-7", 3, 7, 1234.5)
    assert info.metrics == {"loss": 0.5, "accuracy": 1.0}
    files = [each for each in (tmp_path / "3-7").rglob("*") if each.is_file() and each.name != "manifest.json"]
    assert info.size_bytes == sum(each.stat().st_size for each in files)
    loaded = store.load("3-7")
    assert (loaded.info, loaded.image) == (info, b'{"step": 3}')
    assert_loads(store, "3-7", some_arrays())


def test_every_bit_of_every_dtype_and_shape_comes_back(store: CheckpointStore) -> None:
    bits = np.random.default_rng(1).integers(0, 256, 240, np.uint8)  # signalling NaNs and subnormals among them
    dtypes = ("f4", "f8", "f2", ml_dtypes.bfloat16, "i1", "i4", "i8", "u1", "u4", "u8")
    arrays: dict[str, np.ndarray] = {f"a.{n}": bits.view(dtype) for n, dtype in enumerate(dtypes)}
    arrays |= {
        "bool": bits < 128,
        "scalar": np.array(0.1, np.float32),
        "int": np.array(2**31, np.uint32),
        "empty": np.zeros((0, 4), np.float16),
        "strided": bits.reshape(24, 10)[::2, ::3],
        "fortran": np.asfortranarray(bits.reshape(24, 10)),
        "zeros": np.zeros(100, np.float32),
        "minus_zero": np.full(3, -0.0, np.float32),
    }
    save(store, arrays=arrays)
    assert_loads(store, "3-7", arrays)


@pytest.mark.parametrize("arrays", [{}, {"empty": np.zeros(0, np.float32)}])
def test_no_state_at_all_is_a_state(store: CheckpointStore, arrays: dict[str, np.ndarray]) -> None:
    save(store, arrays=arrays, image=b"")
    assert store.load("3-7").image == b""
    assert_loads(store, "3-7", arrays)


def test_arrays_beyond_what_is_read_at_a_time_come_back(store: CheckpointStore) -> None:
    arrays = {f"a.{n}": np.full(6 * MIB, n, np.float32) for n in range(4)}
    save(store, arrays=arrays)
    assert_loads(store, "3-7", arrays)


def test_the_list_is_newest_first_by_the_journal_for_who_saved_and_who_looks(
    store: CheckpointStore, tmp_path: Path
) -> None:
    for step, next_index in ((10, 20), (30, 60), (15, 80), (9, 5)):
        save(store, step, next_index)
    assert ids(store) == ["15-80", "30-60", "10-20", "9-5"]
    looking = CheckpointStore(tmp_path, OsFiles())
    assert looking.list() == store.list()
    assert looking.damaged() == {}


def test_again_at_the_same_place_the_metrics_are_added(store: CheckpointStore, tmp_path: Path) -> None:
    first = save(store, metrics={"loss": 2.0})
    second = save(store, metrics={"accuracy": 0.5, "loss": 1.0}, created_at_seconds=99.0)
    assert second == first._replace(metrics={"loss": 1.0, "accuracy": 0.5})
    assert CheckpointStore(tmp_path, OsFiles()).list() == store.list() == [second]
    assert names(tmp_path) == ["3-7"]
    assert_loads(store, "3-7", some_arrays())


def test_again_at_the_place_of_a_damaged_one_takes_its_place(store: CheckpointStore, tmp_path: Path) -> None:
    save(store)
    (tmp_path / "3-7" / "image.json").unlink()
    save(store)
    assert (names(tmp_path), ids(store), store.damaged()) == (["3-7"], ["3-7"], {})
    assert_loads(store, "3-7", some_arrays())


@pytest.mark.parametrize("name", ["", "a/b", "../a", "a b", ".a"])
def test_a_name_that_could_be_a_path_is_refused(store: CheckpointStore, tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="cannot name an array"):
        save(store, arrays={name: np.zeros(3)})
    assert names(tmp_path) == []


@pytest.mark.parametrize("checkpoint_id", ["3-8", "", ".", "..", "../other/3-7", "3-7/state", "latest"])
def test_one_that_is_not_there_is_said(store: CheckpointStore, tmp_path: Path, checkpoint_id: str) -> None:
    save(store)
    for use in (store.load, store.verify, store.delete):
        with pytest.raises(CheckpointMissing, match="choose one of the list"):
            use(checkpoint_id)
    assert (names(tmp_path), ids(store)) == (["3-7"], ["3-7"])


def test_a_deleted_one_is_gone_and_the_others_stay(store: CheckpointStore, tmp_path: Path) -> None:
    for next_index in (7, 8, 9):
        save(store, next_index=next_index)
    (tmp_path / "3-8" / "manifest.json").unlink()
    store.delete("3-7")
    store.delete("3-8")
    assert (names(tmp_path), ids(store), store.damaged()) == (["3-9"], ["3-9"], {})


def test_where_an_event_loop_runs_it_refuses_to_work(store: CheckpointStore, tmp_path: Path) -> None:
    async def call() -> None:
        save(store)

    with pytest.raises(RuntimeError, match="a thread of their own"):
        asyncio.run(call())
    assert names(tmp_path) == []


def test_several_runs_save_and_load_side_by_side(tmp_path: Path) -> None:
    def play(run: int) -> None:
        (tmp_path / str(run)).mkdir()
        store = CheckpointStore(tmp_path / str(run), OsFiles())
        for turn in range(3):
            arrays = some_arrays(10 * run + turn)
            save(store, turn, turn, arrays=arrays)
            assert_loads(store, f"{turn}-{turn}", arrays)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(play, range(4)))


# ----------------------------------------------------------------------------------------------------- cut off half-way


@pytest.mark.parametrize("name", SAVE_FAILPOINTS)
def test_a_process_that_ends_while_saving_leaves_a_whole_one_or_none(
    store: CheckpointStore, tmp_path: Path, killed_at: Callable[..., Any], name: str
) -> None:
    save(store)
    with killed_at(name):
        save(store, 4, 9, arrays=some_arrays(1))
    after = CheckpointStore(tmp_path, OsFiles())
    is_whole = name == "checkpoint.manifest.renamed"
    assert ids(after) == (["4-9", "3-7"] if is_whole else ["3-7"])
    assert after.damaged() == {}
    before = names(tmp_path)
    assert_loads(after, "3-7", some_arrays())
    assert names(tmp_path) == before, "looking and loading remove nothing"
    after.clean_up()
    assert names(tmp_path) == (["3-7", "4-9"] if is_whole else ["3-7"])
    save(after, 4, 9, arrays=some_arrays(1))
    assert_loads(after, "4-9", some_arrays(1))


@pytest.mark.parametrize("name", SAVE_FAILPOINTS[:-1])
def test_an_error_while_saving_leaves_nothing(
    store: CheckpointStore, tmp_path: Path, killed_at: Callable[..., Any], name: str
) -> None:
    save(store)
    with killed_at(name, RuntimeError):
        save(store, 4, 9)
    assert (names(tmp_path), ids(store), store.damaged()) == (["3-7"], ["3-7"], {})


def test_what_a_killed_process_left_goes_before_the_next_one(
    store: CheckpointStore, tmp_path: Path, killed_at: Callable[..., Any]
) -> None:
    with killed_at("checkpoint.manifest.before"):
        save(store)
    assert names(tmp_path) != []
    save(store, 5, 11)
    assert names(tmp_path) == ["5-11"]


def test_a_process_that_ends_while_new_metrics_are_written_leaves_the_old_ones(
    store: CheckpointStore, tmp_path: Path
) -> None:
    class Dying(OsFiles):
        def rename(self, old: Path, new: Path) -> None:
            raise KilledError

    save(store, metrics={"loss": 1.0})
    with pytest.raises(KilledError):
        save(CheckpointStore(tmp_path, Dying()), metrics={"loss": 2.0})
    after = CheckpointStore(tmp_path, OsFiles())
    assert after.list()[0].metrics == {"loss": 1.0}
    assert_loads(after, "3-7", some_arrays())


def test_a_process_that_ends_while_deleting_leaves_a_whole_one_or_none(
    store: CheckpointStore, tmp_path: Path, killed_at: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    save(store)
    with killed_at("checkpoint.retain.before"):
        store.delete("3-7")
    assert_loads(CheckpointStore(tmp_path, OsFiles()), "3-7", some_arrays())
    monkeypatch.setattr(checkpoints.shutil, "rmtree", lambda path, **_: (path / "state" / "_METADATA").unlink())
    monkeypatch.setattr(checkpoints, "_REMOVALS", 1)
    store.delete("3-7")
    monkeypatch.undo()
    after = CheckpointStore(tmp_path, OsFiles())
    assert (after.list(), after.damaged(), len(names(tmp_path))) == ([], {}, 1)
    after.clean_up()
    assert names(tmp_path) == []


# --------------------------------------------------------------------------------------------------- what the disk does


def test_all_is_on_the_disk_before_it_has_its_name_and_its_name_before_it_is_said(tmp_path: Path) -> None:
    done: list[tuple[str, Path]] = []

    class RecordingFile(OsFile):
        def sync(self) -> None:
            super().sync()
            done.append(("sync", self.path))

    class Recording(OsFiles):
        def open(self, path: Path, *, writable: bool = False, create: bool = False) -> OsFile:
            super().open(path, writable=writable, create=create).close()
            return RecordingFile(path, os.open(path, os.O_RDWR))

        def rename(self, old: Path, new: Path) -> None:
            super().rename(old, new)
            done.append(("rename", new))

        def sync_directory(self, directory: Path) -> None:
            super().sync_directory(directory)
            done.append(("sync", directory))

    save(CheckpointStore(tmp_path, Recording()))
    named = done.index(("rename", tmp_path / "3-7"))
    before = {path.relative_to(tmp_path).parts[1:] for what, path in done[:named] if what == "sync"}
    tree = tmp_path / "3-7"
    expected = {each.relative_to(tree).parts for each in tree.rglob("*")} | {()}
    assert before - {("manifest.json.tmp",)} == expected - {("manifest.json",)}
    assert ("manifest.json.tmp",) in before
    assert done[named + 1 :] == [("sync", tmp_path)]
    manifest = next(at for at, (_, path) in enumerate(done) if path.name.startswith("manifest.json"))
    assert manifest >= len(expected) - 1, "the manifest came last"


class RefusedFile(OsFile):
    def __init__(self, path: Path, descriptor: int, refuse: Callable[[str], None]) -> None:
        super().__init__(path, descriptor)
        self._refuse = refuse

    def write(self, offset: int, buffers: Any) -> None:
        self._refuse("write")
        super().write(offset, buffers)

    def sync(self) -> None:
        self._refuse("sync")
        super().sync()


class Refusing(OsFiles):
    """Fails at the n-th of what it is asked to change, or to sync."""

    def __init__(self, at: int, error: type[Exception]) -> None:
        self._left = at
        self._error = error

    def refuse(self, what: str) -> None:
        is_sync = what == "sync"
        if is_sync == (self._error is SyncFailed):
            self._left -= 1
            if self._left == 0:
                raise self._error(what)

    def open(self, path: Path, *, writable: bool = False, create: bool = False) -> OsFile:
        if create:
            self.refuse("open")
        super().open(path, writable=writable, create=create).close()
        return RefusedFile(path, os.open(path, os.O_RDWR), self.refuse)

    def rename(self, old: Path, new: Path) -> None:
        self.refuse("rename")
        super().rename(old, new)

    def make_directory(self, directory: Path) -> None:
        self.refuse("make_directory")
        super().make_directory(directory)

    def sync_directory(self, directory: Path) -> None:
        self.refuse("sync")
        super().sync_directory(directory)


@pytest.mark.parametrize("error", [StorageFull, StorageUnavailable])
def test_wherever_the_disk_refuses_nothing_is_left_and_the_next_one_works(
    store: CheckpointStore, tmp_path: Path, error: type[Exception]
) -> None:
    save(store)
    for at in range(1, 50):
        refused = CheckpointStore(tmp_path, Refusing(at, error))
        try:
            save(refused, 4, 9)
        except error:
            assert (names(tmp_path), ids(refused)) == (["3-7"], ["3-7"])
        else:
            break
    assert at == 1 + 7, "a directory, twice a file opened and written, two renames"
    assert_loads(refused, "4-9", some_arrays())


def test_a_failed_sync_is_never_passed_over(tmp_path: Path) -> None:
    failures = 0
    for at in range(1, 100):
        store = CheckpointStore(tmp_path, Refusing(at, SyncFailed))
        try:
            save(store, next_index=at)
        except SyncFailed:
            failures += 1
            assert store.list() == []
            for name in names(tmp_path):
                CheckpointStore(tmp_path, OsFiles()).delete(name)
        else:
            break
    inside = sum(1 for _ in (tmp_path / f"3-{at}").rglob("*"))
    # All in it, itself, itself again with the manifest, and the one above; Orbax makes a file more at times.
    assert failures >= inside + 3


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (ValueError("RESOURCE_EXHAUSTED: Failed to write 12 bytes [os_error_code='28']"), StorageFull),
        (ValueError("RESOURCE_EXHAUSTED: Failed to write 12 bytes [os_error_code='122']"), StorageFull),
        (ValueError("Failed to write 12 bytes [os_error_code='30']"), StorageUnavailable),
        (OSError(28, "No space left on device"), StorageFull),
        (OSError(5, "Input/output error"), StorageUnavailable),
        (RuntimeError("something else"), StorageUnavailable),
    ],
)
def test_what_orbax_says_of_the_disk_is_said_in_the_storages_words(
    store: CheckpointStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    raised: Exception,
    expected: type[Exception],
) -> None:
    def fail(self: Any, directory: Path, tree: Any) -> None:
        (directory / "d").mkdir(parents=True)
        raise raised

    monkeypatch.setattr(ocp.Checkpointer, "save", fail)
    with pytest.raises(expected):
        save(store)
    assert (names(tmp_path), store.list()) == ([], [])


def test_a_refusal_behind_another_error_is_found(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        try:
            raise OSError(28, "No space left on device")
        except OSError as error:
            raise RuntimeError("a part of the save failed") from error

    monkeypatch.setattr(ocp.Checkpointer, "save", fail)
    with pytest.raises(StorageFull):
        save(store)


@pytest.mark.parametrize("wrong", ["another value", "another dtype", "another shape", "nothing", "less"])
def test_a_save_that_claims_success_and_reads_otherwise_is_none(
    store: CheckpointStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    honest = ocp.Checkpointer.save

    def lie(self: Any, directory: Path, tree: dict[str, np.ndarray]) -> None:
        name, array = next(iter(tree.items()))
        changed = {
            "another value": {**tree, name: np.where(np.arange(array.size) == 17, 0, array).astype(array.dtype)},
            "another dtype": {**tree, name: array.view(np.int32)},
            "another shape": {**tree, name: array.reshape(2, -1)},
            "less": {other: tree[other] for other in tree if other != name},
        }
        if wrong != "nothing":
            honest(self, directory, changed[wrong])

    monkeypatch.setattr(ocp.Checkpointer, "save", lie)
    with pytest.raises(StorageUnavailable, match="does not read as it was written"):
        save(store)
    assert (names(tmp_path), store.list()) == ([], [])


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A file system of 8 MiB, not in pytest's own folders, which it could not remove if it were left over."""
    if os.geteuid() != 0:
        pytest.skip("mounting a file system needs root")
    with tempfile.TemporaryDirectory(prefix="kedge-disk-", ignore_cleanup_errors=True) as folder:
        mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder]
        mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
        if mounted.returncode:
            pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
        try:
            yield Path(folder)
        finally:  # lazily: Orbax's threads may have a file open for a moment more
            subprocess.run(["umount", "--lazy", folder], check=True)


def fill(disk: Path, *, but: int) -> None:
    (disk / "filler").unlink(missing_ok=True)
    found = os.statvfs(disk)
    (disk / "filler").write_bytes(bytes(found.f_bavail * found.f_frsize - but))


@pytest.mark.root
def test_on_a_full_disk_nothing_is_left_and_it_works_again_when_there_is_room(small_disk: Path) -> None:
    store = CheckpointStore(small_disk, OsFiles())
    arrays = {"fast.00000": np.random.default_rng(2).standard_normal(MIB // 4).astype(np.float32)}
    save(store, arrays=arrays)
    for room in (0, 4096, 100_000, MIB):
        fill(small_disk, but=room)
        with pytest.raises(StorageFull, match=r"takes 1,.* bytes, and there are [\d,]+: make room"):
            save(store, 4, 9, arrays=arrays)
        assert (names(small_disk), ids(store)) == (["3-7", "filler"], ["3-7"])
        assert_loads(store, "3-7", arrays)
    (small_disk / "filler").unlink()
    save(store, 4, 9, arrays=arrays)
    assert_loads(store, "4-9", arrays)


@pytest.mark.root
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of Orbax's threads, which go on
def test_a_disk_that_fills_up_while_orbax_writes_is_full_too(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(small_disk, OsFiles())
    monkeypatch.setattr(store, "_check_room", lambda size_bytes: None)
    rng = np.random.default_rng(3)
    arrays = {f"a.{n}": rng.standard_normal(MIB // 4).astype(np.float32) for n in range(3)}
    for room in (0, 4096, 20_000, 100_000, MIB, 2 * MIB, 2 * MIB + 700_000):
        fill(small_disk, but=room)
        with pytest.raises(StorageFull):
            save(store, arrays=arrays)
        assert store.list() == []
        assert [name for name in names(small_disk) if not name.startswith(".")] == ["filler"]
    (small_disk / "filler").unlink()
    save(store, arrays=arrays)
    assert_loads(store, "3-7", arrays)
    assert names(small_disk) == ["3-7"]
