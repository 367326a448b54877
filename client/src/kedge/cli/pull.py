"""`kedge pull`: a run's weights as a safetensors file."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from safetensors import SafetensorError
from safetensors.numpy import save_file

from kedge.cli.common import (
    DEFAULT_ADDRESS,
    DEFAULT_TIMEOUT_SECONDS,
    AddressOption,
    CommandError,
    RunArgument,
    TimeoutOption,
    open_client,
)

_RESERVED_NAME = "__metadata__"  # the key of a safetensors header that is no tensor


class Weights(StrEnum):
    """Which weights."""

    FAST = "fast"
    SLOW = "slow"


def pull(
    run: RunArgument,
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write.", show_default=False)],
    weights: Annotated[Weights, typer.Option(help="Slow weights are the ones to evaluate and deploy.")] = Weights.FAST,
    address: AddressOption = DEFAULT_ADDRESS,
    timeout_seconds: TimeoutOption = DEFAULT_TIMEOUT_SECONDS,
) -> None:
    """Fetch a run's weights into a safetensors file. A file that is there is replaced once all has come."""
    path = _checked_target(output)
    with open_client(address, timeout_seconds) as client:
        opened = client.get_run(run)
        snapshot = opened.snapshot(weights.value)
    arrays = snapshot.fast if weights is Weights.FAST else snapshot.slow
    _save(path, arrays, {"run": opened.name, "step": str(snapshot.step), "weights": weights.value})
    size_bytes = sum(array.nbytes for array in arrays.values())
    typer.echo(f"step {snapshot.step}: {len(arrays):,} tensors, {size_bytes:,} bytes in {output}")


def _checked_target(output: Path) -> Path:
    """The file itself where `output` is a link; refuses early what would only fail after the weights have come."""
    path = Path(os.path.realpath(output))
    if path.exists() and not path.is_file():
        raise CommandError(f"cannot write {output}: it is no regular file")
    if not path.parent.is_dir():
        raise CommandError(f"cannot write {output}: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise CommandError(f"cannot write {output}: the folder {path.parent} is not writable")
    return path


def _save(path: Path, arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    if _RESERVED_NAME in arrays:
        raise CommandError(f"cannot write {path}: safetensors files have no tensor named {_RESERVED_NAME!r}")
    try:
        with _taking_the_place_of(path) as temporary:
            save_file(arrays, temporary, metadata=metadata)
    except (OSError, SafetensorError) as error:
        raise CommandError(f"cannot write {path}: {error}") from error


@contextmanager
def _taking_the_place_of(path: Path) -> Iterator[Path]:
    """A file beside `path` that replaces it, durably, when the block ends well, and goes away when it does not."""
    temporary = path.with_name(f".kedge-{uuid.uuid4().hex}.tmp")
    temporary.touch(exist_ok=False)
    mode = temporary.stat().st_mode
    try:
        yield temporary
        temporary.chmod(mode)  # safetensors may have made another file of the name, which only its owner can read
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
