"""Learning rates that tick on the worker, by hand: what `scheduler.step()` is in braintools.

Both braintools' own schedulers and those of here are taken: objects with `base_lrs`, `step()` and `get_last_lr()`.
"""

from collections.abc import Callable
from typing import Any

import brainstate

from kedge import optim


class Scheduler:
    """A schedule of `kedge.optim` that ticks when its `step` is called, with the interface of braintools' schedulers.

    Several workers with one each have to tick at the same steps. A schedule of `kedge.optim` given as `lr` is ticked
    by the server instead, for all of them.

    Attributes:
        schedule: the formula.
        base_lrs: the rate that the formula is about, in a list of one.
        last_epoch: the tick.
        current_lrs: a State with the rate that holds, in a list of one.

    Example:
        >>> from kedge.adapters import brainstate as kb
        >>> scheduler = kb.StepLR(base_lr=1e-3, step_size=30, gamma=0.5)
        >>> optimizer = kb.AdaBelief(lr=scheduler, client=client)
        >>> for epoch in range(90):
        ...     train(model, optimizer)
        ...     scheduler.step()
    """

    def __init__(self, schedule: optim.Schedule) -> None:
        _check(schedule)
        self.schedule = schedule
        self.last_epoch = schedule.last_epoch
        self.base_lrs = [schedule.base_lr]
        self.current_lrs = brainstate.LongTermState(self.get_lr())

    def get_lr(self) -> list[float]:
        """The rate by the formula, in a list of one."""
        return [self.schedule.rate(self.last_epoch - self.schedule.last_epoch)]

    def get_last_lr(self) -> list[float]:
        """The rate that holds: by the formula, unless it was changed since the last tick."""
        return list(self.current_lrs.value)

    def step(self, epoch: int | None = None) -> None:
        """Ticks once, or to a tick. The optimizer passes the new rate on before its next update."""
        if epoch is not None and epoch < 0:
            raise ValueError(f"epoch is {epoch}: it must be None or at least 0")
        self.last_epoch = self.last_epoch + 1 if epoch is None else epoch
        self.apply(lambda rate: rate)

    def step_epoch(self) -> None:
        """The same as `step()`."""
        self.step()

    def apply(self, apply_fn: Callable[[float], float]) -> None:
        """Makes a function of the formula's rate the one that holds until the next tick."""
        self.current_lrs.value = [apply_fn(rate) for rate in self.get_lr()]

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` goes on from."""
        return {"last_epoch": self.last_epoch, "base_lrs": self.base_lrs, "current_lrs": self.get_last_lr()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from where another one of the same schedule stood."""
        self.last_epoch = state_dict["last_epoch"]
        self.current_lrs.value = list(state_dict["current_lrs"])

    def __repr__(self) -> str:
        return f"<Scheduler {self.schedule} last_epoch={self.last_epoch}>"


def by_hand(kind: type[optim.Schedule]) -> Callable[..., Scheduler]:
    """The constructor of a schedule with a `Scheduler` around it. Schedules among its arguments may be either kind."""

    def make(*args: Any, **kwargs: Any) -> Scheduler:
        return Scheduler(kind(*map(_bare, args), **{name: _bare(value) for name, value in kwargs.items()}))

    make.__name__ = make.__qualname__ = kind.__name__
    make.__doc__ = f"A `kedge.optim.{kind.__name__}` that ticks by its `step()`; it takes the same arguments."
    return make


def ticks_by_hand(lr: object) -> bool:
    """Whether it is a scheduler of ours, of braintools or of the same interface."""
    return all(hasattr(lr, name) for name in ("base_lrs", "step", "get_last_lr"))


def rate_to_create_with(lr: Any) -> Any:
    """What stands for it in the optimizer of a run: for a scheduler the rate that it is about, whatever its tick."""
    return float(lr.base_lrs[0]) if ticks_by_hand(lr) else lr


def as_scheduler(lr: Any) -> Any:
    """It, or a scheduler that never changes for a number."""
    if isinstance(lr, optim.Schedule) or ticks_by_hand(lr):
        return lr
    return Scheduler(optim.ConstantLR(lr, factor=1.0, total_iters=0))


def base_rate(lr: Any) -> float:
    """The rate that a schedule or scheduler is about."""
    return float(lr.base_lrs[0]) if ticks_by_hand(lr) else float(lr.base_lr)


def _check(schedule: optim.Schedule) -> None:
    kind = type(schedule).__name__
    if isinstance(schedule, optim.ReduceLROnPlateau):
        raise TypeError(
            f"{kind} cannot tick on a worker: give kedge.optim.{kind} as lr, and update() the loss, so that the server "
            "sees the losses of all workers"
        )
    is_of_steps = schedule.steps_per_epoch != 1 and not isinstance(schedule, optim.OneCycleLR)
    if is_of_steps or schedule.tick != "step":
        raise ValueError(
            f"{'steps_per_epoch' if is_of_steps else 'tick'} is for schedules that the server ticks: leave it out and "
            f"call step(), or give kedge.optim.{kind} as lr"
        )


def _bare(argument: Any) -> Any:
    if isinstance(argument, Scheduler):
        return argument.schedule
    return [_bare(item) for item in argument] if isinstance(argument, list | tuple) else argument
