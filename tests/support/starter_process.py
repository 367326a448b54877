"""A worker in a process of its own that opens its run, or creates it, at the same moment as others do.

Run as a script: a `Task` as JSON, the descriptor of a pipe, and two numbers. It says `ready`, waits until the pipe is
closed at its other end, and opens the run: with the first number for a quorum if it is the one to create it, and with
weights that are all the second number. It says what run it got, and trains.
"""

import json
import os
import sys

import marking_worker
import numpy as np
from marking_worker import Task, say

import kedge
from kedge import optim

SIZE = 16


def main(task: Task, barrier: int, quorum: int, weight: float) -> None:
    """Waits for the others, opens the run, and trains."""
    with kedge.connect(task.address) as client:
        say("ready")
        os.read(barrier, 1)
        run = client.get_or_create_run(
            task.run,
            params={"w": np.full(SIZE, weight, np.float32)},
            optimizer=optim.SGD(lr=float(quorum)),
            aggregation=kedge.Synchronous(quorum),
        )
        say("opened", create_time=run.info().create_time.isoformat(), weight=float(run.pull()["w"][-1]))
        marking_worker.train(run, task)


if __name__ == "__main__":
    main(Task(**json.loads(sys.argv[1])), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
