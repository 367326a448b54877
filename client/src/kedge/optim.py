"""Optimizers and schedules as plain values: what a run is created with. The arithmetic is the server's.

Names, arguments and defaults are those of `braintools.optim`; deviations are named where they are. Every value is
checked when it is constructed, and the `ValueError` names the field.

Example:
    >>> from kedge import optim
    >>> optim.Lookahead(optim.AdaBelief(lr=optim.StepLR(base_lr=1e-3, step_size=1000)), sync_period=5, alpha=0.5)
    Lookahead(base_optimizer=AdaBelief(lr=StepLR(base_lr=0.001, step_size=1000, gamma=0.1, steps_per_epoch=1), ...
"""

import math
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, NamedTuple, Protocol

__all__ = [
    "SGD",
    "AdaBelief",
    "Adam",
    "AdamW",
    "ConstantLR",
    "ExponentialLR",
    "Lookahead",
    "Optimizer",
    "Schedule",
    "StepLR",
]


_FLOAT32_MAX = 3.4028234663852886e38
_FLOAT32_MIN_NORMAL = 1.1754943508222875e-38


class Schedule(Protocol):
    """A learning rate that changes as steps are applied."""

    def rate(self, step_count: int) -> float:
        """The rate of the next step, after `step_count` applied ones."""
        ...


