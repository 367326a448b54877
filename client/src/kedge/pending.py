"""What is done in the background: operations in the order in which they were called for, and what comes of them.

Nothing that a caller holds changes behind its back: an operation's outcome has effect when the caller takes it.
"""

import functools
import logging
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from typing import Any, Generic, TypeVar

import numpy as np

from kedge.wire.errors import KedgeError

MAX_IN_FLIGHT = 2
"""The operations of one worker that are not done yet: one on its way, and one behind it. A further call blocks."""

_logger = logging.getLogger("kedge")
T = TypeVar("T")
S = TypeVar("S")


class Pending(Generic[T]):
    """What will come of an operation that runs in the background. `Worker.push_async` and its like make it.

    Take its result, or forget it; in any order, more than once. Use it from the worker's own thread.
    """

    def __init__(self, outcome: "Outcome[S]", take: Callable[[S], T]) -> None:
        self._outcome = outcome
        self._take = take

    @property
    def is_done(self) -> bool:
        """Whether `result` would not block: it has succeeded or failed. To be asked from any thread."""
        return self._outcome.done()

    def result(self, timeout_seconds: float | None = None) -> T:
        """What the operation came to; blocks until it has ended.

        What the worker says of itself changes here: its `last_result`, and with fast weights its `step_number`, which
        is the `base_step` of the gradients that it sends from then on.

        Args:
            timeout_seconds: how long to wait; None waits as long as it takes.

        Returns:
            What the blocking call would have returned; the same object each time.

        Raises:
            TimeoutError: if it is not done in time. It goes on: ask again.
            KedgeError: what the blocking call would have raised, noted as that of an earlier call; CANCELLED if the
                worker was closed before it was done: then nobody knows what became of a gradient.
        """
        wait([self._outcome], timeout_seconds)
        if not self._outcome.done():
            raise TimeoutError(f"{self._outcome.what} is not done after {timeout_seconds:g} s: call result() again")
        self._outcome.is_asked_for = True
        return self._take(self._outcome.result())

    def __repr__(self) -> str:
        state = "done" if self.is_done else "under way"
        return f"<kedge.Pending {self._outcome.what}: {state}>"


class Outcome(Future[T]):
    """A future that tells of its failure when it is forgotten, unless somebody has asked for it.

    Attributes:
        what: the operation, for people.
        is_asked_for: whether somebody has seen what came of it.
    """

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.is_asked_for = False

    def fail(self, error: BaseException) -> None:
        """Ends it with an error."""
        error.add_note(f"This is what became of an earlier call: {self.what}. Later calls go on by themselves.")
        self.set_exception(error)

    def __del__(self) -> None:
        if self.is_asked_for or not self.done() or sys.is_finalizing():
            return
        error = self.exception()
        if error is not None and not (isinstance(error, KedgeError) and error.reason == "CANCELLED"):
            _logger.warning("%s failed, and nobody asked for its result: %s", self.what, error)


class Lane:
    """Runs operations one after the other in a thread of its own, which begins with the first of them.

    The thread is a daemon and keeps no process from ending. It holds this object and what is queued in it: nothing here
    may lead to the worker, or a worker that is forgotten would never end.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._changed = threading.Condition()
        self._queue: deque[tuple[Outcome[Any], Callable[[], Any]]] = deque()
        self._in_flight: set[Outcome[Any]] = set()
        self._is_closed = False
        self._has_begun = False

    def wait_for_room(self) -> None:
        """Returns when another operation may be queued.

        Raises:
            KedgeError: CANCELLED after `close`.
        """
        self._wait_until(lambda: len(self._in_flight) < MAX_IN_FLIGHT)

    def wait_until_idle(self) -> None:
        """Returns when all that was queued is done."""
        if self._in_flight:
            self._wait_until(lambda: not self._in_flight)

    def submit(self, what: str, operation: Callable[[], S]) -> Outcome[S]:
        """Queues an operation; what it returns or raises becomes the outcome.

        Raises:
            KedgeError: CANCELLED after `close`.
        """
        outcome: Outcome[S] = Outcome(what)
        with self._changed:
            if self._is_closed:
                raise _closed_error()
            if not self._has_begun:
                threading.Thread(target=self._work, name=f"kedge exchange {self._name}", daemon=True).start()
                self._has_begun = True
            self._queue.append((outcome, operation))
            self._in_flight.add(outcome)
            self._changed.notify_all()
        return outcome

    def close(self) -> int:
        """Ends what is queued or under way with CANCELLED, and the thread; the answer is how many there were.

        It waits for nothing. An operation that is under way has to be ended by whoever knows how; what comes of it then
        is seen by nobody.
        """
        with self._changed:
            self._is_closed = True
            self._queue.clear()
            ended, self._in_flight = self._in_flight, set()
            for outcome in ended:
                outcome.fail(_closed_error())
            self._changed.notify_all()
        return len(ended)

    def _wait_until(self, holds: Callable[[], bool]) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or holds())
            if self._is_closed:
                raise _closed_error()

    def _work(self) -> None:
        while self._run_next():
            pass

    def _run_next(self) -> bool:
        """Runs an operation; False when there will be no other. Its frame ends with it, and keeps no weights alive."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._is_closed)
            if self._is_closed:
                return False
            outcome, operation = self._queue.popleft()
        try:
            value = operation()
        except BaseException as error:
            self._end(outcome, functools.partial(outcome.fail, error))
        else:
            self._end(outcome, functools.partial(outcome.set_result, value))
        finally:
            del outcome, operation  # an error's traceback leads here: it would keep the outcome, and that the error
        return True

    def _end(self, outcome: Outcome[Any], settle: Callable[[], None]) -> None:
        with self._changed:
            if outcome in self._in_flight:  # else it was ended by `close`
                self._in_flight.remove(outcome)
                settle()
                self._changed.notify_all()


class Copies:
    """Copies of gradients, in memory that is used again: touching new memory takes longer than the copy itself."""

    def __init__(self) -> None:
        self._free: deque[Sequence[np.ndarray]] = deque()

    def of(self, arrays: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
        """Copies of arrays, for whoever asked alone."""
        copies = self._free.pop() if self._free else []
        if [_form(array) for array in copies] != [_form(array) for array in arrays]:
            copies = [np.empty(array.shape, array.dtype) for array in arrays]
        for copy, array in zip(copies, arrays, strict=True):
            np.copyto(copy, array)
        return copies

    def give_back(self, copies: Sequence[np.ndarray]) -> None:
        """Takes back what `of` has given, from any thread."""
        self._free.append(copies)


def _form(array: np.ndarray) -> tuple[tuple[int, ...], np.dtype[Any]]:
    return array.shape, array.dtype


def _closed_error() -> KedgeError:
    return KedgeError("CANCELLED", "the worker was closed: join the run again")
