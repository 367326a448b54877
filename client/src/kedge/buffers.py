"""Buffers that are received into, and reused as soon as nobody has anything of them any more.

Fresh memory costs the system a page fault for every 4 KiB, more than it costs to fill. So a buffer is kept after it was
handed out, and handed out again when only the pool refers to it: CPython counts references, and every array, tensor or
memoryview that shares memory with an array refers to it as long as it lives. What somebody holds is never written to.
"""

import sys

import numpy as np

KEPT_COUNT = 2
"""A training loop holds the weights of one step while those of the next come in."""


class Buffers:
    """Hands out buffers, for one thread that receives. At most `KEPT_COUNT` stay in memory that nobody else holds."""

    def __init__(self) -> None:
        self._kept: list[np.ndarray] = []

    def take(self, element_count: int) -> np.ndarray:
        """A float32 array of this length whose content is arbitrary, and which shares memory with no other one.

        Args:
            element_count: its length.

        Returns:
            A view of memory that is handed out anew once this array, and everything made of it without a copy, is gone.
        """
        for at in range(len(self._kept)):
            if self._kept[at].size == element_count and _is_unused(self._kept, at):
                self._kept.append(self._kept.pop(at))
                return self._kept[-1][:]
        return self._make(element_count)

    def _make(self, element_count: int) -> np.ndarray:
        if len(self._kept) == KEPT_COUNT:
            # Who holds it keeps it alive. If nobody does, its memory is free before more is taken.
            del self._kept[0]
        self._kept.append(np.empty(element_count, np.float32))
        return self._kept[-1][:]


def _reference_count(arrays: list[np.ndarray], at: int) -> int:
    return sys.getrefcount(arrays[at])


def _is_unused(arrays: list[np.ndarray], at: int) -> bool:
    return _CAN_TELL and _reference_count(arrays, at) <= _COUNT_WHEN_UNUSED


# Without a lock around the interpreter, or without counts, nobody can tell.
_CAN_TELL = hasattr(sys, "getrefcount") and getattr(sys, "_is_gil_enabled", lambda: True)()
_COUNT_WHEN_UNUSED = _reference_count([np.empty(0, np.float32)], 0) if _CAN_TELL else 0
