"""Copies between memory that a worker lends and the server's own: small ones at once, large ones beside the loop."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import numpy as np

from kedge.wire.codec import CHUNK_BYTES
from kedge_server.core.admission import Inspection
from kedge_server.engine.staging import StagingBuffer

_INLINE_BYTES: Final = 1 << 20
"""What a thread would not pay for: a copy of this takes a tenth of a millisecond, the way there and back as long."""

_PIECE_ELEMENTS: Final = CHUNK_BYTES // 4
"""What is inspected while it is in the cache: as much as of a chunk, so that the norms are the same to the last bit."""

_THREAD_COUNT = 2
"""The copies of several workers run side by side; more than two have the memory's whole bandwidth anyway."""


class Copies:
    """Makes copies for one loop. NumPy lets others run meanwhile."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(_THREAD_COUNT, thread_name_prefix="kedge-copies")

    async def take(self, source: np.ndarray, gradient: StagingBuffer) -> Inspection:
        """Copies a gradient, and inspects the copy: what is lent may change at any time.

        Args:
            source: float32, of shape [element_count].
            gradient: the buffer that it comes into. If this raises, it is given back once nothing writes to it.

        Returns:
            What the values of the copy are.
        """
        try:
            if source.nbytes <= _INLINE_BYTES:
                return _taken(source, gradient.array)
            copying = asyncio.get_running_loop().run_in_executor(self._threads, _taken, source, gradient.array)
        except BaseException:
            gradient.release()
            raise
        try:
            return await asyncio.shield(copying)
        except BaseException:
            copying.add_done_callback(lambda _: gradient.release())
            raise

    async def give(self, arrays: Sequence[np.ndarray], target: np.ndarray) -> None:
        """Copies weights.

        Args:
            arrays: float32, of any shape; one after the other they are the weights.
            target: float32, of shape [their element count].
        """
        if target.nbytes <= _INLINE_BYTES:
            _give(arrays, target)
        else:
            await asyncio.get_running_loop().run_in_executor(self._threads, _give, arrays, target)


def _taken(source: np.ndarray, target: np.ndarray) -> Inspection:
    inspection = Inspection()
    for at in range(0, source.size, _PIECE_ELEMENTS):
        piece = target[at : at + _PIECE_ELEMENTS]
        np.copyto(piece, source[at : at + _PIECE_ELEMENTS])
        inspection.add(piece)
    return inspection


def _give(arrays: Sequence[np.ndarray], target: np.ndarray) -> None:
    at = 0
    for array in arrays:
        np.copyto(target[at : at + array.size], array.reshape(-1))
        at += array.size
