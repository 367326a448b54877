"""The base optimizers that scale each element's step by the history of its own gradient."""

from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

from kedge.optim._checks import check_eps, check_flag, check_fraction, check_positive, check_rate, checked_betas
from kedge.optim.rules import Rule
from kedge.optim.schedules import Schedule


class _Moments(Rule):
    """Those with two moments."""

    betas: tuple[float, float]
    eps: float

    def _check_rule(self) -> None:
        self._set("betas", checked_betas(self.betas))
        check_eps("eps", self.eps)


@dataclass(frozen=True)
class Adam(_Moments):
    """Adam: `m = b1 m + (1-b1) g; v = b2 v + (1-b2) g^2; weights -= lr mhat / (sqrt(vhat) + eps)`.

    What follows `betas` is given by keyword: braintools has the deprecated `beta1` and `beta2` there, which this one
    has not.

    Attributes:
        lr: the rate, a number or a schedule.
        betas: the decay rates of the first and second moment, each in [0, 1).
        eps: added to the denominator, > 0.
        weight_decay: coupled L2 decay, >= 0.
        amsgrad: divide by the greatest vhat so far. (optax's and braintools' form: the maximum is that of the corrected
            vhat, where torch corrects the maximum of v.)
        grad_clip_norm: the gradient's global norm is clipped to it.
        grad_clip_value: the gradient's elements are clipped to [-value, value].

    Source: arXiv:1412.6980, algorithm 1; for amsgrad arXiv:1904.09237, algorithm 2, with both corrections.
    """

    lr: float | Schedule = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    _: KW_ONLY
    eps: float = 1e-8
    weight_decay: float = 0.0
    amsgrad: bool = False
    grad_clip_norm: float | None = None
    grad_clip_value: float | None = None

    def _check_rule(self) -> None:
        super()._check_rule()
        check_flag("amsgrad", self.amsgrad)


@dataclass(frozen=True)
class AdamW(_Moments):
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

    decouples_decay: ClassVar[bool] = True

    lr: float | Schedule = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    grad_clip_norm: float | None = None
    grad_clip_value: float | None = None


@dataclass(frozen=True)
class Nadam(_Moments):
    """Adam with Nesterov's momentum, whose strength grows: `mu_t = b1 (1 - 0.96^(t momentum_decay) / 2)`.

    `weights -= lr (mu_(t+1) m / (1 - P_t mu_(t+1)) + (1 - mu_t) g / (1 - P_t)) / (sqrt(vhat) + eps)` with Adam's
    moments m and v, and `P_t` the product of mu_1 to mu_t.

    Attributes:
        lr: the rate, a number or a schedule.
        betas: the decay rates of the first and second moment, each in [0, 1).
        eps: added to the denominator, > 0.
        weight_decay: coupled L2 decay, >= 0.
        momentum_decay: how fast the momentum comes to its full strength, >= 0.
        grad_clip_norm: the gradient's global norm is clipped to it.
        grad_clip_value: the gradient's elements are clipped to [-value, value].

    Source: Dozat 2016, "Incorporating Nesterov momentum into Adam", as torch.optim.NAdam has it.
    """

    lr: float | Schedule = 2e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    momentum_decay: float = 4e-3
    grad_clip_norm: float | None = None
    grad_clip_value: float | None = None

    def _check_rule(self) -> None:
        super()._check_rule()
        check_rate("momentum_decay", self.momentum_decay)


@dataclass(frozen=True)
class RAdam(_Moments):
    """Adam with its early steps rectified: `weights -= lr r_t mhat / (sqrt(vhat) + eps)`, or `lr mhat` at first.

    `rho_inf = 2 / (1-b2) - 1` and `rho_t = rho_inf - 2 t b2^t / (1 - b2^t)`; while `rho_t < 5` the step is `lr mhat`,
    and then `r_t^2 = (rho_t-4) (rho_t-2) rho_inf / ((rho_inf-4) (rho_inf-2) rho_t)`.

    Attributes:
        lr: the rate, a number or a schedule.
        betas: the decay rates of the first and second moment, each in [0, 1).
        eps: added to the denominator, > 0.
        weight_decay: coupled L2 decay, >= 0.
        grad_clip_norm: the gradient's global norm is clipped to it.
        grad_clip_value: the gradient's elements are clipped to [-value, value].

    Source: arXiv:1908.03265, algorithm 2, with the bound of 5 in place of 4, as optax and torch have it.
    """

    lr: float | Schedule = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    grad_clip_norm: float | None = None
    grad_clip_value: float | None = None


@dataclass(frozen=True)
class Adamax(_Moments):
    """Adam in the infinity norm: `u = max(b2 u, |g| + eps); weights -= lr mhat / u`.

    Attributes:
        lr: the rate, a number or a schedule.
        betas: the decay rates of the first moment and of the maximum, each in [0, 1).
        eps: added to the gradient's magnitude, > 0.
        weight_decay: coupled L2 decay, >= 0.
        grad_clip_norm: the gradient's global norm is clipped to it.
        grad_clip_value: the gradient's elements are clipped to [-value, value].

    Source: arXiv:1412.6980, algorithm 2, with eps, which keeps the first step from dividing by zero.
    """

    lr: float | Schedule = 2e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    grad_clip_norm: float | None = None
    grad_clip_value: float | None = None


