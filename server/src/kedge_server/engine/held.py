"""The gradients of contributions that storage has, or is just reading: they outlive what becomes of the contribution.

A gradient that was handed over here belongs to the run until storage says that no recovery needs it any more: until the
commit is written that ends its being held. Until then a checkpoint has to have it, and the journal may be reading it.
"""

from collections.abc import Iterable

import numpy as np

from kedge_server.core.contributions import Contribution
from kedge_server.core.image import HeldKey
from kedge_server.engine.contributions import PendingContribution, pending
from kedge_server.engine.staging import StagingBuffer


class HeldBuffers:
    """Those of one run. Belongs to one loop.

    Args:
        is_stored: whether there is storage; without it contributions keep their own.
    """

    def __init__(self, *, is_stored: bool) -> None:
        self._is_stored = is_stored
        self._buffers: dict[HeldKey, StagingBuffer] = {}

    def take_over(self, contribution: PendingContribution) -> None:
        """Owns the contribution's gradient from now on. Doing so again changes nothing."""
        key = contribution.header.identity
        if self._is_stored and key not in self._buffers:
            self._buffers[key] = contribution.hand_over()

    def take_over_all(self, contributions: Iterable[Contribution]) -> None:
        """The same for several."""
        for contribution in contributions:
            self.take_over(pending(contribution))

    def gradients(self, keys: Iterable[HeldKey]) -> dict[HeldKey, np.ndarray]:
        """The gradients of contributions that are held."""
        return {key: self._buffers[key].array for key in keys}

    def give_back(self, key: HeldKey) -> None:
        """Gives a buffer back, if it is here."""
        buffer = self._buffers.pop(key, None)
        if buffer is not None:
            buffer.release()

    def close(self) -> None:
        """Gives all of them back; only when storage reads nothing any more."""
        for key in list(self._buffers):
            self.give_back(key)
