from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from kedge.wire.manifest import Manifest
from kedge_server.storage import export
from kedge_server.storage.export import ExportError, write_safetensors

MANIFEST = Manifest.from_specs([("z.w", (2, 3), "float32"), ("b", (), "float16"), ("a", (2,), "bfloat16")])
FLAT = np.arange(9, dtype=np.float32) / 4
METADATA = {"run": "runs/digits", "step": "7", "weights": "slow"}


def test_weights_have_their_names_shapes_dtypes_and_metadata(tmp_path: Path) -> None:
    path = tmp_path / "digits.safetensors"
    path.write_text("what was there before")
    write_safetensors(path, MANIFEST, FLAT, metadata=METADATA)
    tensors = load_file(path)
    assert sorted(tensors) == ["a", "b", "z.w"]
    np.testing.assert_array_equal(tensors["z.w"], np.array([[0, 0.25, 0.5], [0.75, 1, 1.25]], np.float32), strict=True)
    np.testing.assert_array_equal(tensors["b"], np.array(1.5, np.float16), strict=True)
    np.testing.assert_array_equal(tensors["a"], np.array([1.75, 2], ml_dtypes.bfloat16), strict=True)
    with safe_open(path, "numpy") as opened:
        assert opened.metadata() == METADATA
    assert [each.name for each in tmp_path.iterdir()] == ["digits.safetensors"]


def test_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write_safetensors(tmp_path / "link", MANIFEST, FLAT, metadata={})
    assert (tmp_path / "link").is_symlink()
    assert sorted(load_file(tmp_path / "file")) == ["a", "b", "z.w"]


def test_when_writing_fails_the_file_is_as_it_was_and_nothing_else_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    path = tmp_path / "out"
    path.write_text("before")
    monkeypatch.setattr(export, "save_file", fail)
    with pytest.raises(ExportError, match=r"cannot write .*out: .*No space left"):
        write_safetensors(path, MANIFEST, FLAT, metadata={})
    assert path.read_text() == "before"
    assert [each.name for each in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(("name", "why"), [("folder", "no regular file"), ("missing/out", "there is no folder")])
def test_a_path_that_cannot_be_written_is_said(tmp_path: Path, name: str, why: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(ExportError, match=why):
        write_safetensors(tmp_path / name, MANIFEST, FLAT, metadata={})


def test_a_tensor_of_a_reserved_name_is_refused(tmp_path: Path) -> None:
    manifest = Manifest.from_specs([("__metadata__", (9,), "float32")])
    with pytest.raises(ExportError, match="no tensor named"):
        write_safetensors(tmp_path / "out", manifest, FLAT, metadata={})


@pytest.mark.parametrize("flat", [FLAT[:8], FLAT.astype(np.float64), FLAT.reshape(3, 3)])
def test_other_weights_than_the_manifests_are_refused(tmp_path: Path, flat: np.ndarray) -> None:
    with pytest.raises(ValueError, match="the manifest needs float32"):
        write_safetensors(tmp_path / "out", MANIFEST, flat, metadata={})
    assert list(tmp_path.iterdir()) == []
