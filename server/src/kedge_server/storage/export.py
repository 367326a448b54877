"""Weights as a safetensors file, with the names and the metadata that `kedge pull` gives them."""

import contextlib
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from kedge.wire.manifest import DTYPES, Manifest

_RESERVED_NAME = "__metadata__"
"""The key of a safetensors header that is no tensor."""


class ExportError(Exception):
    """A file of weights cannot be written. Its message is for people; nothing was left behind."""


def write_safetensors(path: Path, manifest: Manifest, flat: np.ndarray, *, metadata: Mapping[str, str]) -> None:
    """Writes flat weights as named tensors, in their owner's dtypes. Blocks.

    A file that is there is replaced once all is on the disk; a link is followed.

    Args:
        path: the file.
        manifest: what is in `flat`, in this order.
        flat: shape (manifest.element_count,), float32.
        metadata: what `kedge pull` writes, too: "run" (runs/{run}), "step", "weights" ("fast" or "slow").

    Raises:
        ExportError: the path cannot be written to, the disk is full, or a name is none in this format.
        ValueError: `flat` is not what the manifest says.
    """
    if flat.shape != (manifest.element_count,) or flat.dtype != np.float32:
        raise ValueError(
            f"flat is {flat.dtype} of shape {flat.shape}: the manifest needs float32 of ({manifest.element_count},)"
        )
    target = _checked_target(path)
    tensors = _tensors(manifest, flat)
    if _RESERVED_NAME in tensors:
        raise ExportError(f"cannot write {path}: safetensors files have no tensor named {_RESERVED_NAME!r}")
    try:
        with _taking_the_place_of(target) as temporary:
            save_file(tensors, temporary, metadata=dict(metadata))
    except (OSError, SafetensorError) as error:
        raise ExportError(f"cannot write {path}: {error}") from error


def _tensors(manifest: Manifest, flat: np.ndarray) -> dict[str, np.ndarray]:
    return {
        spec.name: flat[spec.offset : spec.offset + spec.size]
        .astype(DTYPES[spec.dtype], copy=False)
        .reshape(spec.shape)
        for spec in manifest.tensors
    }


def _checked_target(path: Path) -> Path:
    """The file itself where `path` is a link."""
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise ExportError(f"cannot write {path}: it is no regular file")
    if not target.parent.is_dir():
        raise ExportError(f"cannot write {path}: there is no folder {target.parent}")
    return target


@contextmanager
def _taking_the_place_of(path: Path) -> Iterator[Path]:
    """A file beside `path` that replaces it, durably, when the block ends well, and goes away when it does not."""
    temporary = path.with_name(f".kedge-{secrets.token_hex(8)}.tmp")
    temporary.touch(exist_ok=False)
    mode = temporary.stat().st_mode
    try:
        yield temporary
        temporary.chmod(mode)  # safetensors may have made another file of the name, which only its owner can read
        _sync(temporary)
        temporary.replace(path)
        with contextlib.suppress(OSError):  # some file systems sync no directories; the file is whole in any case
            _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
