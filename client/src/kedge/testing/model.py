"""The weights of a run, and what they are changed with."""

from typing import NamedTuple

import numpy as np

from kedge.optim.controls import Change, Controls
from kedge.policies import Policy
from kedge.testing import rounds
from kedge.transport import NewRun
from kedge.updates import Updater
from kedge.wire.reflection import Refusing


class Held(NamedTuple):
    """Weights of one step, float64 of shape [n]; never written to."""

    step: int
    fast: np.ndarray
    slow: np.ndarray | None


class Model:
    """Weights with their optimizer and its hyperparameters.

    Attributes:
        controls: the hyperparameters.
        loss: the mean loss of the last step, if one was sent.
    """

    def __init__(self, new: NewRun, weights: np.ndarray) -> None:
        self._updater = Updater(new.optimizer, new.groups, new.manifest, weights)
        self.controls = Controls.begin(new.optimizer.spec(), new.groups)
        self.loss: float | None = None

    @property
    def newest(self) -> Held:
        """The weights of the last step."""
        return Held(self._updater.step, self._updater.fast, self._updater.slow)

    @property
    def lookahead_sync_count(self) -> int:
        """The lookahead syncs so far."""
        return self._updater.lookahead_sync_count

    def apply(self, ended: rounds.Round, policy: Policy) -> bool:
        """Makes a step of a round; the answer is whether a lookahead sync was part of it."""
        sync_count = self.lookahead_sync_count
        self._updater.apply(rounds.combined(ended, policy), self.controls.values())
        self.loss, example_count = rounds.mean_loss(ended.entries)
        self.controls = self.controls.after_step(self.loss, example_count)
        return self.lookahead_sync_count > sync_count

    def set_hyperparameters(self, group: str, change: Change) -> int:
        """Changes what the next step is made with; the answer is its number."""
        step = self._updater.step + 1
        with Refusing("hyperparameters"):
            self.controls = self.controls.changed(group, change, step=step)
        return step

    def tick_schedule(self, group: str, to: int | None) -> int:
        """Ticks a schedule by hand; the answer is its ticks so far."""
        with Refusing("schedule"):
            self.controls = self.controls.ticked(group, to)
        return self.controls.rate_state(group).tick
