from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Tick(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TICK_UNSPECIFIED: _ClassVar[Tick]
    TICK_STEP: _ClassVar[Tick]
    TICK_MANUAL: _ClassVar[Tick]
TICK_UNSPECIFIED: Tick
TICK_STEP: Tick
TICK_MANUAL: Tick

class LearningRate(_message.Message):
    __slots__ = ("value", "constant_lr", "step_lr", "exponential_lr", "multi_step_lr", "exponential_decay_lr", "cosine_annealing_lr", "cosine_annealing_warm_restarts", "polynomial_lr", "linear_lr", "cyclic_lr", "one_cycle_lr", "warmup_scheduler", "warmup_cosine_schedule", "piecewise_constant_schedule", "chained_scheduler", "sequential_lr", "reduce_lr_on_plateau", "steps_per_epoch", "tick", "last_epoch")
    VALUE_FIELD_NUMBER: _ClassVar[int]
    CONSTANT_LR_FIELD_NUMBER: _ClassVar[int]
    STEP_LR_FIELD_NUMBER: _ClassVar[int]
    EXPONENTIAL_LR_FIELD_NUMBER: _ClassVar[int]
    MULTI_STEP_LR_FIELD_NUMBER: _ClassVar[int]
    EXPONENTIAL_DECAY_LR_FIELD_NUMBER: _ClassVar[int]
    COSINE_ANNEALING_LR_FIELD_NUMBER: _ClassVar[int]
    COSINE_ANNEALING_WARM_RESTARTS_FIELD_NUMBER: _ClassVar[int]
    POLYNOMIAL_LR_FIELD_NUMBER: _ClassVar[int]
    LINEAR_LR_FIELD_NUMBER: _ClassVar[int]
    CYCLIC_LR_FIELD_NUMBER: _ClassVar[int]
    ONE_CYCLE_LR_FIELD_NUMBER: _ClassVar[int]
    WARMUP_SCHEDULER_FIELD_NUMBER: _ClassVar[int]
    WARMUP_COSINE_SCHEDULE_FIELD_NUMBER: _ClassVar[int]
    PIECEWISE_CONSTANT_SCHEDULE_FIELD_NUMBER: _ClassVar[int]
    CHAINED_SCHEDULER_FIELD_NUMBER: _ClassVar[int]
    SEQUENTIAL_LR_FIELD_NUMBER: _ClassVar[int]
    REDUCE_LR_ON_PLATEAU_FIELD_NUMBER: _ClassVar[int]
    STEPS_PER_EPOCH_FIELD_NUMBER: _ClassVar[int]
    TICK_FIELD_NUMBER: _ClassVar[int]
    LAST_EPOCH_FIELD_NUMBER: _ClassVar[int]
    value: float
    constant_lr: ConstantLR
    step_lr: StepLR
    exponential_lr: ExponentialLR
    multi_step_lr: MultiStepLR
    exponential_decay_lr: ExponentialDecayLR
    cosine_annealing_lr: CosineAnnealingLR
    cosine_annealing_warm_restarts: CosineAnnealingWarmRestarts
    polynomial_lr: PolynomialLR
    linear_lr: LinearLR
    cyclic_lr: CyclicLR
    one_cycle_lr: OneCycleLR
    warmup_scheduler: WarmupScheduler
    warmup_cosine_schedule: WarmupCosineSchedule
    piecewise_constant_schedule: PiecewiseConstantSchedule
    chained_scheduler: ChainedScheduler
    sequential_lr: SequentialLR
    reduce_lr_on_plateau: ReduceLROnPlateau
    steps_per_epoch: int
    tick: Tick
    last_epoch: int
    def __init__(self, value: _Optional[float] = ..., constant_lr: _Optional[_Union[ConstantLR, _Mapping]] = ..., step_lr: _Optional[_Union[StepLR, _Mapping]] = ..., exponential_lr: _Optional[_Union[ExponentialLR, _Mapping]] = ..., multi_step_lr: _Optional[_Union[MultiStepLR, _Mapping]] = ..., exponential_decay_lr: _Optional[_Union[ExponentialDecayLR, _Mapping]] = ..., cosine_annealing_lr: _Optional[_Union[CosineAnnealingLR, _Mapping]] = ..., cosine_annealing_warm_restarts: _Optional[_Union[CosineAnnealingWarmRestarts, _Mapping]] = ..., polynomial_lr: _Optional[_Union[PolynomialLR, _Mapping]] = ..., linear_lr: _Optional[_Union[LinearLR, _Mapping]] = ..., cyclic_lr: _Optional[_Union[CyclicLR, _Mapping]] = ..., one_cycle_lr: _Optional[_Union[OneCycleLR, _Mapping]] = ..., warmup_scheduler: _Optional[_Union[WarmupScheduler, _Mapping]] = ..., warmup_cosine_schedule: _Optional[_Union[WarmupCosineSchedule, _Mapping]] = ..., piecewise_constant_schedule: _Optional[_Union[PiecewiseConstantSchedule, _Mapping]] = ..., chained_scheduler: _Optional[_Union[ChainedScheduler, _Mapping]] = ..., sequential_lr: _Optional[_Union[SequentialLR, _Mapping]] = ..., reduce_lr_on_plateau: _Optional[_Union[ReduceLROnPlateau, _Mapping]] = ..., steps_per_epoch: _Optional[int] = ..., tick: _Optional[_Union[Tick, str]] = ..., last_epoch: _Optional[int] = ...) -> None: ...

class ConstantLR(_message.Message):
    __slots__ = ("base_lr", "factor", "total_iters")
    BASE_LR_FIELD_NUMBER: _ClassVar[int]
    FACTOR_FIELD_NUMBER: _ClassVar[int]
    TOTAL_ITERS_FIELD_NUMBER: _ClassVar[int]
    base_lr: float
    factor: float
    total_iters: int
    def __init__(self, base_lr: _Optional[float] = ..., factor: _Optional[float] = ..., total_iters: _Optional[int] = ...) -> None: ...

class StepLR(_message.Message):
    __slots__ = ("base_lr", "step_size", "gamma")
    BASE_LR_FIELD_NUMBER: _ClassVar[int]
    STEP_SIZE_FIELD_NUMBER: _ClassVar[int]
    GAMMA_FIELD_NUMBER: _ClassVar[int]
    base_lr: float
    step_size: int
    gamma: float
    def __init__(self, base_lr: _Optional[float] = ..., step_size: _Optional[int] = ..., gamma: _Optional[float] = ...) -> None: ...

class MultiStepLR(_message.Message):
    __slots__ = ("base_lr", "milestones", "gamma")
    BASE_LR_FIELD_NUMBER: _ClassVar[int]
    MILESTONES_FIELD_NUMBER: _ClassVar[int]
    GAMMA_FIELD_NUMBER: _ClassVar[int]
    base_lr: float
    milestones: _containers.RepeatedScalarFieldContainer[int]
    gamma: float
    def __init__(self, base_lr: _Optional[float] = ..., milestones: _Optional[_Iterable[int]] = ..., gamma: _Optional[float] = ...) -> None: ...

class ExponentialLR(_message.Message):
    __slots__ = ("base_lr", "gamma")
    BASE_LR_FIELD_NUMBER: _ClassVar[int]
    GAMMA_FIELD_NUMBER: _ClassVar[int]
    base_lr: float
    gamma: float
    def __init__(self, base_lr: _Optional[float] = ..., gamma: _Optional[float] = ...) -> None: ...

class ExponentialDecayLR(_message.Message):
    __slots__ = ("base_lr", "decay_steps", "decay_rate", "transition_begin", "staircase", "end_value")
    BASE_LR_FIELD_NUMBER: _ClassVar[int]
    DECAY_STEPS_FIELD_NUMBER: _ClassVar[int]
    DECAY_RATE_FIELD_NUMBER: _ClassVar[int]
    TRANSITION_BEGIN_FIELD_NUMBER: _ClassVar[int]
    STAIRCASE_FIELD_NUMBER: _ClassVar[int]
    END_VALUE_FIELD_NUMBER: _ClassVar[int]
    base_lr: float
    decay_steps: int
    decay_rate: float
    transition_begin: int
    staircase: bool
    end_value: float
    def __init__(self, base_lr: _Optional[float] = ..., decay_steps: _Optional[int] = ..., decay_rate: _Optional[float] = ..., transition_begin: _Optional[int] = ..., staircase: bool = ..., end_value: _Optional[float] = ...) -> None: ...

class CosineAnnealingLR(_message.Message):
    __slots__ = ("base_lr", "t_max", "eta_min")
    BASE_LR_FIELD_NUMBER: _ClassVar[int]
    T_MAX_FIELD_NUMBER: _ClassVar[int]
    ETA_MIN_FIELD_NUMBER: _ClassVar[int]
    base_lr: float
    t_max: int
    eta_min: float
    def __init__(self, base_lr: _Optional[float] = ..., t_max: _Optional[int] = ..., eta_min: _Optional[float] = ...) -> None: ...

class CosineAnnealingWarmRestarts(_message.Message):
    __slots__ = ("base_lr", "t_0", "t_mult", "eta_min")
    BASE_LR_FIELD_NUMBER: _ClassVar[int]
    T_0_FIELD_NUMBER: _ClassVar[int]
    T_MULT_FIELD_NUMBER: _ClassVar[int]
    ETA_MIN_FIELD_NUMBER: _ClassVar[int]
    base_lr: float
    t_0: int
    t_mult: int
    eta_min: float
    def __init__(self, base_lr: _Optional[float] = ..., t_0: _Optional[int] = ..., t_mult: _Optional[int] = ..., eta_min: _Optional[float] = ...) -> None: ...

class PolynomialLR(_message.Message):
    __slots__ = ("base_lr", "total_iters", "power")
    BASE_LR_FIELD_NUMBER: _ClassVar[int]
    TOTAL_ITERS_FIELD_NUMBER: _ClassVar[int]
    POWER_FIELD_NUMBER: _ClassVar[int]
    base_lr: float
    total_iters: int
    power: float
    def __init__(self, base_lr: _Optional[float] = ..., total_iters: _Optional[int] = ..., power: _Optional[float] = ...) -> None: ...

class LinearLR(_message.Message):
    __slots__ = ("base_lr", "start_factor", "end_factor", "total_iters")
    BASE_LR_FIELD_NUMBER: _ClassVar[int]
    START_FACTOR_FIELD_NUMBER: _ClassVar[int]
    END_FACTOR_FIELD_NUMBER: _ClassVar[int]
    TOTAL_ITERS_FIELD_NUMBER: _ClassVar[int]
    base_lr: float
    start_factor: float
    end_factor: float
    total_iters: int
    def __init__(self, base_lr: _Optional[float] = ..., start_factor: _Optional[float] = ..., end_factor: _Optional[float] = ..., total_iters: _Optional[int] = ...) -> None: ...

class CyclicLR(_message.Message):
    __slots__ = ("base_lr", "max_lr", "step_size_up", "step_size_down", "mode", "gamma")
    class Mode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        MODE_UNSPECIFIED: _ClassVar[CyclicLR.Mode]
        MODE_TRIANGULAR: _ClassVar[CyclicLR.Mode]
        MODE_TRIANGULAR2: _ClassVar[CyclicLR.Mode]
        MODE_EXP_RANGE: _ClassVar[CyclicLR.Mode]
    MODE_UNSPECIFIED: CyclicLR.Mode
    MODE_TRIANGULAR: CyclicLR.Mode
    MODE_TRIANGULAR2: CyclicLR.Mode
    MODE_EXP_RANGE: CyclicLR.Mode
    BASE_LR_FIELD_NUMBER: _ClassVar[int]
    MAX_LR_FIELD_NUMBER: _ClassVar[int]
    STEP_SIZE_UP_FIELD_NUMBER: _ClassVar[int]
    STEP_SIZE_DOWN_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    GAMMA_FIELD_NUMBER: _ClassVar[int]
    base_lr: float
    max_lr: float
    step_size_up: int
    step_size_down: int
    mode: CyclicLR.Mode
    gamma: float
    def __init__(self, base_lr: _Optional[float] = ..., max_lr: _Optional[float] = ..., step_size_up: _Optional[int] = ..., step_size_down: _Optional[int] = ..., mode: _Optional[_Union[CyclicLR.Mode, str]] = ..., gamma: _Optional[float] = ...) -> None: ...

class OneCycleLR(_message.Message):
    __slots__ = ("max_lr", "total_steps", "pct_start", "anneal_strategy", "div_factor", "final_div_factor")
    class AnnealStrategy(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        ANNEAL_STRATEGY_UNSPECIFIED: _ClassVar[OneCycleLR.AnnealStrategy]
        ANNEAL_STRATEGY_COS: _ClassVar[OneCycleLR.AnnealStrategy]
        ANNEAL_STRATEGY_LINEAR: _ClassVar[OneCycleLR.AnnealStrategy]
    ANNEAL_STRATEGY_UNSPECIFIED: OneCycleLR.AnnealStrategy
    ANNEAL_STRATEGY_COS: OneCycleLR.AnnealStrategy
    ANNEAL_STRATEGY_LINEAR: OneCycleLR.AnnealStrategy
    MAX_LR_FIELD_NUMBER: _ClassVar[int]
    TOTAL_STEPS_FIELD_NUMBER: _ClassVar[int]
    PCT_START_FIELD_NUMBER: _ClassVar[int]
    ANNEAL_STRATEGY_FIELD_NUMBER: _ClassVar[int]
    DIV_FACTOR_FIELD_NUMBER: _ClassVar[int]
    FINAL_DIV_FACTOR_FIELD_NUMBER: _ClassVar[int]
    max_lr: float
    total_steps: int
    pct_start: float
    anneal_strategy: OneCycleLR.AnnealStrategy
    div_factor: float
    final_div_factor: float
    def __init__(self, max_lr: _Optional[float] = ..., total_steps: _Optional[int] = ..., pct_start: _Optional[float] = ..., anneal_strategy: _Optional[_Union[OneCycleLR.AnnealStrategy, str]] = ..., div_factor: _Optional[float] = ..., final_div_factor: _Optional[float] = ...) -> None: ...

class WarmupScheduler(_message.Message):
    __slots__ = ("base_lr", "warmup_epochs", "warmup_start_lr")
    BASE_LR_FIELD_NUMBER: _ClassVar[int]
    WARMUP_EPOCHS_FIELD_NUMBER: _ClassVar[int]
    WARMUP_START_LR_FIELD_NUMBER: _ClassVar[int]
    base_lr: float
    warmup_epochs: int
    warmup_start_lr: float
    def __init__(self, base_lr: _Optional[float] = ..., warmup_epochs: _Optional[int] = ..., warmup_start_lr: _Optional[float] = ...) -> None: ...

class WarmupCosineSchedule(_message.Message):
    __slots__ = ("base_lr", "warmup_steps", "total_steps", "warmup_start_lr", "eta_min")
    BASE_LR_FIELD_NUMBER: _ClassVar[int]
    WARMUP_STEPS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_STEPS_FIELD_NUMBER: _ClassVar[int]
    WARMUP_START_LR_FIELD_NUMBER: _ClassVar[int]
    ETA_MIN_FIELD_NUMBER: _ClassVar[int]
    base_lr: float
    warmup_steps: int
    total_steps: int
    warmup_start_lr: float
    eta_min: float
    def __init__(self, base_lr: _Optional[float] = ..., warmup_steps: _Optional[int] = ..., total_steps: _Optional[int] = ..., warmup_start_lr: _Optional[float] = ..., eta_min: _Optional[float] = ...) -> None: ...

class PiecewiseConstantSchedule(_message.Message):
    __slots__ = ("base_lr", "boundaries", "values")
    BASE_LR_FIELD_NUMBER: _ClassVar[int]
    BOUNDARIES_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    base_lr: float
    boundaries: _containers.RepeatedScalarFieldContainer[int]
    values: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, base_lr: _Optional[float] = ..., boundaries: _Optional[_Iterable[int]] = ..., values: _Optional[_Iterable[float]] = ...) -> None: ...

class ChainedScheduler(_message.Message):
    __slots__ = ("schedulers",)
    SCHEDULERS_FIELD_NUMBER: _ClassVar[int]
    schedulers: _containers.RepeatedCompositeFieldContainer[LearningRate]
    def __init__(self, schedulers: _Optional[_Iterable[_Union[LearningRate, _Mapping]]] = ...) -> None: ...

class SequentialLR(_message.Message):
    __slots__ = ("schedulers", "milestones")
    SCHEDULERS_FIELD_NUMBER: _ClassVar[int]
    MILESTONES_FIELD_NUMBER: _ClassVar[int]
    schedulers: _containers.RepeatedCompositeFieldContainer[LearningRate]
    milestones: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, schedulers: _Optional[_Iterable[_Union[LearningRate, _Mapping]]] = ..., milestones: _Optional[_Iterable[int]] = ...) -> None: ...

