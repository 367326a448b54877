"""Optimizers, schedules and parameter groups as plain values: what a run is created with. The server does the sums.

Names, arguments and defaults are those of `braintools.optim`; deviations are named where they are. Every value is
checked when it is constructed, and the `ValueError` names the field.

Example:
    >>> from kedge import optim
    >>> optim.Lookahead(optim.AdaBelief(lr=optim.StepLR(base_lr=1e-3, step_size=1000)), sync_period=5, alpha=0.5)
    Lookahead(base_optimizer=AdaBelief(lr=StepLR(base_lr=0.001, step_size=1000, gamma=0.1, ...
"""

from kedge.optim.adaptive import (
    AdaBelief,
    Adadelta,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    Nadam,
    RAdam,
    RMSprop,
    Yogi,
)
from kedge.optim.alias import Optax
from kedge.optim.groups import Group
from kedge.optim.layerwise import Adafactor, Lamb, Lars, Novograd
from kedge.optim.lookahead import Lookahead, Optimizer, from_spec
from kedge.optim.momentum import SGD, Lion, Momentum, MomentumNesterov
from kedge.optim.rules import Rule
from kedge.optim.schedules import (
    ChainedScheduler,
    ConstantLR,
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    CyclicLR,
    ExponentialDecayLR,
    ExponentialLR,
    LinearLR,
    MultiStepLR,
    OneCycleLR,
    PiecewiseConstantSchedule,
    PolynomialLR,
    ReduceLROnPlateau,
    Schedule,
    SequentialLR,
    StepLR,
    WarmupCosineSchedule,
    WarmupScheduler,
)
from kedge.optim.spec import Settings, UpdateSpec

__all__ = [
    "SGD",
    "AdaBelief",
    "Adadelta",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "ChainedScheduler",
    "ConstantLR",
    "CosineAnnealingLR",
    "CosineAnnealingWarmRestarts",
    "CyclicLR",
    "ExponentialDecayLR",
    "ExponentialLR",
    "Group",
    "Lamb",
    "Lars",
    "LinearLR",
    "Lion",
    "Lookahead",
    "Momentum",
    "MomentumNesterov",
    "MultiStepLR",
    "Nadam",
    "Novograd",
    "OneCycleLR",
    "Optax",
    "Optimizer",
    "PiecewiseConstantSchedule",
    "PolynomialLR",
    "RAdam",
    "RMSprop",
    "ReduceLROnPlateau",
    "Rule",
    "Schedule",
    "SequentialLR",
    "Settings",
    "StepLR",
    "UpdateSpec",
    "WarmupCosineSchedule",
    "WarmupScheduler",
    "Yogi",
    "from_spec",
]
