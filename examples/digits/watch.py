"""What the demo knows of its run: worked out from one `run.status()` after the other."""

import time
from dataclasses import dataclass, field

import kedge


@dataclass
class WorkerRow:
    """What is known of a worker, also after it has gone.

    Attributes:
        applied: its contributions that are part of a step.
        rejected: those that were left out.
        staleness: how old its last contribution was when it was judged, in steps.
        state: "working", "killed", "lost" or "done".
    """

    applied: int = 0
    rejected: int = 0
    staleness: int = 0
    state: str = "working"


@dataclass
class Progress:
    """Where the run stands, and what happened to it.

    Attributes:
        step: fast updates applied.
        steps_per_second: over the last seconds.
        sync_count: lookahead syncs.
        loss: the mean over the last step's minibatches.
        waiting_for: what keeps the run from going on, in words.
        workers: by name, in the order in which they joined.
        fast: accuracy of the fast weights when last measured.
        slow: that of the slow weights.
        events: what happened, for people.
    """

    step: int = 0
    steps_per_second: float = 0.0
    sync_count: int = 0
    loss: float | None = None
    waiting_for: str = ""
    workers: dict[str, WorkerRow] = field(default_factory=dict)
    fast: float | None = None
    slow: float | None = None
    events: list[str] = field(default_factory=list)
    _started_at: float = field(default_factory=time.monotonic)
    _marks: list[tuple[float, int]] = field(default_factory=list)

    @property
    def elapsed_seconds(self) -> float:
        """Since the demo began."""
        return time.monotonic() - self._started_at

    @property
    def is_waiting(self) -> bool:
        """Whether no step was made since the last status."""
        return bool(self.waiting_for) and len(self._marks) > 1 and self._marks[-1][1] == self._marks[-2][1]

    def tell(self, event: str) -> None:
        """Notes something that happened."""
        self.events.append(f"{self.elapsed_seconds:5.1f} s  step {self.step:5d}  {event}")

    def update(self, status: kedge.RunStatus) -> None:
        """Takes a new status."""
        self.step, self.sync_count, self.loss = status.step, status.lookahead_sync_count, status.loss
        self.waiting_for = status.waiting_for or _open_round(status)
        here = {worker.name.rpartition("/")[2]: worker for worker in status.workers}
        for name, worker in here.items():
            self._see(name, worker)
        for name in self.workers.keys() - here.keys():
            self._miss(name)
        if here:
            self._measure_speed()
        elif self.workers:
            self.waiting_for = ""  # they have finished

    def kill(self, name: str) -> None:
        """Notes that a worker was killed; that the run has lost it shows when its lease has expired."""
        self.workers[name].state = "killed"
        self.tell(f"{name} was killed with SIGKILL; its lease holds for a while")

    def finish(self, name: str, counts: tuple[int, int]) -> None:
        """Takes a worker's own last words."""
        row = self.workers.setdefault(name, WorkerRow())
        row.applied, row.rejected = counts
        row.state = "done"

    def _see(self, name: str, worker: kedge.WorkerStatus) -> None:
        if name not in self.workers:
            self.workers[name] = WorkerRow()
            self.tell(f"{name} joined")
        row = self.workers[name]
        row.applied, row.rejected, row.staleness = worker.applied_count, worker.rejected_count, worker.last_staleness

    def _miss(self, name: str) -> None:
        row = self.workers[name]
        if row.state == "killed":
            row.state = "lost"
            self.tell(f"{name} is lost: its lease has expired")
        elif row.state == "working":
            row.state = "done"

    def _measure_speed(self) -> None:
        self._marks = [*self._marks, (time.monotonic(), self.step)][-8:]
        (begin, first), (end, last) = self._marks[0], self._marks[-1]
        self.steps_per_second = (last - first) / (end - begin) if end > begin else 0.0


def _open_round(status: kedge.RunStatus) -> str:
    if status.round is None:
        return ""
    missing = status.round.required_count - status.round.contribution_count
    return f"{missing} of {status.round.required_count} contributions"
