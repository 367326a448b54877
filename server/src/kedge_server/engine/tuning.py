"""The hyperparameters of a live run, as its engine holds them: what the next round to close is applied with."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

import structlog

from kedge.optim import Group, UpdateSpec
from kedge.optim.controls import Change, Controls, RateState, StepValues
from kedge.wire.reflection import Refusing

_log = structlog.get_logger("kedge.run")

_REMEMBERED_ANSWERS = 64
"""A request that is made again is told from a new one among so many."""

AnswerT = TypeVar("AnswerT")


class Tuning:
    """The controls of one run, and who changed them."""

    def __init__(self, run: str, spec: UpdateSpec, groups: tuple[Group, ...]) -> None:
        self._run = run
        self.controls = Controls.begin(spec, groups)

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


class Answers(Generic[AnswerT]):
    """What was answered to the last requests that have an id, so that one that is repeated is done once."""

    def __init__(self) -> None:
        self._answers: OrderedDict[str, AnswerT] = OrderedDict()

    def answer(self, request_id: str, make: Callable[[], AnswerT]) -> AnswerT:
        """What was answered to this request before, or what is made now."""
        if request_id in self._answers:
            return self._answers[request_id]
        made = make()
        if request_id:
            self._answers[request_id] = made
            if len(self._answers) > _REMEMBERED_ANSWERS:
                self._answers.popitem(last=False)
        return made
