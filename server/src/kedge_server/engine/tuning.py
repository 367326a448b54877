"""The hyperparameters of a live run, as its engine holds them: what the next round to close is applied with."""

import structlog

from kedge.optim.controls import Change, Controls, RateState, StepValues
from kedge.wire.reflection import Refusing

_log = structlog.get_logger("kedge.run")


class Tuning:
    """The controls of one run, and who changed them."""

    def __init__(self, run: str, controls: Controls) -> None:
        self._run = run
        self.controls = controls

    def next_step(self, loss: float | None, example_count: int) -> tuple[StepValues, ...]:
        """What the step of a round that closes now is made with; moves on to the step after it.

        Args:
            loss: the mean loss of the round's contributions; None if they sent none.
            example_count: the examples that it is of.
        """
        values = self.controls.values()
        self.controls = self.controls.after_step(loss, example_count)
        return values

    def change(self, group: str, change: Change, *, step: int) -> None:
        """Changes what the steps from this one on are made with.

        Raises:
            KedgeError: INVALID_CONFIGURATION.
        """
        before = self.controls
        with Refusing("hyperparameters"):
            self.controls = before.changed(group, change, step=step)
        if self.controls is not before:
            given = {field: str(value) for field, value in change._asdict().items() if value is not None}
            _log.info("hyperparameters changed", run=self._run, group=group, from_step=step, **given)

    def tick(self, group: str, to: int | None) -> RateState:
        """Ticks a schedule by hand.

        Raises:
            KedgeError: INVALID_CONFIGURATION.
        """
        with Refusing("schedule"):
            self.controls = self.controls.ticked(group, to)
            return self.controls.rate_state(group)
