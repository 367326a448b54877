"""`kedge-server export`: the weights of a run, as it would go on or as a checkpoint has them, in a safetensors file."""

import asyncio
from pathlib import Path
from typing import NamedTuple

from kedge.wire.names import check_checkpoint_id
from kedge_server.core.image import RunImage
from kedge_server.core.stored import Arrays
from kedge_server.engine.device import DeviceThread
from kedge_server.engine.recovery import recover
from kedge_server.storage.checkpoints import CheckpointMissing
from kedge_server.storage.export import ExportError, write_safetensors
from kedge_server.storage.run_store import load
from kedge_server.tools.reading import FoundForReading, MisuseError, RunFiles
from kedge_server.tools.state import Weights, flat, has_slow


class Exported(NamedTuple):
    """What was written."""

    step: int
    tensor_count: int
    element_count: int


def export(run: RunFiles, path: Path, *, checkpoint: str | None, weights: Weights) -> Exported:
    """Writes weights of a run.

    Args:
        run: the run.
        path: the file; one that is there is replaced.
        checkpoint: the id of a checkpoint, or its name; None for what a server would go on from.
        weights: which.

    Raises:
        MisuseError: there is no such checkpoint, there are no slow weights, or the file cannot be written.
        StorageError: for damage.
        KedgeError: INVALID_NAME.
    """
    image, arrays = _newest(run) if checkpoint is None else _of_checkpoint(run, checkpoint)
    if weights == "slow" and not has_slow(image):
        raise MisuseError(f"{run.name} has no Lookahead, so no slow weights: export the fast ones")
    manifest = image.config.manifest
    metadata = {"run": run.name, "step": str(image.step), "weights": weights}
    try:
        write_safetensors(path, manifest, flat(image, arrays, weights), metadata=metadata)
    except ExportError as error:
        raise MisuseError(str(error)) from error
    return Exported(image.step, len(manifest.tensors), manifest.element_count)


def _of_checkpoint(run: RunFiles, checkpoint: str) -> tuple[RunImage, Arrays]:
    store = run.store()
    checkpoint_id = check_checkpoint_id(checkpoint.removeprefix(f"{run.name}/checkpoints/"))
    try:
        restorable = load(store, checkpoint_id)
    except CheckpointMissing as error:
        there = ", ".join(info.checkpoint_id for info in store.list()) or "none"
        raise MisuseError(f"{run.name} has no checkpoint {checkpoint_id}: those there are {there}") from error
    return restorable.image, restorable.arrays


def _newest(run: RunFiles) -> tuple[RunImage, Arrays]:
    device = DeviceThread()
    try:
        recovered = asyncio.run(recover(FoundForReading(run), device))
        if recovered is None:
            raise MisuseError(f"the creation of {run.name} was never finished: there are no weights")
        return recovered.image, asyncio.run(device.run(recovered.writer.capture))
    finally:
        device.close()
