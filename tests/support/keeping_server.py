"""A fake server that answers as one with a data directory. It keeps nothing."""

from dataclasses import replace
from datetime import UTC, datetime

from faulty_transport import gone

import kedge

NAME = "runs/r/checkpoints/5-9"
TAKEN = kedge.Checkpoint(NAME, 5, datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC), 1 << 40, {"loss": 0.25, "accuracy": 1.0})
OLDER = kedge.Checkpoint("runs/r/checkpoints/0-1", 0, datetime(2026, 1, 1, tzinfo=UTC), 12, {})


class Keeping:
    """A transport whose runs have two checkpoints. It notes what is asked of them, and loses so many answers.

    Args:
        transport: what answers everything else.
        storage_problem: what it says of its runs.
    """

    def __init__(self, transport, storage_problem=""):
        self._transport = transport
        self._storage_problem = storage_problem
        self.answers_lost = 0
        self.calls = []

    def __getattr__(self, name):
        return getattr(self._transport, name)

    def get_run(self, name, *, with_manifest=True):
        return self._on_disk(self._transport.get_run(name, with_manifest=with_manifest))

    def list_runs(self):
        return [self._on_disk(info) for info in self._transport.list_runs()]

    def create_checkpoint(self, run, metrics):
        return self._answer(TAKEN, run, metrics)

    def list_checkpoints(self, run):
        return self._answer([TAKEN, OLDER], run)

    def restore_checkpoint(self, name, *, request_id):
        return self._answer(5, name, request_id)

    def fork_checkpoint(self, name, run_id, *, request_id):
        """The answer is all that there is of the new run."""
        forked = replace(self.get_run("runs/r"), name=f"runs/{run_id}")
        return self._answer(forked, name, run_id, request_id)

    def _on_disk(self, info):
        status = replace(info.status, durable_step=5, storage_problem=self._storage_problem)
        return replace(info, durability="journal", status=status)

    def _answer(self, answer, *call):
        self.calls.append(call)
        if self.answers_lost:
            self.answers_lost -= 1
            raise gone()
        return answer
