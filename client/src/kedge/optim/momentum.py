"""The base optimizers that keep at most a momentum: the gradient's own size is the step's, or its sign alone."""

from dataclasses import dataclass
from typing import ClassVar

from kedge.optim._checks import check, check_flag, check_fraction, checked_betas
from kedge.optim.rules import Rule
from kedge.optim.schedules import Schedule


@dataclass(frozen=True)
class SGD(Rule):
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

    def _check_rule(self) -> None:
        check_fraction("momentum", self.momentum)
        check_flag("nesterov", self.nesterov)
        check("nesterov", self.nesterov, not self.nesterov or self.momentum > 0, "False while momentum is 0")


@dataclass(frozen=True)
class _WithMomentum(Rule):
    """Those that are a momentum and nothing else."""

    lr: float | Schedule = 1e-3
    momentum: float = 0.9
    weight_decay: float = 0.0
    grad_clip_norm: float | None = None
    grad_clip_value: float | None = None

    def _check_rule(self) -> None:
        check_fraction("momentum", self.momentum)


@dataclass(frozen=True)
class Momentum(_WithMomentum):
    """The heavy ball: `v = momentum v + g; weights -= lr v`. Its fields are those of `SGD` but for nesterov."""


@dataclass(frozen=True)
class MomentumNesterov(_WithMomentum):
    """Nesterov's momentum: `v = momentum v + g; weights -= lr (g + momentum v)`.

    Its fields are those of `SGD` but for nesterov.
    """


@dataclass(frozen=True)
class Lion(Rule):
    """Lion: `weights -= lr (sign(b1 m + (1-b1) g) + weight_decay weights)`, and then `m = b2 m + (1-b2) g`.

    Attributes:
        lr: the rate, a number or a schedule.
        betas: b1 mixes the momentum into the direction, b2 is the momentum's decay rate; each in [0, 1).
        weight_decay: decoupled decay, >= 0.
        grad_clip_norm: the gradient's global norm is clipped to it.
        grad_clip_value: the gradient's elements are clipped to [-value, value].

    Source: arXiv:2302.06675, program 1.
    """

    decouples_decay: ClassVar[bool] = True

    lr: float | Schedule = 1e-4
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    grad_clip_norm: float | None = None
    grad_clip_value: float | None = None

    def _check_rule(self) -> None:
        self._set("betas", checked_betas(self.betas))
