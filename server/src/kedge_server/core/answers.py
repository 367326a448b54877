"""What was answered to the last requests that have an id, so that one that is repeated is done once."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

_REMEMBERED = 64
"""A request that is made again is told from a new one among so many."""

AnswerT = TypeVar("AnswerT")


class Answers(Generic[AnswerT]):
    """The answers to one kind of request.

    Args:
        answers: those that are known, the oldest first.
    """

    def __init__(self, answers: tuple[tuple[str, AnswerT], ...] = ()) -> None:
        self._answers: OrderedDict[str, AnswerT] = OrderedDict(answers)

    def answer(self, request_id: str, make: Callable[[], AnswerT]) -> AnswerT:
        """What was answered to this request before, or what is made now."""
        if request_id in self._answers:
            return self._answers[request_id]
        made = make()
        self.remember(request_id, made)
        return made

    def find(self, request_id: str) -> AnswerT | None:
        """What was answered to this request before, if anything was."""
        return self._answers.get(request_id)

    def remember(self, request_id: str, answer: AnswerT) -> None:
        """Takes what was answered. A request without an id is never a repetition."""
        if not request_id:
            return
        self._answers[request_id] = answer
        if len(self._answers) > _REMEMBERED:
            self._answers.popitem(last=False)

    def state(self) -> tuple[tuple[str, AnswerT], ...]:
        """All that is remembered, the oldest first."""
        return tuple(self._answers.items())