class ReduceLROnPlateau(_message.Message):
    __slots__ = ("base_lr", "mode", "factor", "patience", "threshold", "threshold_mode", "cooldown", "min_lr", "eps")
    class Mode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        MODE_UNSPECIFIED: _ClassVar[ReduceLROnPlateau.Mode]
        MODE_MIN: _ClassVar[ReduceLROnPlateau.Mode]
        MODE_MAX: _ClassVar[ReduceLROnPlateau.Mode]
    MODE_UNSPECIFIED: ReduceLROnPlateau.Mode
    MODE_MIN: ReduceLROnPlateau.Mode
    MODE_MAX: ReduceLROnPlateau.Mode
    class ThresholdMode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        THRESHOLD_MODE_UNSPECIFIED: _ClassVar[ReduceLROnPlateau.ThresholdMode]
        THRESHOLD_MODE_REL: _ClassVar[ReduceLROnPlateau.ThresholdMode]
        THRESHOLD_MODE_ABS: _ClassVar[ReduceLROnPlateau.ThresholdMode]
    THRESHOLD_MODE_UNSPECIFIED: ReduceLROnPlateau.ThresholdMode
    THRESHOLD_MODE_REL: ReduceLROnPlateau.ThresholdMode
    THRESHOLD_MODE_ABS: ReduceLROnPlateau.ThresholdMode
    BASE_LR_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    FACTOR_FIELD_NUMBER: _ClassVar[int]
    PATIENCE_FIELD_NUMBER: _ClassVar[int]
    THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    THRESHOLD_MODE_FIELD_NUMBER: _ClassVar[int]
    COOLDOWN_FIELD_NUMBER: _ClassVar[int]
    MIN_LR_FIELD_NUMBER: _ClassVar[int]
    EPS_FIELD_NUMBER: _ClassVar[int]
    base_lr: float
    mode: ReduceLROnPlateau.Mode
    factor: float
    patience: int
    threshold: float
    threshold_mode: ReduceLROnPlateau.ThresholdMode
    cooldown: int
    min_lr: float
    eps: float
    def __init__(self, base_lr: _Optional[float] = ..., mode: _Optional[_Union[ReduceLROnPlateau.Mode, str]] = ..., factor: _Optional[float] = ..., patience: _Optional[int] = ..., threshold: _Optional[float] = ..., threshold_mode: _Optional[_Union[ReduceLROnPlateau.ThresholdMode, str]] = ..., cooldown: _Optional[int] = ..., min_lr: _Optional[float] = ..., eps: _Optional[float] = ...) -> None: ...
