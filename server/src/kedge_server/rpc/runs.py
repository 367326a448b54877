"""The runs as one caller may see them: the way of every servicer to a run."""

from kedge.wire import names
from kedge_server.engine.registry import Registry
from kedge_server.engine.run import RunEngine
from kedge_server.rpc.gate import caller, require_run


class Runs:
    """The runs of a registry, to whoever makes the call that is being answered."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def get(self, name: str) -> RunEngine:
        """A run.

        Raises:
            KedgeError: PERMISSION_DENIED or RUN_NOT_FOUND.
        """
        return self._registry.get(require_run(name))

    def of_worker(self, worker: names.WorkerName, epoch: int | None = None) -> RunEngine:
        """The run of a worker that the caller has joined as, or that nobody has.

        Args:
            worker: the worker.
            epoch: of the lease that the call is about; None: the last one.

        Raises:
            KedgeError: PERMISSION_DENIED, RUN_NOT_FOUND or WRONG_IDENTITY.
        """
        run = self.get(worker.run)
        run.require_owner(worker.worker_id, caller().identity, epoch)
        return run

    def all(self) -> list[RunEngine]:
        """Those that the caller may touch, by name."""
        who = caller()
        return [run for run in self._registry.list() if who.may_touch(names.parse_run(run.config.name))]
