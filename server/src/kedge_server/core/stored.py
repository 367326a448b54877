"""What passes between a run and what keeps it."""

from collections.abc import Callable, Mapping, Sequence
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
    journal_sum: int | None = None
    """Of a checkpoint: the sum of the last record that is in it, by which it is known to belong to a journal."""


class Ticket:
    """A commit on its way to the journal. Those behind it wait until its payload is there.

    Attributes:
        commit: what happened.
        time_seconds: when, in seconds since 1970.
        payload: its arrays; None before they are there, empty when it is written.
        image: of a `Restored`: where the run goes back to.
        size_bytes: of its record, once that is made.
        is_written: whether it is as durable as the run's level asks for.
    """

    def __init__(self, commit: Commit, payload: Sequence[np.ndarray] | None, time_seconds: float = 0.0) -> None:
        self.commit = commit
        self.time_seconds = time_seconds
        self.payload = payload
        self.image: RunImage | None = None
        self.size_bytes = 0
        self.is_written = False
        self._on_written: Callable[[], object] = lambda: None

    def when_written(self, callback: Callable[[], object]) -> None:
        """Calls back once it is written, or now."""
        if self.is_written:
            callback()
        else:
            self._on_written = callback

    def note_written(self) -> None:
        """It is written."""
        self.payload, self.is_written = (), True
        self._on_written()


class Replayed(NamedTuple):
    """One commit of a journal."""

    commit: Commit
    time_seconds: float
    payload: np.ndarray
    """Its bytes."""