@dataclass(frozen=True)
class Yogi(_Moments):
    """Adam whose second moment grows no faster than the gradient: `v -= (1-b2) sign(v - g^2) g^2`.

    `m = b1 m + (1-b1) g; weights -= lr mhat / (sqrt(vhat) + eps)`. Both moments begin at 1e-6.

    Attributes:
        lr: the rate, a number or a schedule.
        betas: the decay rates of the first and second moment, each in [0, 1).
        eps: added to the denominator, > 0.
        weight_decay: coupled L2 decay, >= 0.
        grad_clip_norm: the gradient's global norm is clipped to it.
        grad_clip_value: the gradient's elements are clipped to [-value, value].

    Source: Zaheer et al. 2018, "Adaptive methods for nonconvex optimization", algorithm 2, with optax's corrections for
    bias and its initial moments.
    """

    lr: float | Schedule = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-3
    weight_decay: float = 0.0
    grad_clip_norm: float | None = None
    grad_clip_value: float | None = None


@dataclass(frozen=True)
class AdaBelief(_Moments):
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
        max_direction: the elements of the direction, mhat / (sqrt(shat) + eps), are clipped to [-value, value], > 0;
            None: they are not. Where gradients hardly change the direction grows without bound: to 185 after 5,000
            steps of one gradient, with the defaults.

    Source: arXiv:2010.07468, algorithm 2; max_direction is kedge's own.
    """

    lr: float | Schedule = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-16
    weight_decay: float = 0.0
    grad_clip_norm: float | None = None
    grad_clip_value: float | None = None
    _: KW_ONLY
    eps_root: float | None = None
    max_direction: float | None = None

    def _check_rule(self) -> None:
        super()._check_rule()
        if self.eps_root is not None:
            check_rate("eps_root", self.eps_root)
        if self.max_direction is not None:
            check_positive("max_direction", self.max_direction)


@dataclass(frozen=True)
class RMSprop(Rule):
    """RMSprop: `v = alpha v + (1-alpha) g^2; weights -= lr g / sqrt(v + eps)`.

    Attributes:
        lr: the rate, a number or a schedule.
        alpha: the decay rate of v, in [0, 1).
        eps: added to v inside the root, > 0. (braintools' and optax's form; torch adds it outside.)
        weight_decay: coupled L2 decay, >= 0.
        momentum: of a heavy ball over the scaled gradients, in [0, 1).
        centered: divide by the standard deviation: `a = alpha a + (1-alpha) g` and `sqrt(v - a^2 + eps)`.
        grad_clip_norm: the gradient's global norm is clipped to it.
        grad_clip_value: the gradient's elements are clipped to [-value, value].

    Source: Tieleman and Hinton 2012, lecture 6.5; for centered arXiv:1308.0850, equations 38 to 40.
    """

    lr: float | Schedule = 1e-2
    alpha: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.0
    momentum: float = 0.0
    centered: bool = False
    grad_clip_norm: float | None = None
    grad_clip_value: float | None = None

    def _check_rule(self) -> None:
        check_fraction("alpha", self.alpha)
        check_eps("eps", self.eps)
        check_fraction("momentum", self.momentum)
        check_flag("centered", self.centered)


@dataclass(frozen=True)
class Adagrad(Rule):
    """Adagrad: `s = s + g^2; weights -= lr / (1 + t lr_decay) * g / sqrt(s + eps)`, t the number of steps before.

    Attributes:
        lr: the rate, a number or a schedule.
        lr_decay: how fast the rate falls besides, >= 0.
        weight_decay: coupled L2 decay, >= 0.
        initial_accumulator_value: of s, >= 0.
        eps: added to s inside the root, > 0. (braintools' and optax's form; torch adds it outside.)
        grad_clip_norm: the gradient's global norm is clipped to it.
        grad_clip_value: the gradient's elements are clipped to [-value, value].

    Source: Duchi, Hazan and Singer 2011, JMLR 12, figure 1.
    """

    lr: float | Schedule = 1e-2
    lr_decay: float = 0.0
    weight_decay: float = 0.0
    initial_accumulator_value: float = 0.0
    eps: float = 1e-10
    grad_clip_norm: float | None = None
    grad_clip_value: float | None = None

    def _check_rule(self) -> None:
        check_rate("lr_decay", self.lr_decay)
        check_rate("initial_accumulator_value", self.initial_accumulator_value)
        check_eps("eps", self.eps)


@dataclass(frozen=True)
class Adadelta(Rule):
    """Adadelta: `v = rho v + (1-rho) g^2; d = g sqrt(u + eps) / sqrt(v + eps); weights -= lr d`.

    Then `u = rho u + (1-rho) d^2`.

    Attributes:
        lr: the rate, a number or a schedule.
        rho: the decay rate of u and v, in [0, 1).
        eps: added inside both roots, > 0.
        weight_decay: coupled L2 decay, >= 0.
        grad_clip_norm: the gradient's global norm is clipped to it.
        grad_clip_value: the gradient's elements are clipped to [-value, value].

    Source: arXiv:1212.5701, algorithm 1.
    """

    lr: float | Schedule = 1.0
    rho: float = 0.9
    eps: float = 1e-6
    weight_decay: float = 0.0
    grad_clip_norm: float | None = None
    grad_clip_value: float | None = None

    def _check_rule(self) -> None:
        check_fraction("rho", self.rho)
        check_eps("eps", self.eps)
