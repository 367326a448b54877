"""`kedge-server inspect`, `verify` and `export` on what servers left behind that were killed."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from damage import flip
from durable_server import DurableServer, kedge_server
from durable_training import SETTINGS, Training, impatient_client
from safetensors import safe_open
from safetensors.numpy import load_file

import kedge
from kedge import optim
from kedge_server.storage.checkpoints import CheckpointStore
from kedge_server.storage.files import OsFiles

Weights = dict[str, np.ndarray]

PLAIN = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "h": np.ones(2, np.float16)}
ONES = {name: np.ones_like(value) for name, value in PLAIN.items()}


class Seen(NamedTuple):
    """A data directory of a server that was killed, and what its clients had seen. Not to be changed."""

    path: Path
    main: dict[str, Weights]
    """Fast and slow weights of the run `main` at the end."""
    epochs: dict[str, int]
    """Of the workers of `main`."""
    pair: list[kedge.PushResult]
    """What the workers of `pair` were told, in order; the last one is held."""
    plain: dict[str, Weights]
    """Fast weights of `plain`: at its checkpoint, and at the end."""
    plain_checkpoint: str


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    path = tmp_path_factory.mktemp("seen") / "data"
    with DurableServer(path, environment=SETTINGS) as server:
        server.start()
        with impatient_client(server.address) as client:
            training = Training(client, "journal-sync")
            training.make_all_steps()
            main = {kind: training.run.pull(kind) for kind in ("fast", "slow")}
            epochs = {worker.name.rpartition("/")[2]: worker.epoch for worker in training.workers}
            pair = pair_of(client)
            plain, checkpoint = plain_of(client)
            server.kill()
    return Seen(path, main, epochs, pair, plain, checkpoint)


def pair_of(client: kedge.Client) -> list[kedge.PushResult]:
    """Two workers: one step of both, a gradient that is no number, and one that is held."""
    run = client.create_run(
        "pair", params=PLAIN, optimizer=optim.Momentum(lr=0.5, momentum=0.9), aggregation=kedge.Synchronous(2)
    )
    first, second = (run.join(name, lease_seconds=120) for name in ("a", "b"))
    for worker in (first, second):
        worker.pull()
    told = [first.push(ONES), second.push(ONES, wait_seconds=60)]
    second.pull(min_step=1)
    told.append(second.push({name: np.full_like(value, np.nan) for name, value in PLAIN.items()}))
    told.append(second.push({name: 3 * value for name, value in ONES.items()}))
    return told


def plain_of(client: kedge.Client) -> tuple[dict[str, Weights], str]:
    """Three steps, a checkpoint, two more, back to it, and four steps of another kind."""
    run = client.create_run("plain", params=PLAIN, optimizer=optim.SGD(lr=1.0), aggregation=kedge.Asynchronous())
    worker = run.join("a", lease_seconds=120)
    worker.pull()
    for _ in range(3):
        worker.step(ONES)
    checkpoint = run.checkpoint({"accuracy": 0.75})
    at_checkpoint = run.pull()
    for _ in range(2):
        worker.step(ONES)
    assert run.restore(checkpoint) == 3
    worker.close()
    other = run.join("b", lease_seconds=120)
    other.pull()
    for _ in range(4):
        other.step({name: 2 * value for name, value in ONES.items()})
    run.checkpoint()
    return {"at checkpoint": at_checkpoint, "at the end": run.pull()}, checkpoint.name.rpartition("/")[2]


@pytest.fixture
def data_dir(seen: Seen, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(seen.path, tmp_path / "data"))


def told(tool: str, *arguments: object, code: int = 0) -> dict[str, Any]:
    process = kedge_server(tool, *arguments, "--json")
    assert process.returncode == code, process.stdout + process.stderr
    return json.loads(process.stdout)


def the_run(said: dict[str, Any], name: str) -> dict[str, Any]:
    return next(run for run in said["runs"] if run["run"] == name)


def sha256(*parts: bytes | np.ndarray) -> str:
    return hashlib.sha256(b"".join(bytes(part) for part in parts)).hexdigest()


def flat(weights: Weights) -> bytes:
    """The weights as the run keeps them: in its tensors' order, float32."""
    return b"".join(value.astype("<f4").tobytes() for value in weights.values())


def all_files(directory: Path) -> dict[str, tuple[bytes, float]]:
    return {
        str(path): (path.read_bytes() if path.is_file() else b"", path.stat().st_mtime)
        for path in sorted(directory.rglob("*"))
    }


