"""What the optimizers for brainstate share: registered States that a run holds, and rates that are passed on to it.

It has the interface of braintools' optimizers. The arithmetic and its state are the server's.
"""

from collections.abc import Callable, Mapping
from typing import Any, Self

import brainstate

from kedge import optim, tree
from kedge.adapters._brainstate_rates import as_scheduler, base_rate, ticks_by_hand
from kedge.adapters._brainstate_run import Target
from kedge.adapters._brainstate_tensors import Tensors
from kedge.client import Client
from kedge.optim.controls import RateState
from kedge.optim.rules import check_lr
from kedge.run import Run
from kedge.weights import FastOrSlow
from kedge.worker import Worker


class RemoteOptimizer:
    """An optimizer whose arithmetic a run on a server does. Use it from one thread.

    Registering weights opens or creates the run, joins it as a worker, and overwrites the weights with the run's.
    `close`, or the end of a `with` block, gives the lease back; the run stays.

    Attributes:
        optimizer: the optimizer of the run, a value of `kedge.optim`.
        step_count: a State with the run's step that the registered weights are of.
        param_groups: a dict for the weights of no other group, and one for each call of `add_param_group`. An "lr" or
            "weight_decay" that is changed in it is passed on before the next update. None there is the run's own, and
            cannot be gone back to.
        schedulers: those of `add_scheduler`.
    """

    def __init__(self, optimizer: optim.Optimizer, lr: Any, *, run: Run | str | None, client: Client | None) -> None:
        settings = optimizer.spec().settings
        self.optimizer = optimizer
        self.step_count = brainstate.LongTermState(0)
        self.schedulers: list[Any] = []
        self._lr = as_scheduler(settings.lr if lr is None else lr)
        self._last_rate = base_rate(self._lr)
        rate = brainstate.LongTermState(settings.lr)
        self.param_groups: list[dict[str, Any]] = [
            {"name": "", "params": {}, "lr": rate, "weight_decay": settings.weight_decay}
        ]
        self._passed_on = [_hyperparameters(self.param_groups[0])]
        self._target = Target(optimizer, run=run, client=client, kind=type(self).__name__)
        self._tensors = Tensors()
        self._groups: tuple[optim.Group, ...] = ()
        self._run: Run | None = None
        self._worker: Worker | None = None
        self._is_registered = False
        self._holds_slow = False

    @property
    def run(self) -> Run:
        """The run that holds the registered weights.

        Raises:
            ValueError: before `register_trainable_weights`.
        """
        if self._run is None:
            raise ValueError("register_trainable_weights must be called first: there is no run before")
        return self._run

    @property
    def lr(self) -> Any:
        """What gives the rate: the scheduler or schedule that was given, or a scheduler made of the number."""
        return self._lr

    @property
    def base_lr(self) -> float:
        """The rate that the scheduler or schedule is about."""
        return base_rate(self._lr)

    @property
    def current_lr(self) -> float:
        """The rate of the next step: the run's own as soon as weights are registered. It may be set."""
        if self._worker is None:
            return self._lr.get_last_lr()[0] if ticks_by_hand(self._lr) else RateState.begin(self._lr).rate
        self._pass_on_changes()
        return self.run.status().learning_rate

    @current_lr.setter
    def current_lr(self, value: float) -> None:
        value = float(value)
        check_lr(value)
        if hasattr(self._lr, "current_lrs"):
            self._lr.current_lrs.value = [value, *self._lr.current_lrs.value[1:]]
            self._last_rate = value
        self.param_groups[0]["lr"].value = value
        if self._worker is not None:
            self.run.set_hyperparameters(lr=value)
            self._passed_on[0]["lr"] = value

    def register_trainable_weights(self, param_states: Any) -> Self:
        """Takes States as the weights to train: opens the run, joins it, and overwrites the States with its weights.

        Args:
            param_states: a tree of States, as `model.states(brainstate.ParamState)` gives it; their leaves are float32,
                bfloat16 or float16.

        Raises:
            TypeError: for a leaf that is no State.
            ValueError: for other weights than before, if the run is in use.
            KedgeError: RUN_MISMATCH, TENSOR_UNEXPECTED, TENSOR_SHAPE_MISMATCH, UNSUPPORTED_DTYPE, MANIFEST_INVALID,
                and those of `Client.create_run` and `Run.join`.
        """
        self._attach(self._tensors.merged(param_states), self._groups)
        self._fill_first_group()
        return self

    def add_param_group(self, params: Any, **kwargs: Any) -> None:
        """Gives States, registered ones or new ones, hyperparameters of their own.

        The parameter groups of a run are fixed when it is created. So call this before `register_trainable_weights`;
        after it, it is possible while no step was made and no other worker has joined: the run is then created anew.
        A run that was given must have a group of exactly these tensors.

        Args:
            params: a tree of States.
            **kwargs: `lr`, `weight_decay` and the others of `kedge.optim.Group`. What is left out is the run's own.

        Raises:
            TypeError: for a leaf that is no State, or another hyperparameter.
            ValueError: for a hyperparameter out of range, States of another group, a run that was given and has no such
                group, or one that is in use.
            KedgeError: as `register_trainable_weights`.
        """
        tensors = self._tensors.merged(params)
        own = tensors.select(params)
        names = list(own.arrays())
        taken = [name for name in names if any(group.takes(name) for group in self._groups)]
        if taken or not names:
            raise ValueError(f"params has {taken[0]!r}, which is of another group" if taken else "params has no State")
        group = self._target.group(names, len(self.param_groups), kwargs)
        if self._is_registered:
            self._attach(tensors, (*self._groups, group))
        self._tensors, self._groups = tensors, (*self._groups, group)
        added = {"lr": None, "weight_decay": None} | kwargs | {"name": group.name, "params": own.by_path()}
        self.param_groups.append(added)
        self._passed_on.append(_hyperparameters(added))
        self._fill_first_group()

    def update(self, grads: Any, *, loss: Any = None, example_count: int = 1) -> None:
        """Pushes a gradient, waits for its round, and writes the weights that came of it into the States.

        A gradient that came too late for its round is left out, and there are newer weights to go on with.

        Args:
            grads: as `brainstate.transform.grad` over the registered States gives it. Weights without a gradient get
                zeros; gradients of what was not registered are ignored.
            loss: the loss of these examples, for the record and for `kedge.optim.ReduceLROnPlateau`.
            example_count: the number of examples that the gradient is a mean over.

        Raises:
            TypeError: inside `jit` or another transformation, where there is nothing yet to send.
            ValueError: before `register_trainable_weights`, without any gradient of a registered weight, or while the
                States hold slow weights.
            KedgeError: as `Worker.step`.
        """
        worker = self._joined()
        if self._holds_slow:
            raise ValueError("the weights are the slow ones: pull() the fast ones, and compute the gradient with them")
        named = self._tensors.gradients(grads)
        self._pass_on_changes()
        self._write(worker.step(named, loss=loss, example_count=example_count))

    def step(self, grads: Any, *, loss: Any = None, example_count: int = 1) -> None:
        """The same as `update`."""
        self.update(grads, loss=loss, example_count=example_count)

    def pull(self, weights: FastOrSlow = "fast") -> None:
        """Overwrites the States with the run's weights of now.

        Args:
            weights: "slow" for those that Lookahead makes to evaluate; pull "fast" before the next gradient.

        Raises:
            ValueError: before `register_trainable_weights`.
            KedgeError: NO_SLOW_WEIGHTS, RUN_NOT_FOUND, SERVER_UNAVAILABLE.
        """
        self._write(self._joined().pull(weights), is_slow=weights == "slow")

    def lr_apply(self, apply_fn: Callable[[float], float]) -> None:
        """Makes a function of the rate the one that holds, until the scheduler ticks again."""
        if ticks_by_hand(self._lr):
            self._lr.apply(apply_fn)
        else:
            self.current_lr = apply_fn(self.current_lr)

    def add_scheduler(self, scheduler: Any) -> None:
        """Adds a scheduler for `get_last_lr` to tell of. The rate comes from `lr` alone."""
        self.schedulers.append(scheduler)

    def get_last_lr(self) -> list[float]:
        """The rates of the scheduler that was added last, or the current one."""
        return list(self.schedulers[-1].get_last_lr()) if self.schedulers else [self.current_lr]

    def state_dict(self) -> dict[str, Any]:
        """Names the run, the worker and the step. Weights and moments are kept by the server.

        Raises:
            ValueError: before `register_trainable_weights`.
        """
        worker = self._joined()
        step = self.step_count.value
        rates = {"lr": self.current_lr, "base_lr": self.base_lr}
        return {"run": self.run.name, "worker": worker.name, "step_count": step} | rates

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes on with the run of a `state_dict`, from where that run is now.

        Before weights are registered it chooses the run, if none was named; after it, it pulls.

        Raises:
            ValueError: if it is of another run, or of none.
        """
        name = state_dict.get("run")
        if not isinstance(name, str):
            raise ValueError("state_dict names no run: give what state_dict() of this adapter returned")
        self._target.go_on_with(name)
        if self._worker is not None:
            self.pull()

    def close(self) -> None:
        """Gives the lease back. May be called twice; registering the weights again joins again."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None
        self._is_registered = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<kedge {type(self).__name__} of {self._target.name}: {self.optimizer}>"

    def _joined(self) -> Worker:
        if self._worker is None:
            self._target.check_complete(self._tensors.arrays())
            raise ValueError("register_trainable_weights must be called first: no run is joined")
        return self._worker

    def _attach(self, tensors: Tensors, groups: tuple[optim.Group, ...]) -> None:
        """Joins the run of these tensors and groups, unless it is joined or is given and has still other tensors."""
        arrays = tensors.arrays()
        has_new_tensors = len(arrays) > len(self._tensors.arrays())
        has_new_groups = len(groups) > len(self._groups) and not self._target.is_given
        weights = None
        if self._worker is None or has_new_tensors or has_new_groups:
            weights = self._join(arrays, groups)
        self._tensors, self._groups, self._is_registered = tensors, groups, True
        if weights is not None:
            self._write(weights)
            self._show_rate()

    def _join(self, arrays: dict[str, Any], groups: tuple[optim.Group, ...]) -> Any:
        """Joins, and pulls the weights; None if it is too early for that."""
        if self._worker is not None and not self._target.is_given:
            tree.named_leaves(arrays)  # what cannot be sent is refused while the run is still there
            self._target.discard(self.run, self._worker)
            self._worker = None
        run = self._target.open(arrays, groups)
        if run is None:
            return None
        worker = run.join()
        try:
            weights = worker.pull()
        except BaseException:
            worker.close()
            raise
        self._run, self._worker = run, worker
        return weights

    def _write(self, weights: Any, *, is_slow: bool = False) -> None:
        self._tensors.write(tree.named_leaves(weights))
        self._holds_slow = is_slow
        if not is_slow:
            self.step_count.value = self._joined().step_number

    def _show_rate(self) -> None:
        """Shows the rate that the run has by now, unless one was set here that it is still to be told of."""
        shown, told = self.param_groups[0]["lr"], self._passed_on[0]
        if isinstance(told["lr"], float) and shown.value == told["lr"]:
            shown.value = told["lr"] = self.run.status().learning_rate

    def _fill_first_group(self) -> None:
        """The States of no other group are the first one's."""
        others = [state for group in self.param_groups[1:] for state in group["params"].values()]
        self.param_groups[0]["params"] = self._tensors.without(others).by_path()

    def _pass_on_changes(self) -> None:
        """Tells the run of the rates and decays that were changed here since it was last told.

        Raises:
            ValueError: for one that is out of range, or None where the group had a value.
        """
        if ticks_by_hand(self._lr) and self._lr.get_last_lr()[0] != self._last_rate:
            self._last_rate = self.param_groups[0]["lr"].value = self._lr.get_last_lr()[0]
        for group, passed_on in zip(self.param_groups, self._passed_on, strict=True):
            now = _hyperparameters(group)
            changes = {name: value for name, value in now.items() if value != passed_on[name]}
            for option, value in changes.items():
                if value is None:
                    raise ValueError(
                        f"{option} of the group {group['name']!r} is None: a group keeps what it was given; set the "
                        "run's own value"
                    )
            if changes:
                self.run.set_hyperparameters(group=group["name"], **changes)
                passed_on.update(changes)


def _hyperparameters(group: Mapping[str, Any]) -> dict[str, Any]:
    """The rate and the decay of a parameter group as they stand there."""
    lr = group["lr"]
    return {"lr": lr.value if isinstance(lr, brainstate.State) else lr, "weight_decay": group["weight_decay"]}
