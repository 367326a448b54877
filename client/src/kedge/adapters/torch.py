"""PyTorch: a `torch.optim.Optimizer` whose arithmetic is a server's.

    optimizer = RemoteOptimizer.create(model, client, "digits", kedge.optim.AdamW(lr=1e-3))
    for images, labels in batches:
        optimizer.zero_grad()
        loss = criterion(model(images), labels)
        loss.backward()
        optimizer.step(loss=loss, example_count=len(labels))

Parameters travel; buffers, such as the running statistics of a batch norm, do not. docs/pytorch.md says the rest.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self

try:
    import torch
except ModuleNotFoundError as error:
    raise ImportError("kedge.adapters.torch needs PyTorch: pip install kedge[torch]") from error

import numpy as np

from kedge import optim, policies, tree
from kedge.adapters import _torch_groups, _torch_leases, _torch_params
from kedge.client import ALL_THAT_ARE_FINITE, Client
from kedge.compression import TopK
from kedge.run import Run
from kedge.transport import RunInfo
from kedge.weights import FastOrSlow
from kedge.wire.names import parse_worker
from kedge.worker import Worker

__all__ = ["RemoteOptimizer", "pull"]

_ALONE = policies.Synchronous(quorum=1)


class RemoteOptimizer(torch.optim.Optimizer):
    """Pushes the gradients of parameters to a run, and sets the parameters to the weights that come of it.

    It is a worker of the run from its construction until `close`, the end of its `with` block, or the end of the
    process. Use it from one thread. The parameters are set to the run's fast weights at once.

    Args:
        params: `model.named_parameters()`, whose names are matched with those of the run's tensors; or
            `model.parameters()`, matched by order and checked by shape; or a list of torch's parameter groups, each of
            which lies within one group of the run. Float32, bfloat16 or float16, on any device.
        run: the run to work for. All its tensors are to be given.
        worker: a worker of the run to use, which stays the caller's to close; None joins the run.
        name: the worker's id; `Run.join` has more on it, and on the next two.
        wire_dtype: what gradients and weights are sent as, as for `Run.join`.
        lease_seconds: how long the server counts on this worker without hearing of it; None takes its default.
        allow_missing: whether tensors of the run may have no parameter here. Their gradients are zeros then, until
            `add_param_group` brings the parameters.

    Attributes:
        run: the run.
        param_groups: as in every torch optimizer, with the options "lr" and "weight_decay". They show the run's. What
            is set there, by hand or by one of torch's schedulers, becomes the run's with the next step, if it differs
            from what was shown: `pull` first, where others may have changed the run.

    Raises:
        ValueError, TypeError: for parameters, groups or options that cannot be matched with the run's.
        KedgeError: TENSOR_MISSING, TENSOR_UNEXPECTED, TENSOR_SHAPE_MISMATCH, UNSUPPORTED_DTYPE, UNSUPPORTED_STRUCTURE;
            all of these before the run is joined; and those of `Run.join` and `Worker.pull`.

    Example:
        >>> run = client.get_run("digits")
        >>> with RemoteOptimizer(model.named_parameters(), run=run) as optimizer:
        ...     for images, labels in batches:
        ...         optimizer.zero_grad()
        ...         loss = criterion(model(images), labels)
        ...         loss.backward()
        ...         optimizer.step(loss=loss, example_count=len(labels))
    """

    def __init__(
        self,
        params: Any,
        *,
        run: Run,
        worker: Worker | None = None,
        name: str | None = None,
        wire_dtype: str | TopK = "float32",
        lease_seconds: float | None = None,
        allow_missing: bool = False,
    ) -> None:
        if not isinstance(run, Run):
            raise TypeError(f"run is {run!r}: give what client.get_run(name) returns, or use RemoteOptimizer.create")
        given = _torch_params.as_groups(params)
        groups = _torch_params.named_groups(given, run.manifest, allow_missing=allow_missing)
        if len(groups) == 1:
            groups = _torch_groups.cut(groups[0], run)
        info = run.info()
        parts = _shown_parts(groups, run, info)
        defaults = _torch_groups.settings("", info)[1]
        super().__init__([_torch_form(group) for group in groups], defaults)
        self.run = run
        self._created = info.create_time.isoformat()
        self._parts = parts
        self._parameters = _parameters(groups)
        self._left_out = _torch_params.left_out(given, groups)
        self._worker = _joined(run, worker, name, wire_dtype=wire_dtype, lease_seconds=lease_seconds)
        self._lease = _torch_leases.Lease(self, self._worker) if worker is None else None
        try:
            self._take(self._worker.pull())
        except BaseException:
            self.close()
            raise

    @classmethod
    def create(  # noqa: PLR0913  what a run and a worker are made with, all at once
        cls,
        model: Any,
        client: Client,
        name: str,
        optimizer: optim.Optimizer,
        *,
        aggregation: policies.Policy = _ALONE,
        groups: Sequence[optim.Group] = (),
        admission: policies.Admission = ALL_THAT_ARE_FINITE,
        durability: policies.Durability | None = None,
        checkpoints: policies.Checkpoints | None = None,
        param_groups: Iterable[dict[str, Any]] | None = None,
        worker_name: str | None = None,
        wire_dtype: str | TopK = "float32",
        lease_seconds: float | None = None,
    ) -> Self:
        """Opens the run of a module, or creates it from the module's parameters, and works for it.

        Several processes may call this in any order: the first one's parameters are those that all begin with. A
        parameter that requires no gradient is left out of the run, and stays as it is in each process, unless one of
        `groups` is frozen and takes it.

        Args:
            model: a `torch.nn.Module`.
            client: the client of a server.
            name: the run's, as for `Client.create_run`.
            optimizer: of `kedge.optim`.
            aggregation: how contributions become steps; by default each is one.
            groups: the run's groups, by patterns of names.
            admission: which gradients it takes; by default all that are finite.
            durability: as for `Client.create_run`.
            checkpoints: as for `Client.create_run`.
            param_groups: instead of `groups`, torch's parameter groups: each one that has an "lr" or a "weight_decay"
                becomes a group of the run. Parameters in none of them are left out of the run.
            worker_name: the worker's id.
            wire_dtype: as for the class.
            lease_seconds: as for the class.

        Raises:
            ValueError, TypeError: for groups or options that cannot be the run's.
            KedgeError: those of `Client.get_or_create_run` and of the class.

        Example:
            >>> optimizer = RemoteOptimizer.create(model, client, "digits", kedge.optim.AdamW(lr=1e-3))
        """
        if param_groups is not None and groups:
            raise ValueError("groups and param_groups are both given: give one of them")
        frozen = [group for group in groups if group.frozen]
        given = _torch_params.groups_of_model(model, param_groups)
        named = _torch_params.groups_to_create(given, lambda tensor: any(group.takes(tensor) for group in frozen))
        _torch_groups.check_options(named, optimizer)
        tensors = _parameters(named)
        run = client.get_or_create_run(
            name,
            params={key: _torch_params.as_array(p) for key, p in model.named_parameters() if key in tensors},
            optimizer=optimizer,
            aggregation=aggregation,
            groups=_torch_groups.groups_of(named) if param_groups is not None else groups,
            admission=admission,
            durability=durability,
            checkpoints=checkpoints,
        )
        plain = [{key: value for key, value in group.items() if key not in _torch_groups.OPTIONS} for group in given]
        return cls(plain, run=run, name=worker_name, wire_dtype=wire_dtype, lease_seconds=lease_seconds)

    @property
    def worker(self) -> Worker:
        """The worker: `step_number`, `last_result` (what became of the last gradient), `name`."""
        return self._worker

    def step(self, closure: Callable[[], Any] | None = None, *, loss: Any = None, example_count: int = 1) -> Any:
        """Pushes the gradients, waits for their round, and sets the parameters to what came of it.

        A parameter without a gradient counts as one of zeros. Gradients that came too late for their round, or hold a
        NaN or an infinity, change nothing; `worker.last_result` says so, and the parameters are the run's newest.

        Args:
            closure: computes the gradients anew and returns the loss, as torch's optimizers have it.
            loss: the loss of these examples, for the record; None takes what the closure returned.
            example_count: the number of examples that the gradients are a mean over: their weight in the round.

        Returns:
            What the closure returned; None without one.

        Raises:
            ValueError: if no parameter has a gradient, or one has that was left out of the run; for a hyperparameter in
                `param_groups` that is out of range, or that the run cannot have for these parameters alone; after
                `close`. Nothing is pushed.
            KedgeError: UNSUPPORTED_STRUCTURE for a sparse gradient; those of `Worker.step`.
        """
        if self._lease is not None and self._lease.has_ended:
            raise ValueError("the optimizer was closed: make a new RemoteOptimizer")
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        grads = self._gradients()
        _torch_groups.check_options(self.param_groups, self.run.optimizer)
        for part in self._parts:
            part.forward(self.run, self.param_groups)
        loss = result if loss is None else loss
        self._take(self._worker.step(grads, loss=loss, example_count=example_count))
        for part in self._parts:
            part.advance(self._worker.step_number, self.param_groups)
        return result

    def pull(self) -> None:
        """Sets the parameters to the run's newest weights, and shows its hyperparameters. For between two steps.

        What was changed elsewhere, by another worker or by `Run.set_hyperparameters`, shows in `param_groups` only
        after this. What was set in `param_groups` and is not the run's yet is kept.

        Raises:
            KedgeError: those of `Worker.pull`.
        """
        info = self.run.info()
        self._take(self._worker.pull())
        for part in self._parts:
            part.refresh(info, self.param_groups)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Brings parameters of tensors that had none here (`allow_missing`). For between two steps.

        Raises:
            ValueError: for parameters that are here already, or without names.
            KedgeError: TENSOR_UNEXPECTED for a tensor that the run does not have: its tensors are fixed.
        """
        if not hasattr(self, "_parameters"):  # the base class's constructor
            super().add_param_group(param_group)
            return
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group is a {type(param_group).__name__}: give a dict with 'params'")
        given = _torch_params.as_groups([param_group])
        (named,) = _torch_params.named_groups(given, self.run.manifest, allow_missing=True)
        for key, _ in named["params"]:
            if key in self._parameters:
                raise ValueError(f"{key!r} is in a parameter group already")
        added = _torch_groups.cut(named, self.run)
        _torch_groups.check_options(added, self.run.optimizer)
        groups = [*self.param_groups, *added]
        self._parts = _torch_groups.with_more_groups(self._parts, groups, len(self.param_groups), self.run)
        for group in added:
            super().add_param_group(_torch_form(group))
        self._parameters |= _parameters(added)
        self._left_out |= _torch_params.left_out(given, [named])
        self.pull()

    def state_dict(self) -> dict[str, Any]:
        """Names the run, the worker and the step under "kedge"; with torch's "param_groups" and an empty "state".

        Weights and moments are the server's, and are not in it.
        """
        state: dict[str, Any] = super().state_dict()
        state["kedge"] = {
            "run": self.run.name,
            "created": self._created,
            "worker": self._worker.name,
            "step": self._worker.step_number,
            "shown": self._shown(),
        }
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up the work for the run that the state names: sets the parameters to its weights as they are now.

        Hyperparameters are the run's, but for those that had been set in `param_groups` and not been sent yet.

        Raises:
            ValueError: if the state is of another run, of another kind of optimizer, or of other parameter groups.
            KedgeError: those of `pull`.
        """
        saved = state_dict.get("kedge")
        if not isinstance(saved, Mapping) or not {"run", "created", "shown"} <= saved.keys():
            raise ValueError(
                "state_dict is of another kind of optimizer: the moments of a run are the server's, none can be loaded"
            )
        if (saved["run"], saved["created"]) != (self.run.name, self._created):
            raise ValueError(
                f"state_dict is of {saved['run']}, created {saved['created']}, and this optimizer of {self.run.name}, "
                f"created {self._created}: open the run that it names, or go on from this one's weights without it"
            )
        super().load_state_dict(state_dict)
        for group, then, now in zip(self.param_groups, saved["shown"], self._shown(), strict=True):
            for option, value in now.items():
                group[option] = value if group[option] == then.get(option) else group[option]
        self.pull()

    def close(self) -> None:
        """Gives the lease back. May be called twice; a worker that was given to the constructor stays open."""
        if self._lease is not None:
            self._lease.end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("a RemoteOptimizer holds a lease and cannot be copied or pickled: use its state_dict()")

    def _gradients(self) -> dict[str, Any]:
        """What to push, by tensor.

        Raises:
            ValueError: if no parameter has a gradient, or one that is not in the run has.
        """
        _torch_params.check_left_out(self._left_out)
        if all(parameter.grad is None for parameter in self._parameters.values()):
            raise ValueError("no parameter has a gradient: call loss.backward() before step()")
        grads = {name: _torch_params.gradient(name, p) for name, p in self._parameters.items()}
        for spec in self.run.manifest.tensors:
            if spec.name not in grads:
                grads[spec.name] = np.zeros(spec.shape, np.float32)
        return grads

    def _take(self, weights: Any) -> None:
        arrays = tree.named_leaves(weights)
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(_torch_params.as_tensor(arrays[name]))

    def _shown(self) -> list[dict[str, float]]:
        """What each parameter group was last made to show."""
        shown: list[dict[str, float]] = [{} for _ in self.param_groups]
        for part in self._parts:
            for index in part.indices:
                shown[index] = dict(part.shown)
        return shown


def pull(run: Run, weights: FastOrSlow = "fast") -> dict[str, Any]:
    """A run's weights as tensors on the CPU by name, without joining it: `model.load_state_dict` takes them.

    A module with buffers, or with tied parameters, needs its `strict=False`.

    Raises:
        KedgeError: NO_SLOW_WEIGHTS, RUN_NOT_FOUND, SERVER_UNAVAILABLE.

    Example:
        >>> model.load_state_dict(kedge.adapters.torch.pull(run, "slow"))
    """
    return {name: _torch_params.as_tensor(array) for name, array in tree.named_leaves(run.pull(weights)).items()}


def _joined(
    run: Run, worker: Worker | None, name: str | None, *, wire_dtype: str | TopK, lease_seconds: float | None
) -> Worker:
    if worker is None:
        return run.join(name, wire_dtype=wire_dtype, lease_seconds=lease_seconds)
    if name is not None or wire_dtype != "float32" or lease_seconds is not None:
        raise ValueError("worker is given, which has joined already: leave name, wire_dtype and lease_seconds out")
    if parse_worker(worker.name).run != run.name:
        raise ValueError(f"worker is {worker.name}, which is none of {run.name}: join that run")
    return worker


def _shown_parts(groups: Sequence[dict[str, Any]], run: Run, info: RunInfo) -> list[_torch_groups.Part]:
    """The parts of the run that the groups are in, after having the groups show what it has."""
    _torch_groups.check_options(groups, run.optimizer)
    parts = _torch_groups.parts_of(groups, run)
    for part in parts:
        part.refresh(info, groups)
        part.changes(groups)  # refuses what could not be forwarded
    return parts


def _parameters(groups: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The parameters by name. One that is tied to another may be there under both names."""
    return {name: tensor for group in groups for name, tensor in group["params"]}


def _torch_form(group: dict[str, Any]) -> dict[str, Any]:
    """A group of (name, parameter) pairs as torch keeps it, with each parameter once."""
    pairs: dict[int, tuple[str, Any]] = {}
    for name, tensor in group["params"]:
        pairs.setdefault(id(tensor), (name, tensor))
    names, tensors = zip(*pairs.values(), strict=True) if pairs else ((), ())
    return {**group, "params": list(tensors), "param_names": list(names)}
