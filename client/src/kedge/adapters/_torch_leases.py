"""When an optimizer's lease is given back: by hand, when the optimizer is forgotten, or at the end of the process.

A fork has copies of its parent's optimizers, and leaves their leases alone.
"""

import atexit
import os
import threading
import weakref

from kedge.worker import Worker


class Lease:
    """The lease of a worker that an owner has joined with.

    Args:
        owner: whose end is the lease's end. It is not kept alive.
        worker: who has the lease.
    """

    def __init__(self, owner: object, worker: Worker) -> None:
        self._worker = worker
        self._process_id = os.getpid()
        self._finalizer = weakref.finalize(owner, _end_in_background, self)
        self._finalizer.atexit = False
        _held.add(self)

    @property
    def is_mine(self) -> bool:
        """Whether this process has it, and not one that this was forked from."""
        return self._process_id == os.getpid()

    @property
    def has_ended(self) -> bool:
        """Whether it was given back."""
        return self not in _held

    def end(self) -> None:
        """Gives it back. May be called twice."""
        self._finalizer.detach()
        _held.discard(self)
        self._worker.close()


_held: set[Lease] = set()


@atexit.register
def _end_all() -> None:
    for lease in list(_held):
        if lease.is_mine:
            lease.end()


def _end_in_background(lease: Lease) -> None:
    # The collector may run in any thread, one of gRPC's own too, where a call that waits would wait for itself.
    if lease.is_mine:
        threading.Thread(target=lease.end, name="kedge lease", daemon=True).start()