@dataclass(frozen=True)
class ConstantLR:
    """`base_lr * factor` for the first `total_iters` ticks, then `base_lr`.

    Attributes:
        base_lr: the rate, >= 0.
        factor: in [0, 1].
        total_iters: ticks.
        steps_per_epoch: applied steps in a tick.
    """

    base_lr: float = 1e-3
    factor: float = 1 / 3
    total_iters: int = 5
    _: KW_ONLY
    steps_per_epoch: int = 1

    def __post_init__(self) -> None:
        """Checks every field."""
        _check_rate("base_lr", self.base_lr)
        _check("factor", self.factor, 0 <= self.factor <= 1, "in [0, 1]")
        _check_count("total_iters", self.total_iters, minimum=0)
        _check_count("steps_per_epoch", self.steps_per_epoch, minimum=1)

    def rate(self, step_count: int) -> float:
        """The rate of the next step, after `step_count` applied ones."""
        return self.base_lr * (self.factor if step_count // self.steps_per_epoch < self.total_iters else 1.0)


@dataclass(frozen=True)
class StepLR:
    """`base_lr * gamma ** (tick // step_size)`.

    Attributes:
        base_lr: the first rate, >= 0.
        step_size: ticks from one decay to the next.
        gamma: the factor of a decay, > 0.
        steps_per_epoch: applied steps in a tick.
    """

    base_lr: float = 1e-3
    step_size: int = 30
    gamma: float = 0.1
    _: KW_ONLY
    steps_per_epoch: int = 1

    def __post_init__(self) -> None:
        """Checks every field."""
        _check_rate("base_lr", self.base_lr)
        _check_count("step_size", self.step_size, minimum=1)
        _check("gamma", self.gamma, self.gamma > 0, "greater than 0")
        _check_count("steps_per_epoch", self.steps_per_epoch, minimum=1)

    def rate(self, step_count: int) -> float:
        """The rate of the next step, after `step_count` applied ones."""
        return _grown(self.base_lr, self.gamma, step_count // self.steps_per_epoch // self.step_size)


@dataclass(frozen=True)
class ExponentialLR:
    """`base_lr * gamma ** tick`.

    Attributes:
        base_lr: the first rate, >= 0.
        gamma: the factor of a tick, > 0.
        steps_per_epoch: applied steps in a tick.
    """

    base_lr: float = 1e-3
    gamma: float = 0.95
    _: KW_ONLY
    steps_per_epoch: int = 1

    def __post_init__(self) -> None:
        """Checks every field."""
        _check_rate("base_lr", self.base_lr)
        _check("gamma", self.gamma, self.gamma > 0, "greater than 0")
        _check_count("steps_per_epoch", self.steps_per_epoch, minimum=1)

    def rate(self, step_count: int) -> float:
        """The rate of the next step, after `step_count` applied ones."""
        return _grown(self.base_lr, self.gamma, step_count // self.steps_per_epoch)


class UpdateSpec(NamedTuple):
    """An optimizer laid flat: everything that happens to an averaged gradient, in this order."""

    grad_clip_norm: float | None
    """Clip by global norm; None: not."""
    grad_clip_value: float | None
    """Clip every element; None: not."""
    weight_decay: float
    """Coupled L2 decay, added to the gradient as weight_decay * weights."""
    base: "BaseOptimizer"
    """The rule, for its own fields; those above and `lr` are to be read here."""
    lr: float | Schedule
    sync_period: int | None
    """Lookahead's k; None: no slow weights."""
    alpha: float
    """Lookahead's slow step size."""

    def rate(self, step_count: int) -> float:
        """The learning rate of the next step, after `step_count` applied ones; never more than float32 holds."""
        return self.lr if isinstance(self.lr, float) else min(self.lr.rate(step_count), _FLOAT32_MAX)

    def ends_sync_period(self, step: int) -> bool:
        """Whether the step of this number (the first is 1) ends with a lookahead sync."""
        return self.sync_period is not None and step % self.sync_period == 0


class _Base:
    """What all base optimizers share: the options around the rule."""

    lr: float | Schedule
    weight_decay: float
    grad_clip_norm: float | None
    grad_clip_value: float | None

    def spec(self) -> UpdateSpec:
        """This optimizer laid flat."""
        return UpdateSpec(
            self.grad_clip_norm,
            self.grad_clip_value,
            self._coupled_decay(),
            self,  # type: ignore[arg-type]  # every subclass is one of BaseOptimizer
            self.lr,
            None,
            0.0,
        )

    def _coupled_decay(self) -> float:
        return self.weight_decay

    def _check_common(self) -> None:
        _check_lr(self.lr)
        if isinstance(self.lr, int):
            object.__setattr__(self, "lr", float(self.lr))
        _check_rate("weight_decay", self.weight_decay)
        _check_clips(self.grad_clip_norm, self.grad_clip_value)


@dataclass(frozen=True)
class SGD(_Base):
    """Stochastic gradient descent: `v = momentum v + g; weights -= lr v`, or `lr (g + momentum v)` with nesterov.

    Attributes:
        lr: the rate, a number or a schedule.
        momentum: in [0, 1).
        weight_decay: coupled L2 decay, >= 0.
        nesterov: needs momentum > 0.
        grad_clip_norm: the gradient's global norm is clipped to it.
        grad_clip_value: the gradient's elements are clipped to [-value, value].
    """

    lr: float | Schedule = 1e-3
    momentum: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    grad_clip_norm: float | None = None
    grad_clip_value: float | None = None

    def __post_init__(self) -> None:
        """Checks every field."""
        self._check_common()
        _check("momentum", self.momentum, 0 <= self.momentum < 1, "in [0, 1)")
        _check("nesterov", self.nesterov, not self.nesterov or self.momentum > 0, "False while momentum is 0")


@dataclass(frozen=True)
class Adam(_Base):
    """Adam, with bias-corrected moments.

    Attributes:
        lr: the rate, a number or a schedule.
        betas: the decay rates of the first and second moment, each in [0, 1).
        eps: added to the denominator, > 0.
        weight_decay: coupled L2 decay, >= 0.
        grad_clip_norm: the gradient's global norm is clipped to it.
        grad_clip_value: the gradient's elements are clipped to [-value, value].

    Source: arXiv:1412.6980, algorithm 1.
    """

    lr: float | Schedule = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    grad_clip_norm: float | None = None
    grad_clip_value: float | None = None

    def __post_init__(self) -> None:
        """Checks every field."""
        self._check_common()
        object.__setattr__(self, "betas", _checked_betas(self.betas))
        _check_eps(self.eps)


@dataclass(frozen=True)
class AdamW(_Base):
    """Adam with decoupled weight decay: `weights -= lr (direction + weight_decay weights)`.

    Attributes:
        lr: the rate, a number or a schedule.
        betas: the decay rates of the first and second moment, each in [0, 1).
        eps: added to the denominator, > 0.
        weight_decay: decoupled decay, >= 0.
        grad_clip_norm: the gradient's global norm is clipped to it.
        grad_clip_value: the gradient's elements are clipped to [-value, value].

    Source: arXiv:1711.05101, algorithm 2, with the rate as the schedule multiplier of both terms.
    """

    lr: float | Schedule = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    grad_clip_norm: float | None = None
    grad_clip_value: float | None = None

    def __post_init__(self) -> None:
        """Checks every field."""
        self._check_common()
        object.__setattr__(self, "betas", _checked_betas(self.betas))
        _check_eps(self.eps)

    def _coupled_decay(self) -> float:
        return 0.0


@dataclass(frozen=True)
class AdaBelief(_Base):
    """AdaBelief: the second moment is that of the gradient's deviation from its own first moment.

    `m = b1 m + (1-b1) g; s = b2 s + (1-b2) (g-m)^2 + eps_root; weights -= lr mhat / (sqrt(shat) + eps)`, with the new m
    in (g-m), and mhat and shat corrected for their bias.

    Attributes:
        lr: the rate, a number or a schedule.
        betas: the decay rates of the first and second moment, each in [0, 1).
        eps: added to the denominator, > 0.
        weight_decay: coupled L2 decay, >= 0.
        grad_clip_norm: the gradient's global norm is clipped to it.
        grad_clip_value: the gradient's elements are clipped to [-value, value].
        eps_root: added to s in its recursion, >= 0; None means eps.

    Source: arXiv:2010.07468, algorithm 2.
    """

    lr: float | Schedule = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-16
    weight_decay: float = 0.0
    grad_clip_norm: float | None = None
    grad_clip_value: float | None = None
    _: KW_ONLY
    eps_root: float | None = None

    def __post_init__(self) -> None:
        """Checks every field."""
        self._check_common()
        object.__setattr__(self, "betas", _checked_betas(self.betas))
        _check_eps(self.eps)
        _check("eps_root", self.eps_root, self.eps_root is None or self.eps_root >= 0, "None or at least 0")


BaseOptimizer = SGD | Adam | AdamW | AdaBelief


@dataclass(frozen=True)
class Lookahead:
    """Lookahead: every `sync_period` steps `slow += alpha (fast - slow)`, and fast is reset to slow.

    The moments of the base optimizer are kept across a lookahead sync. The options from `lr` on take the place of the
    base optimizer's; weight decay or a clip that is set in both places is refused.

    Attributes:
        base_optimizer: what makes the fast steps.
        sync_period: k, the fast steps from one lookahead sync to the next, >= 1.
        alpha: the slow step size, in [0, 1].
        lr: a rate that replaces the base optimizer's; None keeps that. (braintools: 0.001, which replaces it unasked.)
        weight_decay: coupled L2 decay, >= 0.
        grad_clip_norm: the gradient's global norm is clipped to it.
        grad_clip_value: the gradient's elements are clipped to [-value, value].

    Source: arXiv:1907.08610, algorithm 1.
    """

    base_optimizer: BaseOptimizer
    sync_period: int = 5
    alpha: float = 0.5
    lr: float | Schedule | None = None
    weight_decay: float = 0.0
    grad_clip_norm: float | None = None
    grad_clip_value: float | None = None

    def __post_init__(self) -> None:
        """Checks every field."""
        if not isinstance(self.base_optimizer, BaseOptimizer):
            raise TypeError(
                f"base_optimizer is {self.base_optimizer!r}: give an optimizer of kedge.optim other than Lookahead"
            )
        _check_count("sync_period", self.sync_period, minimum=1)
        _check("alpha", self.alpha, 0 <= self.alpha <= 1, "in [0, 1]")
        if self.lr is not None:
            _check_lr(self.lr)
        _check_rate("weight_decay", self.weight_decay)
        _check_clips(self.grad_clip_norm, self.grad_clip_value)
        base = self.base_optimizer.spec()
        for field in ("weight_decay", "grad_clip_norm", "grad_clip_value"):
            if getattr(self, field) and getattr(base, field):
                raise ValueError(f"{field} is set on Lookahead and on its base optimizer: set it on one of them")

    def spec(self) -> UpdateSpec:
        """This optimizer laid flat."""
        base = self.base_optimizer.spec()
        return UpdateSpec(
            base.grad_clip_norm if self.grad_clip_norm is None else self.grad_clip_norm,
            base.grad_clip_value if self.grad_clip_value is None else self.grad_clip_value,
            self.weight_decay or base.weight_decay,
            self.base_optimizer,
            base.lr if self.lr is None else float(self.lr) if isinstance(self.lr, int) else self.lr,
            self.sync_period,
            self.alpha,
        )


Optimizer = BaseOptimizer | Lookahead


def from_spec(spec: UpdateSpec) -> Optimizer:
    """An optimizer that lies flat as `spec` does, with every option on the base optimizer where that can hold it."""
    options: dict[str, Any] = {
        "lr": spec.lr,
        "grad_clip_norm": spec.grad_clip_norm,
        "grad_clip_value": spec.grad_clip_value,
    }
    outer_decay = 0.0
    if isinstance(spec.base, AdamW):
        outer_decay = spec.weight_decay
    else:
        options["weight_decay"] = spec.weight_decay
    base = replace(spec.base, **options)
    if spec.sync_period is None:
        if outer_decay:
            raise ValueError("weight_decay is coupled and AdamW's is not: set the weight_decay of AdamW itself")
        return base
    return Lookahead(base, spec.sync_period, spec.alpha, weight_decay=outer_decay)


def _grown(base: float, gamma: float, exponent: int) -> float:
    """Base * gamma ** exponent, infinite where Python's power overflows."""
    if base == 0:
        return 0.0
    try:
        return base * gamma**exponent
    except OverflowError:
        return math.inf


def _check(field: str, value: object, holds: bool, rule: str) -> None:
    finite = not isinstance(value, float) or math.isfinite(value)
    if not (holds and finite):
        raise ValueError(f"{field} is {value!r}: it must be {rule}")


def _check_count(field: str, value: object, *, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{field} is {value!r}: it must be a whole number")
    _check(field, value, value >= minimum, f"at least {minimum}")


def _check_rate(field: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{field} is {value!r}: it must be a number")
    _check(field, value, 0 <= value <= _FLOAT32_MAX, f"at least 0 and at most {_FLOAT32_MAX:.3g}, float32's greatest")


def _check_lr(lr: float | Schedule) -> None:
    if not isinstance(lr, ConstantLR | StepLR | ExponentialLR):
        if callable(getattr(lr, "rate", None)):
            raise TypeError(f"lr is {lr!r}: only the schedules of kedge.optim can travel to the server")
        _check_rate("lr", lr)  # type: ignore[arg-type]  # whatever is no number is refused there


def _check_eps(eps: float) -> None:
    # Below it float32 has only zero, and the first step would divide by it.
    _check("eps", eps, eps >= _FLOAT32_MIN_NORMAL, f"at least {_FLOAT32_MIN_NORMAL:.3g}, float32's least")


def _check_clips(norm: float | None, value: float | None) -> None:
    for field, limit in (("grad_clip_norm", norm), ("grad_clip_value", value)):
        holds = limit is None or _FLOAT32_MIN_NORMAL <= limit <= _FLOAT32_MAX
        _check(field, limit, holds, "None, or greater than 0 and within float32")


def _checked_betas(betas: tuple[float, float]) -> tuple[float, float]:
    pair = tuple(betas)
    if len(pair) != 2:
        raise ValueError(f"betas is {betas!r}: it must be a pair (beta1, beta2)")
    for beta in pair:
        _check("betas", beta, 0 <= beta < 1, "a pair of numbers in [0, 1)")
    return float(pair[0]), float(pair[1])
