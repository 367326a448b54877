"""Learning rates that change as a run goes on: pure functions of a tick, but for `ReduceLROnPlateau`.

A tick is what the literature calls an epoch or an iteration of the scheduler: by default one applied step, with
`steps_per_epoch=n` every n steps, with `tick="manual"` whenever the run is told so. The rate of the first step is that
of epoch `last_epoch`. Who counts the ticks is `kedge.optim.controls`.

Names, arguments and defaults are those of `braintools.optim`, but that `base_lr` is one number: a parameter group has a
schedule of its own. Rates are computed in float64, and none is negative or more than float32 holds.
"""

from kedge.optim.schedules.annealing import (
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    WarmupCosineSchedule,
    WarmupScheduler,
)
from kedge.optim.schedules.base import Schedule, Tick
from kedge.optim.schedules.composite import ChainedScheduler, Composite, SequentialLR
from kedge.optim.schedules.cyclic import CyclicLR, OneCycleLR
from kedge.optim.schedules.decay import ExponentialDecayLR, ExponentialLR, MultiStepLR, PolynomialLR, StepLR
from kedge.optim.schedules.plateau import PlateauState, ReduceLROnPlateau
from kedge.optim.schedules.simple import ConstantLR, LinearLR, PiecewiseConstantSchedule

__all__ = [
    "ChainedScheduler",
    "Composite",
    "ConstantLR",
    "CosineAnnealingLR",
    "CosineAnnealingWarmRestarts",
    "CyclicLR",
    "ExponentialDecayLR",
    "ExponentialLR",
    "LinearLR",
    "MultiStepLR",
    "OneCycleLR",
    "PiecewiseConstantSchedule",
    "PlateauState",
    "PolynomialLR",
    "ReduceLROnPlateau",
    "Schedule",
    "SequentialLR",
    "StepLR",
    "Tick",
    "WarmupCosineSchedule",
    "WarmupScheduler",
]
