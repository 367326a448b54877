"""Schedules along half a cosine, and the warm-ups."""

from dataclasses import dataclass

from kedge.optim._checks import check
from kedge.optim.schedules.base import TickingSchedule, blend, check_epochs, check_rates, half_cosine


@dataclass(frozen=True, repr=False)
class CosineAnnealingLR(TickingSchedule):
    """From `base_lr` along half a cosine to `eta_min`, which is reached at epoch `T_max` and kept.

    It is kept as in braintools; PyTorch's schedule rises again.

    Attributes:
        base_lr: the first rate, >= 0.
        T_max: epochs, >= 1.
        eta_min: the last rate, >= 0; it may be greater than base_lr.
        last_epoch: the epoch to begin at; this, `steps_per_epoch` and `tick` as in `Schedule`.

    Source: arXiv:1608.03983, equation 5, without restarts.
    """

    base_lr: float = 1e-3
    T_max: int = 50
    eta_min: float = 0
    last_epoch: int = 0

    def _check(self) -> None:
        check_rates(self, "base_lr", "eta_min")
        check_epochs(self, "T_max", minimum=1)

    def _rate(self, epoch: int) -> float:
        return half_cosine(self.base_lr, self.eta_min, min(epoch, self.T_max) / self.T_max)


@dataclass(frozen=True, repr=False)
class CosineAnnealingWarmRestarts(TickingSchedule):
    """From `base_lr` along half a cosine to `eta_min`, again and again, each time `T_mult` times as long.

    Attributes:
        base_lr: the rate of a start, >= 0.
        T_0: epochs of the first time, >= 1.
        T_mult: a whole number, >= 1.
        eta_min: the rate that each time ends before, >= 0; it may be greater than base_lr.
        last_epoch: the epoch to begin at; this, `steps_per_epoch` and `tick` as in `Schedule`.

    Source: arXiv:1608.03983, equation 5.
    """

    base_lr: float = 1e-3
    T_0: int = 10
    T_mult: int = 1
    eta_min: float = 0
    last_epoch: int = 0

    def _check(self) -> None:
        check_rates(self, "base_lr", "eta_min")
        check_epochs(self, "T_0", "T_mult", minimum=1)

    def _rate(self, epoch: int) -> float:
        since, length = epoch % self.T_0, self.T_0
        if self.T_mult > 1:
            # At most 64 turns, and exact where a logarithm would round at the restarts.
            since = epoch
            while since >= length:
                since -= length
                length *= self.T_mult
        return half_cosine(self.base_lr, self.eta_min, since / length)


@dataclass(frozen=True, repr=False)
class WarmupScheduler(TickingSchedule):
    """Linearly from `warmup_start_lr` to `base_lr`, then `base_lr`.

    Attributes:
        base_lr: the last rate, >= 0.
        warmup_epochs: epochs from one to the other, >= 0.
        warmup_start_lr: the first rate, >= 0; it may be greater than base_lr.
        last_epoch: the epoch to begin at; this, `steps_per_epoch` and `tick` as in `Schedule`.
    """

    base_lr: float = 1e-3
    warmup_epochs: int = 5
    warmup_start_lr: float = 0.0
    last_epoch: int = 0

    def _check(self) -> None:
        check_rates(self, "base_lr", "warmup_start_lr")
        check_epochs(self, "warmup_epochs")

    def _rate(self, epoch: int) -> float:
        if epoch >= self.warmup_epochs:
            return self.base_lr
        return blend(self.warmup_start_lr, self.base_lr, epoch / self.warmup_epochs)


@dataclass(frozen=True, repr=False)
class WarmupCosineSchedule(TickingSchedule):
    """Linearly from `warmup_start_lr` to `base_lr`, then along half a cosine to `eta_min`, which is kept.

    Attributes:
        base_lr: the rate after the warm-up, >= 0.
        warmup_steps: epochs of the warm-up, >= 0.
        total_steps: the epoch at which `eta_min` is reached, >= 1 and >= warmup_steps.
        warmup_start_lr: the first rate, >= 0; it may be greater than base_lr.
        eta_min: the last rate, >= 0; it may be greater than base_lr.
        last_epoch: the epoch to begin at; this, `steps_per_epoch` and `tick` as in `Schedule`.
    """

    base_lr: float = 1e-3
    warmup_steps: int = 1000
    total_steps: int = 10000
    warmup_start_lr: float = 0.0
    eta_min: float = 0.0
    last_epoch: int = 0

    def _check(self) -> None:
        check_rates(self, "base_lr", "warmup_start_lr", "eta_min")
        check_epochs(self, "warmup_steps")
        check_epochs(self, "total_steps", minimum=1)
        least = self.warmup_steps
        check("total_steps", self.total_steps, self.total_steps >= least, f"at least warmup_steps, which is {least}")

    def _rate(self, epoch: int) -> float:
        if epoch < self.warmup_steps:
            return blend(self.warmup_start_lr, self.base_lr, epoch / self.warmup_steps)
        span = max(self.total_steps - self.warmup_steps, 1)
        return half_cosine(self.base_lr, self.eta_min, min((epoch - self.warmup_steps) / span, 1.0))
