"""The base optimizers that look at each tensor as a whole: its norm, its rows and columns."""

from dataclasses import dataclass
from typing import ClassVar

from kedge.optim._checks import (
    check_eps,
    check_flag,
    check_fraction,
    check_positive,
    check_rate,
    checked_betas,
    checked_pair,
)
from kedge.optim.rules import Rule
from kedge.optim.schedules import Schedule


@dataclass(frozen=True)
class Lamb(Rule):
    """LAMB: Adam's direction plus decay, `u`, in steps of the tensor's own norm: `weights -= lr |weights| / |u| * u`.

    `u = mhat / (sqrt(vhat) + eps) + weight_decay weights`. Where one of the two norms is 0, their ratio counts as 1.

    Attributes:
        lr: the rate, a number or a schedule.
        betas: the decay rates of the first and second moment, each in [0, 1).
        eps: added to the denominator, > 0.
        weight_decay: decoupled decay, inside the ratio of norms, >= 0.
        grad_clip_norm: the gradient's global norm is clipped to it.
        grad_clip_value: the gradient's elements are clipped to [-value, value].

    Source: arXiv:1904.00962, algorithm 2, with the identity for its phi.
    """

    decouples_decay: ClassVar[bool] = True

    lr: float | Schedule = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    weight_decay: float = 0.0
    grad_clip_norm: float | None = None
    grad_clip_value: float | None = None

    def _check_rule(self) -> None:
        self._set("betas", checked_betas(self.betas))
        check_eps("eps", self.eps)


@dataclass(frozen=True)
class Lars(Rule):
    """LARS: `u = trust_coefficient |weights| / (|g| + eps) * g; v = momentum v + u; weights -= lr v`.

    `g` has the decay in it. Where one of the two norms is 0, the factor of g is 1.

    Attributes:
        lr: the rate, a number or a schedule.
        momentum: in [0, 1).
        weight_decay: coupled L2 decay, >= 0.
        trust_coefficient: the size of a step relative to that of the weights, > 0.
        eps: added to the gradient's norm, > 0.
        grad_clip_norm: the gradient's global norm is clipped to it.
        grad_clip_value: the gradient's elements are clipped to [-value, value].

    Source: arXiv:1708.03888, algorithm 1, with the norm of g + decay in the denominator and the rate after the
    momentum, as optax and braintools have it.
    """

    lr: float | Schedule = 1.0
    momentum: float = 0.9
    weight_decay: float = 0.0
    trust_coefficient: float = 0.001
    eps: float = 1e-8
    grad_clip_norm: float | None = None
    grad_clip_value: float | None = None

    def _check_rule(self) -> None:
        check_fraction("momentum", self.momentum)
        check_positive("trust_coefficient", self.trust_coefficient)
        check_eps("eps", self.eps)


@dataclass(frozen=True)
class Adafactor(Rule):
    """Adafactor: the second moment of a matrix is kept as that of its rows and that of its columns.

    With `b_t = 1 - t^-decay_rate`, t from 1, rows and columns (or, where nothing is factored, every element) keep
    `b_t v + (1-b_t) mean(g^2 + eps[0])`; `u = g / sqrt(v)`, where a matrix' v is `rows columns / mean(rows)`;
    `u /= max(1, rms(u) / clip_threshold)`; with beta1 `m = beta1 m + (1-beta1) u` takes the place of u; at last
    `weights -= lr (u + weight_decay weights)`. What is factored are a tensor's two longest axes, if both have at least
    128 elements.

    Attributes:
        lr: the rate, a number or a schedule; None means 1e-3. (It is not relative to the weights' size.)
        eps: eps[0] is added to the squared gradient, > 0. eps[1], the paper's least size of weights, is unused, as in
            braintools: there are no relative rates. >= 0.
        clip_threshold: the greatest root mean square of a tensor's u, > 0. (braintools ignores it.)
        decay_rate: > 0.
        beta1: the decay rate of a momentum, not corrected for its bias, in [0, 1); None: no momentum. (braintools
            ignores it.)
        weight_decay: decoupled decay, >= 0.
        factored: False: every element's second moment is kept.
        grad_clip_norm: the gradient's global norm is clipped to it.
        grad_clip_value: the gradient's elements are clipped to [-value, value].

    Source: arXiv:1804.04235, algorithms 4 and 5.
    """

    decouples_decay: ClassVar[bool] = True

    lr: float | Schedule | None = None  # type: ignore[assignment]  # a rate or a schedule, once it is constructed
    eps: tuple[float, float] = (1e-30, 1e-3)
    clip_threshold: float = 1.0
    decay_rate: float = 0.8
    beta1: float | None = None
    weight_decay: float = 0.0
    factored: bool = True
    grad_clip_norm: float | None = None
    grad_clip_value: float | None = None

    def __post_init__(self) -> None:
        """Checks every field."""
        if self.lr is None:
            self._set("lr", 1e-3)
        super().__post_init__()

    def _check_rule(self) -> None:
        self._set("eps", checked_pair("eps", self.eps, "(of the squared gradient, of the weights' size)"))
        check_eps("eps", self.eps[0])
        check_rate("eps", self.eps[1])
        check_positive("clip_threshold", self.clip_threshold)
        check_positive("decay_rate", self.decay_rate)
        if self.beta1 is not None:
            check_fraction("beta1", self.beta1)
        check_flag("factored", self.factored)


@dataclass(frozen=True)
class Novograd(Rule):
    """NovoGrad: `v = b2 v + (1-b2) |g|^2` for a whole tensor; `m = b1 m + g / (sqrt(v) + eps) + weight_decay weights`.

    `weights -= lr m`. The first step's v is `|g|^2`.

    Attributes:
        lr: the rate, a number or a schedule.
        betas: the decay rates of the first and second moment, each in [0, 1).
        eps: added to the denominator, > 0.
        weight_decay: decoupled decay, inside the first moment, >= 0.
        grad_clip_norm: the gradient's global norm is clipped to it.
        grad_clip_value: the gradient's elements are clipped to [-value, value].

    Source: arXiv:1905.11286, algorithm 1.
    """

    decouples_decay: ClassVar[bool] = True

    lr: float | Schedule = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    grad_clip_norm: float | None = None
    grad_clip_value: float | None = None

    def _check_rule(self) -> None:
        self._set("betas", checked_betas(self.betas))
        check_eps("eps", self.eps)
