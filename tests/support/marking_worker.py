"""A worker in a process of its own whose contributions can be told apart: each is zero but for one element, its mark.

Run as a script with a `Task` as JSON. What it does it prints, an event a line as JSON with `at`, the time of the
machine's monotonic clock. It trains until its task is done or its standard input ends; a gated one makes a contribution
for each line that it reads there.
"""

import json
import sys
import threading
import time
from dataclasses import asdict, dataclass, replace

import numpy as np

import kedge

ERROR_EXIT_CODE = 3


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a worker is to do."""

    address: str
    run: str
    name: str
    mark: int
    """The element that its contributions mark."""
    is_moving: bool = False
    """Whether each applied contribution moves the mark on by one."""
    value: float = 1.0
    """What a mark is."""
    lease_seconds: float = 3.0
    pace_seconds: float = 0.0
    """How long it computes before each contribution."""
    applied_limit: int | None = None
    """When this many are applied it is done."""
    is_gated: bool = False
    transport: str = "auto"

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    def called(self, name: str, mark: int) -> "Task":
        """The same for another worker."""
        return replace(self, name=name, mark=mark)


class Commands:
    """What the test says on standard input."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._is_ended = threading.Event()
        self._gate = threading.Semaphore(0)
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for _ in sys.stdin:
            self._gate.release()
        self._is_ended.set()
        self._gate.release()

    def wait_for_next(self, applied_count: int) -> bool:
        """Waits until the next contribution is due, and says whether there is to be one."""
        if self._task.applied_limit is not None and applied_count >= self._task.applied_limit:
            return False
        if self._task.is_gated:
            self._gate.acquire()
            return not self._is_ended.is_set()
        return not self._is_ended.wait(self._task.pace_seconds)


def say(event: str, **fields: object) -> None:
    """Tells the test what happened."""
    print(json.dumps({"event": event, "at": time.monotonic(), **fields}), flush=True)


def train(run: kedge.Run, task: Task) -> None:
    """Contributes marks, and says what became of each."""
    commands = Commands(task)
    with run.join(task.name, lease_seconds=task.lease_seconds, transport=task.transport) as worker:
        worker.pull()
        say("joined", epoch=worker.epoch, step=worker.step_number)
        applied_count = 0
        while commands.wait_for_next(applied_count):
            weights = worker.step(marked(run, task, applied_count))
            result = worker.last_result
            applied_count += result.outcome == "applied"
            say(
                "step",
                step=worker.step_number,
                epoch=worker.epoch,
                outcome=result.outcome,
                reason=result.reason,
                result_step=result.step,
                total=float(weights["w"].sum(dtype=np.float64)),
            )
    say("done")


def marked(run: kedge.Run, task: Task, applied_count: int) -> dict[str, np.ndarray]:
    """The next contribution."""
    gradient = np.zeros(run.manifest.element_count, np.float32)
    gradient[task.mark + applied_count * task.is_moving] = task.value
    return {"w": gradient}


def main(task: Task) -> None:
    """Joins the run and trains."""
    try:
        with kedge.connect(task.address) as client:
            train(client.get_run(task.run), task)
    except kedge.KedgeError as error:
        say("error", reason=error.reason)
        sys.exit(ERROR_EXIT_CODE)


if __name__ == "__main__":
    main(Task(**json.loads(sys.argv[1])))
