"""Kedge, an optimizer as a service: the client.

A server holds a model's parameters and its optimizer state; workers push gradients to it and pull weights back.

Example:
    >>> import kedge
    >>> from kedge import optim
    >>> client = kedge.connect("localhost:50051")
    >>> run = client.get_or_create_run(
    ...     "digits",
    ...     params=params,
    ...     optimizer=optim.Lookahead(optim.AdaBelief(lr=1e-3), sync_period=5, alpha=0.5),
    ...     aggregation=kedge.Synchronous(quorum=4),
    ... )
    >>> with run.join() as worker:
    ...     weights = worker.pull()
    ...     for batch in batches:
    ...         loss, grads = value_and_grad(weights, batch)
    ...         weights = worker.step(grads, loss=loss, example_count=len(batch))
    >>> best = run.pull("slow")

Importing it costs next to nothing: what a name needs is loaded when the name is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kedge import errors, optim, testing
    from kedge.client import Client, connect
    from kedge.compression import TopK
    from kedge.errors import KedgeError
    from kedge.local import LocalSteps
    from kedge.pending import Pending
    from kedge.policies import Admission, Asynchronous, BoundedStaleness, Buffered, Checkpoints, Synchronous
    from kedge.run import Run, Snapshot
    from kedge.transport.values import Checkpoint, Event, PushResult, RoundStatus, RunInfo, RunStatus, WorkerStatus
    from kedge.watch import Watch
    from kedge.worker import Worker

__all__ = [
    "Admission",
    "Asynchronous",
    "BoundedStaleness",
    "Buffered",
    "Checkpoint",
    "Checkpoints",
    "Client",
    "Event",
    "KedgeError",
    "LocalSteps",
    "Pending",
    "PushResult",
    "RoundStatus",
    "Run",
    "RunInfo",
    "RunStatus",
    "Snapshot",
    "Synchronous",
    "TopK",
    "Watch",
    "Worker",
    "WorkerStatus",
    "connect",
    "errors",
    "optim",
    "testing",
]

_SUBMODULES = frozenset({"errors", "optim", "testing"})

_HOMES = {
    "Admission": "kedge.policies",
    "Asynchronous": "kedge.policies",
    "BoundedStaleness": "kedge.policies",
    "Buffered": "kedge.policies",
    "Checkpoint": "kedge.transport.values",
    "Checkpoints": "kedge.policies",
    "Client": "kedge.client",
    "Event": "kedge.transport.values",
    "KedgeError": "kedge.errors",
    "LocalSteps": "kedge.local",
    "Pending": "kedge.pending",
    "PushResult": "kedge.transport.values",
    "RoundStatus": "kedge.transport.values",
    "Run": "kedge.run",
    "RunInfo": "kedge.transport.values",
    "RunStatus": "kedge.transport.values",
    "Snapshot": "kedge.run",
    "Synchronous": "kedge.policies",
    "TopK": "kedge.compression",
    "Watch": "kedge.watch",
    "Worker": "kedge.worker",
    "WorkerStatus": "kedge.transport.values",
    "connect": "kedge.client",
}


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return import_module(f"kedge.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'kedge' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
