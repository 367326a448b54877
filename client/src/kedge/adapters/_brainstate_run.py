"""The run behind an optimizer for brainstate: one that was given, or one of a name that is made when it is needed."""

import uuid
from collections.abc import Mapping, Sequence
from glob import escape
from typing import Any

import numpy as np

from kedge import optim, tree
from kedge.client import Client
from kedge.optim.groups import assign
from kedge.policies import Synchronous
from kedge.run import Run
from kedge.wire.errors import KedgeError
from kedge.wire.names import run_name
from kedge.worker import Worker


class Target:
    """Where registered weights go.

    Attributes:
        name: the run's; one that is still to be made unless it was given.
    """

    def __init__(self, optimizer: optim.Optimizer, *, run: Run | str | None, client: Client | None, kind: str) -> None:
        _check(run, client)
        self._optimizer = optimizer
        self._client = client
        self._run = run if isinstance(run, Run) else None
        self._is_named = run is not None
        self._is_made_here = False
        name = run.name if isinstance(run, Run) else run or f"{kind.lower()}-{uuid.uuid4().hex[:8]}"
        self.name = run_name(name)

    @property
    def is_given(self) -> bool:
        """Whether the run was given as such, and not by name: its tensors and groups are what they are."""
        return self._run is not None

    def open(self, arrays: Mapping[str, Any], groups: Sequence[optim.Group]) -> Run | None:
        """The run that holds these tensors; None where it is a given one that has still others.

        Raises:
            KedgeError: RUN_MISMATCH, TENSOR_UNEXPECTED, TENSOR_SHAPE_MISMATCH; those of `Client.create_run`.
        """
        if self._run is not None:
            return self._run if self._has_all(self._run, arrays) else None
        assert self._client is not None, "checked at construction"
        self._is_named = True
        self._is_made_here = not _exists(self._client, self.name)
        return self._client.get_or_create_run(
            self.name,
            params=dict(arrays),
            optimizer=self._optimizer,
            aggregation=Synchronous(quorum=1),
            groups=groups,
        )

    def check_complete(self, arrays: Mapping[str, Any]) -> None:
        """Says what a given run has beyond these tensors.

        Raises:
            KedgeError: TENSOR_MISSING.
        """
        if self._run is not None and arrays:
            tree.arrays_in_order(arrays, self._run.manifest)

    def discard(self, run: Run, worker: Worker) -> None:
        """Deletes the run of this target's making, so that one of other tensors or groups takes its place.

        Raises:
            ValueError: if it is of another's making, or in use.
        """
        status = run.status()
        others = [other.name for other in status.workers if other.name != worker.name]
        if not self._is_made_here or status.step or status.round or others:
            raise ValueError(
                f"{run.name} is in use, and its tensors and groups were fixed when it was created: call "
                "add_param_group() before register_trainable_weights()"
            )
        worker.close()
        run.delete()

    def go_on_with(self, name: str) -> None:
        """Takes the run of this name, if none was named before.

        Raises:
            ValueError: if another one was.
        """
        if self._is_named and name != self.name:
            raise ValueError(f"state_dict is of {name}, and this optimizer of {self.name}: give run={name!r} to go on")
        self.name, self._is_named = run_name(name), True

    def group(self, names: Sequence[str], number: int, options: Mapping[str, Any]) -> optim.Group:
        """The parameter group of exactly these tensors.

        Raises:
            TypeError: for an unknown option.
            ValueError: for an option out of range; if a run that was given has no such group.
        """
        own = optim.Group(tuple(map(escape, names)), **{"name": f"group-{number}", **options})
        if self._run is None:
            return own
        held = _group_of(self._run, names)
        for option in options:
            if getattr(held, option) != getattr(own, option):
                raise ValueError(
                    f"{option} is {getattr(own, option)!r}, and the group {held.name!r} of {self.name} has "
                    f"{getattr(held, option)!r}: leave it out, or use run.set_hyperparameters()"
                )
        return held

    def _has_all(self, run: Run, arrays: Mapping[str, Any]) -> bool:
        if not _is_same(run.optimizer, self._optimizer):
            raise KedgeError(
                "RUN_MISMATCH",
                f"{run.name} has another optimizer: it has {run.optimizer}, this one is {self._optimizer}",
                run=run.name,
                field="optimizer",
            )
        tensors = run.manifest.tensors
        missing = {spec.name: np.broadcast_to(np.float32(0), spec.shape) for spec in tensors if spec.name not in arrays}
        tree.arrays_in_order({**missing, **arrays}, run.manifest)
        return not missing


def _check(run: object, client: object) -> None:
    if not isinstance(run, Run | str | None):
        raise TypeError(f"run is {run!r}: give a run of kedge, or the name of one")
    if not isinstance(client, Client | None):
        raise TypeError(f"client is {client!r}: give what kedge.connect() returns")
    if client is None and not isinstance(run, Run):
        raise ValueError("client is missing: give client=kedge.connect(...), or a run of kedge as run=")


def _exists(client: Client, name: str) -> bool:
    try:
        client.get_run(name)
    except KedgeError as error:
        if error.reason != "RUN_NOT_FOUND":
            raise
        return False
    return True


def _is_same(held: optim.Optimizer, wanted: optim.Optimizer) -> bool:
    return optim.from_spec(held.spec()) == optim.from_spec(wanted.spec())


def _group_of(run: Run, names: Sequence[str]) -> optim.Group:
    tensors = [spec.name for spec in run.manifest.tensors]
    indices = assign(run.groups, tensors)
    for index, group in enumerate(run.groups, start=1):
        if {name for name, i in zip(tensors, indices, strict=True) if i == index} == set(names):
            return group
    raise ValueError(
        f"{run.name} has no parameter group of exactly {', '.join(map(repr, names))}: create it with "
        f"groups=[optim.Group({names[0]!r}, ...)]"
    )