def segments_of(data_dir: Path, run: str) -> list[Path]:
    return sorted((data_dir / "runs" / run / "journal").glob("*.log"))


def damage_newest_checkpoint(data_dir: Path, run: str) -> str:
    newest = max((data_dir / "runs" / run / "checkpoints").iterdir(), key=lambda path: int(path.name.split("-")[1]))
    largest = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    flip(largest, largest.stat().st_size // 2)
    return newest.name


# ------------------------------------------------------------------------------------------------------------- inspect


def test_inspect_says_of_a_run_what_its_clients_saw(seen: Seen) -> None:
    run = the_run(told("inspect", seen.path), "runs/main")
    assert (run["step"], run["lookahead_sync_count"]) == (12, 12 // 5)
    assert run["digests"]["fast"] == sha256(flat(seen.main["fast"]))
    assert run["digests"]["slow"] == sha256(flat(seen.main["slow"]))
    assert (run["applied_count"], run["rejected_counts"]) == (23, {"NON_FINITE_GRADIENT": 4})
    assert {lease["worker"]: lease["epoch"] for lease in run["leases"]} == seen.epochs
    assert len(run["ledger"]) == 23 + 4
    assert {entry["epoch"] for entry in run["ledger"] if entry["worker"] == "a"} == {seen.epochs["a"]}
    assert run["held"] == run["problems"] == []
    assert [checkpoint["intact"] for checkpoint in run["checkpoints"]] == [True, True]
    journal = run["journal"]
    sizes = [path.stat().st_size for path in segments_of(seen.path, "main")]
    assert (journal["segments"], journal["bytes"], journal["cut_bytes"]) == (len(sizes), sum(sizes), 0)
    assert journal["synced_index"] == journal["next_index"] - 1  # it was synced with every answer


def test_inspect_says_what_is_held_and_what_every_contribution_was_told(seen: Seen) -> None:
    run = the_run(told("inspect", seen.path, "--run", "pair"), "runs/pair")
    first, *others = run["ledger"]
    assert (first["worker"], first["sequence"], first["outcome"], first["step"]) == ("a", 1, "applied", 1)
    assert [(e["worker"], e["sequence"], e["outcome"], e["staleness"]) for e in others] == [
        ("b", number, result.outcome, result.staleness) for number, result in enumerate(seen.pair[1:], 1)
    ]
    assert [entry["reason"] for entry in others] == ["QUORUM_REACHED", "NON_FINITE_GRADIENT", None]
    (held,) = run["held"]
    assert (held["worker"], held["sequence"]) == ("b", 3)
    assert held["digest"] == sha256(flat({name: 3 * value for name, value in ONES.items()}))


def test_inspect_digests_the_state_of_the_rule_by_name_and_bytes(seen: Seen) -> None:
    run = the_run(told("inspect", seen.path, "--run", "runs/pair"), "runs/pair")
    velocity = np.zeros(4096, "<f4")  # the length of a block; what it has beyond the 8 weights stays zero
    velocity[:8] = 1  # after one step it is the gradient
    assert run["digests"] == {
        "fast": sha256(flat({name: value - np.float32(0.5) for name, value in PLAIN.items()})),
        "slow": None,
        "state": sha256(b"state.00000.0", velocity),
    }


def test_inspect_follows_a_run_that_went_back_to_a_checkpoint(seen: Seen) -> None:
    said = told("inspect", seen.path, "--run", "plain")
    assert [run["run"] for run in said["runs"]] == ["runs/plain"]
    run = the_run(said, "runs/plain")
    assert (run["step"], run["applied_count"]) == (3 + 4, 3 + 4)
    assert run["digests"]["fast"] == sha256(flat({name: value - np.float32(3 + 8) for name, value in PLAIN.items()}))
    by_id = {checkpoint["id"]: checkpoint for checkpoint in run["checkpoints"]}
    assert by_id[seen.plain_checkpoint]["metrics"] == {"accuracy": 0.75}
    assert by_id[seen.plain_checkpoint]["step"] == 3


@pytest.mark.parametrize("tool", ["inspect", "verify", "export"])
def test_tools_change_nothing(seen: Seen, tool: str, tmp_path: Path) -> None:
    before = all_files(seen.path)
    options = ["--run", "main", "-o", tmp_path / "w.safetensors"] if tool == "export" else []
    assert kedge_server(tool, seen.path, *options).returncode == 0
    assert all_files(seen.path) == before


def test_torn_tail_is_no_damage_and_stays_where_it_is(data_dir: Path) -> None:
    segment = segments_of(data_dir, "plain")[-1]
    with segment.open("ab") as file:
        file.write(b"KJRC and then no more")
    run = the_run(told("inspect", data_dir, "--run", "plain"), "runs/plain")
    assert (run["journal"]["cut_bytes"], run["step"], run["problems"]) == (21, 7, [])
    assert segment.read_bytes().endswith(b"no more")
    said = kedge_server("inspect", data_dir, "--run", "plain")
    assert said.returncode == 0
    assert "21 bytes of one that was never whole" in said.stdout


def test_damaged_checkpoint_is_named_and_the_run_is_recovered_without_it(seen: Seen, data_dir: Path) -> None:
    checkpoint_id = damage_newest_checkpoint(data_dir, "main")
    run = the_run(told("inspect", data_dir, code=1), "runs/main")
    assert [one["intact"] for one in run["checkpoints"]] == [False, True]
    assert run["checkpoints"][0]["id"] == checkpoint_id
    assert "the checksum is another" in run["checkpoints"][0]["problem"]
    assert (run["step"], run["digests"]["fast"]) == (12, sha256(flat(seen.main["fast"])))
    assert run["problems"] == [run["checkpoints"][0]["problem"]]


def test_damaged_journal_is_named_and_the_other_runs_are_said_to_be_intact(data_dir: Path) -> None:
    (segment,) = segments_of(data_dir, "pair")
    flip(segment, segment.stat().st_size // 2)
    said = told("inspect", data_dir, code=1)
    run = the_run(said, "runs/pair")
    assert (run["step"], run["digests"], run["ledger"]) == (None, None, [])
    assert [str(segment) in problem and "damaged at byte" in problem for problem in run["problems"]] == [True]
    assert [the_run(said, name)["problems"] for name in ("runs/main", "runs/plain")] == [[], []]
    printed = kedge_server("inspect", data_dir)
    assert printed.returncode == 1
    assert "runs/pair  cannot be recovered  DAMAGED" in printed.stdout
    assert "runs/plain  step 7  journal  intact" in printed.stdout


def test_damaged_journal_before_the_newest_checkpoint_is_found_although_no_recovery_needs_it(data_dir: Path) -> None:
    (segment,) = segments_of(data_dir, "plain")
    flip(segment, segment.stat().st_size // 3)
    run = the_run(told("inspect", data_dir, "--run", "plain", code=1), "runs/plain")
    assert run["step"] == 7
    assert ["of the journal are not there or not whole" in problem for problem in run["problems"]] == [True]


def test_damaged_generation_is_a_problem_of_the_directory(data_dir: Path) -> None:
    flip(data_dir / "generation", 0)
    said = told("inspect", data_dir, "--run", "pair", code=1)
    assert [str(data_dir / "generation") in problem for problem in said["problems"]] == [True]
    assert said["runs"][0]["problems"] == []


def test_run_whose_creation_was_never_finished_is_said_to_be_none(data_dir: Path) -> None:
    for name in ("journal", "checkpoints"):
        (data_dir / "runs/half" / name).mkdir(parents=True)
    assert told("inspect", data_dir, "--run", "half")["runs"] == []
    assert "runs/half  its creation was never finished" in kedge_server("inspect", data_dir, "--run", "half").stdout


# -------------------------------------------------------------------------------------------------------------- verify


def test_verify_finds_the_bits_that_every_checkpoint_on_the_way_holds(seen: Seen) -> None:
    said = told("verify", seen.path)
    assert (said["generation"], said["problems"]) == (1, [])
    assert [run["problems"] for run in said["runs"]] == [[], [], []]
    main, pair, plain = (the_run(said, f"runs/{name}") for name in ("main", "pair", "plain"))
    newest, oldest = main["checkpoints"]
    assert (newest["replay"], oldest["replay"]) == ("same", "start")
    assert main["replayed_from"] == oldest["id"]
    assert (main["step"], main["replayed_step_count"]) == (12, 12 - oldest["step"])
    assert main["digests"]["slow"] == sha256(flat(seen.main["slow"]))
    assert (pair["replayed_from"], pair["replayed_step_count"], pair["checkpoints"]) == ("creation", 1, [])
    assert (plain["replayed_from"], plain["replayed_step_count"]) == ("creation", 3 + 2 + 4)
    assert [checkpoint["replay"] for checkpoint in plain["checkpoints"]] == ["same", "same"]


def change_weight(arrays: Weights) -> None:
    arrays["fast.00000"].view(np.uint32)[0] ^= 1


def change_image(image: bytes) -> bytes:
    return image.replace(b'"applied_count":7', b'"applied_count":8')


@pytest.mark.parametrize(("of", "word"), [("weights", "fast weights"), ("image", "counts and ledgers")])
def test_verify_finds_a_checkpoint_that_is_whole_and_holds_another_bit(data_dir: Path, of: str, word: str) -> None:
    """As a checkpoint would that a defect of the server had written."""
    store = CheckpointStore(data_dir / "runs/plain/checkpoints", OsFiles())
    newest = store.list()[0]
    held = store.load(newest.checkpoint_id)
    arrays = {name: array.copy() for name, array in held.arrays.items()}
    image = change_image(held.image) if of == "image" else held.image
    if of == "weights":
        change_weight(arrays)
    store.delete(newest.checkpoint_id)
    store.save(
        step=newest.step,
        next_index=newest.next_index,
        created_at_seconds=newest.created_at_seconds,
        metrics=newest.metrics,
        image=image,
        arrays=arrays,
    )
    assert told("inspect", data_dir, "--run", "plain")["runs"][0]["problems"] == []
    run = the_run(told("verify", data_dir, "--run", "plain", code=1), "runs/plain")
    assert [checkpoint["replay"] for checkpoint in run["checkpoints"]] == ["other", "same"]
    assert [f"holds other {word} than" in problem for problem in run["problems"]] == [True]
    printed = kedge_server("verify", data_dir, "--run", "plain")
    assert printed.returncode == 1
    assert "THE JOURNAL LEADS TO OTHER BITS" in printed.stdout


def test_verify_says_how_far_a_damaged_journal_leads(data_dir: Path) -> None:
    (segment,) = segments_of(data_dir, "pair")
    flip(segment, segment.stat().st_size // 2)
    run = the_run(told("verify", data_dir, "--run", "pair", code=1), "runs/pair")
    assert run["digests"] is None
    assert [str(segment) in problem for problem in run["problems"]] == [True]


# -------------------------------------------------------------------------------------------------------------- export


def test_export_writes_what_a_client_would_have_pulled(seen: Seen, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    for options, expected, metadata in (
        (("--run", "plain"), seen.plain["at the end"], {"step": "7", "weights": "fast"}),
        (
            ("--run", "runs/plain", "--checkpoint", f"runs/plain/checkpoints/{seen.plain_checkpoint}"),
            seen.plain["at checkpoint"],
            {"step": "3", "weights": "fast"},
        ),
    ):
        exported = kedge_server("export", seen.path, *options, "-o", path)
        assert exported.returncode == 0, exported.stderr
        tensors = load_file(path)
        assert set(tensors) == set(expected)
        for name, value in expected.items():
            np.testing.assert_array_equal(tensors[name], value, strict=True)
        with safe_open(path, framework="numpy") as file:
            assert file.metadata() == {"run": "runs/plain"} | metadata


def test_export_of_damage_writes_nothing(data_dir: Path, tmp_path: Path) -> None:
    checkpoint_id = damage_newest_checkpoint(data_dir, "main")
    path = tmp_path / "weights.safetensors"
    refused = kedge_server("export", data_dir, "--run", "main", "--checkpoint", checkpoint_id, "-o", path)
    assert (refused.returncode, path.exists()) == (1, False)
    assert f"checkpoint {checkpoint_id} is damaged" in refused.stderr


# -------------------------------------------------------------------------------------------------------------- misuse


@pytest.mark.parametrize("tool", ["inspect", "verify", "export"])
def test_directory_that_a_server_holds_is_refused(tmp_path: Path, tool: str) -> None:
    options = ["--run", "main", "-o", tmp_path / "w.safetensors"] if tool == "export" else []
    with DurableServer(tmp_path / "data") as server:
        server.start()
        refused = kedge_server(tool, server.data_dir, *options)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert f"{server.data_dir} is in use by another process" in refused.stderr


WRONG: dict[str, tuple[Callable[[Seen], list[object]], str]] = {
    "no data directory": (lambda seen: ["inspect", seen.path / "runs"], "is no data directory"),
    "nothing there": (lambda seen: ["verify", "/nowhere"], "is no data directory"),
    "no such run": (lambda seen: ["inspect", seen.path, "--run", "no"], "are runs/main, runs/pair, runs/plain"),
    "no name": (lambda seen: ["verify", seen.path, "--run", "../main"], "cannot name a run"),
    "no such checkpoint": (
        lambda seen: ["export", seen.path, "--run", "main", "--checkpoint", "1-2", "-o", "w"],
        "has no checkpoint 1-2",
    ),
    "no slow weights": (
        lambda seen: ["export", seen.path, "--run", "plain", "--weights", "slow", "-o", "w"],
        "has no Lookahead, so no slow weights",
    ),
    "no folder": (lambda seen: ["export", seen.path, "--run", "plain", "-o", "/nowhere/w"], "there is no folder"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_done_is_said_and_exits_with_2(seen: Seen, case: str) -> None:
    arguments, expected = WRONG[case]
    refused = kedge_server(*arguments(seen))
    assert (refused.returncode, refused.stdout) == (2, "")
    assert expected in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not Path("w").exists()


def test_server_and_tools_take_a_path_that_begins_here(tmp_path: Path) -> None:
    relative = Path(os.path.relpath(tmp_path / "data"))
    with DurableServer(relative) as server:
        server.start()
        with impatient_client(server.address) as client:
            run = client.create_run("r", params=PLAIN, optimizer=optim.SGD(lr=1.0), aggregation=kedge.Asynchronous())
            checkpoint = run.checkpoint()
        server.kill()
    run = the_run(told("inspect", relative), "runs/r")
    assert [one["id"] for one in run["checkpoints"]] == [checkpoint.name.rpartition("/")[2]]
    assert run["step"] == 0


# --------------------------------------------------------------------------------------------- docs/durability.md says


def test_run_at_checkpoint_level_whose_newest_checkpoint_is_damaged_goes_on_from_the_one_before(tmp_path: Path) -> None:
    with DurableServer(tmp_path / "data") as server:
        server.start()
        with impatient_client(server.address) as client:
            run = client.create_run(
                "r",
                params=PLAIN,
                optimizer=optim.SGD(lr=1.0),
                aggregation=kedge.Asynchronous(),
                durability="checkpoint",
            )
            with run.join("a") as worker:
                worker.pull()
                for _ in range(2):
                    worker.step(ONES)
                    run.checkpoint()
        server.kill()
    damage_newest_checkpoint(server.data_dir, "r")
    run = the_run(told("inspect", server.data_dir, code=1), "runs/r")
    assert (run["step"], [one["intact"] for one in run["checkpoints"]]) == (1, [False, True])
    assert status_on(server.data_dir, "r").step == 1


def test_run_under_the_name_of_another_is_refused_and_named(data_dir: Path) -> None:
    (data_dir / "runs/pair").rename(data_dir / "runs/couple")
    run = the_run(told("inspect", data_dir, "--run", "couple", code=1), "runs/couple")
    assert [f"{data_dir}/runs/couple holds runs/pair" in problem for problem in run["problems"]] == [True]


def status_on(data_dir: Path, run: str) -> kedge.RunStatus:
    """Where a server goes on."""
    with DurableServer(data_dir, environment=SETTINGS) as server:
        server.start()
        with impatient_client(server.address) as client:
            return client.get_run(run).status()


def test_copy_of_one_checkpoint_is_a_data_directory(seen: Seen, tmp_path: Path) -> None:
    backup = tmp_path / "backup"
    at = Path("runs/plain/checkpoints") / seen.plain_checkpoint
    shutil.copytree(seen.path / at, backup / at)
    shutil.copy(seen.path / "generation", backup)
    (run,) = told("inspect", backup)["runs"]
    assert (run["step"], run["problems"]) == (3, [])
    assert run["digests"]["fast"] == sha256(flat(seen.plain["at checkpoint"]))
    assert status_on(backup, "plain").step == 3


def test_run_whose_damaged_journal_is_moved_away_goes_on_from_its_newest_checkpoint(data_dir: Path) -> None:
    shutil.move(data_dir / "runs/main/journal", data_dir.with_name("moved"))
    run = the_run(told("inspect", data_dir, "--run", "main"), "runs/main")
    newest = run["checkpoints"][0]
    assert run["step"] == newest["step"]
    assert status_on(data_dir, "main").step == newest["step"]


def test_run_is_moved_to_another_data_directory(seen: Seen, tmp_path: Path) -> None:
    (tmp_path / "other/runs").mkdir(parents=True)
    shutil.copytree(seen.path / "runs/pair", tmp_path / "other/runs/pair")
    status = status_on(tmp_path / "other", "pair")
    assert (status.step, status.round.contribution_count) == (1, 1)
