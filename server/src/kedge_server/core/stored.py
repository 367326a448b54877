"""What passes between a run and what keeps it."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from kedge_server.core.commits import Commit
from kedge_server.core.image import HeldKey, ImageState, RunImage

Arrays = Mapping[str, np.ndarray]
"""A run's state on the host, by name; see `Writer.capture`."""


class CheckpointInfo(NamedTuple):
    """A checkpoint that is complete."""

    checkpoint_id: str
    step: int
    next_index: int
    """Of the journal: the first commit that is not in it. It only grows, whatever the step does."""
    created_at_seconds: float
    """Seconds since 1970."""
    size_bytes: int
    """Of its files."""
    metrics: Mapping[str, float]


class Capture(NamedTuple):
    """All that a checkpoint is made of."""

    image: ImageState
    arrays: Arrays
    held: Mapping[HeldKey, np.ndarray]
    """The gradients of the contributions that are held."""


class Restorable(NamedTuple):
    """A state that a run can go on from: a checkpoint's, or that of its creation."""

    image: RunImage
    arrays: Arrays
    """`weights` alone, flat, for a run that begins; else what `Writer.capture` gave."""
    held: Mapping[HeldKey, np.ndarray]


class Ticket:
    """A commit on its way to the journal. Those behind it wait until its payload is there."""

    def __init__(self, commit: Commit, payload: Sequence[np.ndarray] | None, time_seconds: float = 0.0) -> None:
        self.commit = commit
        self.time_seconds = time_seconds
        self.payload = payload
        self.is_written = False


class Replayed(NamedTuple):
    """One commit of a journal."""

    commit: Commit
    time_seconds: float
    payload: np.ndarray
    """Its bytes."""
