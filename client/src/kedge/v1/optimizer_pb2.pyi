from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Optimizer(_message.Message):
    __slots__ = ("grad_clip_norm", "grad_clip_value", "weight_decay", "sgd", "adam", "adamw", "adabelief", "lr", "lookahead")
    GRAD_CLIP_NORM_FIELD_NUMBER: _ClassVar[int]
    GRAD_CLIP_VALUE_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_DECAY_FIELD_NUMBER: _ClassVar[int]
    SGD_FIELD_NUMBER: _ClassVar[int]
    ADAM_FIELD_NUMBER: _ClassVar[int]
    ADAMW_FIELD_NUMBER: _ClassVar[int]
    ADABELIEF_FIELD_NUMBER: _ClassVar[int]
    LR_FIELD_NUMBER: _ClassVar[int]
    LOOKAHEAD_FIELD_NUMBER: _ClassVar[int]
    grad_clip_norm: float
    grad_clip_value: float
    weight_decay: float
    sgd: Sgd
    adam: Adam
    adamw: AdamW
    adabelief: AdaBelief
    lr: LearningRate
    lookahead: Lookahead
    def __init__(self, grad_clip_norm: _Optional[float] = ..., grad_clip_value: _Optional[float] = ..., weight_decay: _Optional[float] = ..., sgd: _Optional[_Union[Sgd, _Mapping]] = ..., adam: _Optional[_Union[Adam, _Mapping]] = ..., adamw: _Optional[_Union[AdamW, _Mapping]] = ..., adabelief: _Optional[_Union[AdaBelief, _Mapping]] = ..., lr: _Optional[_Union[LearningRate, _Mapping]] = ..., lookahead: _Optional[_Union[Lookahead, _Mapping]] = ...) -> None: ...

class Sgd(_message.Message):
    __slots__ = ("momentum", "nesterov")
    MOMENTUM_FIELD_NUMBER: _ClassVar[int]
    NESTEROV_FIELD_NUMBER: _ClassVar[int]
    momentum: float
    nesterov: bool
    def __init__(self, momentum: _Optional[float] = ..., nesterov: bool = ...) -> None: ...

class Adam(_message.Message):
    __slots__ = ("betas", "eps")
    BETAS_FIELD_NUMBER: _ClassVar[int]
    EPS_FIELD_NUMBER: _ClassVar[int]
    betas: _containers.RepeatedScalarFieldContainer[float]
    eps: float
    def __init__(self, betas: _Optional[_Iterable[float]] = ..., eps: _Optional[float] = ...) -> None: ...

class AdamW(_message.Message):
    __slots__ = ("betas", "eps", "weight_decay")
    BETAS_FIELD_NUMBER: _ClassVar[int]
    EPS_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_DECAY_FIELD_NUMBER: _ClassVar[int]
    betas: _containers.RepeatedScalarFieldContainer[float]
    eps: float
    weight_decay: float
    def __init__(self, betas: _Optional[_Iterable[float]] = ..., eps: _Optional[float] = ..., weight_decay: _Optional[float] = ...) -> None: ...

class AdaBelief(_message.Message):
    __slots__ = ("betas", "eps", "eps_root")
    BETAS_FIELD_NUMBER: _ClassVar[int]
    EPS_FIELD_NUMBER: _ClassVar[int]
    EPS_ROOT_FIELD_NUMBER: _ClassVar[int]
    betas: _containers.RepeatedScalarFieldContainer[float]
    eps: float
    eps_root: float
    def __init__(self, betas: _Optional[_Iterable[float]] = ..., eps: _Optional[float] = ..., eps_root: _Optional[float] = ...) -> None: ...

class Lookahead(_message.Message):
    __slots__ = ("sync_period", "alpha")
    SYNC_PERIOD_FIELD_NUMBER: _ClassVar[int]
    ALPHA_FIELD_NUMBER: _ClassVar[int]
    sync_period: int
    alpha: float
    def __init__(self, sync_period: _Optional[int] = ..., alpha: _Optional[float] = ...) -> None: ...

class LearningRate(_message.Message):
    __slots__ = ("value", "constant_lr", "step_lr", "exponential_lr")
    VALUE_FIELD_NUMBER: _ClassVar[int]
    CONSTANT_LR_FIELD_NUMBER: _ClassVar[int]
    STEP_LR_FIELD_NUMBER: _ClassVar[int]
    EXPONENTIAL_LR_FIELD_NUMBER: _ClassVar[int]
    value: float
    constant_lr: ConstantLR
    step_lr: StepLR
    exponential_lr: ExponentialLR
    def __init__(self, value: _Optional[float] = ..., constant_lr: _Optional[_Union[ConstantLR, _Mapping]] = ..., step_lr: _Optional[_Union[StepLR, _Mapping]] = ..., exponential_lr: _Optional[_Union[ExponentialLR, _Mapping]] = ...) -> None: ...

class ConstantLR(_message.Message):
    __slots__ = ("base_lr", "factor", "total_iters", "steps_per_epoch")
    BASE_LR_FIELD_NUMBER: _ClassVar[int]
    FACTOR_FIELD_NUMBER: _ClassVar[int]
    TOTAL_ITERS_FIELD_NUMBER: _ClassVar[int]
    STEPS_PER_EPOCH_FIELD_NUMBER: _ClassVar[int]
    base_lr: float
    factor: float
    total_iters: int
    steps_per_epoch: int
    def __init__(self, base_lr: _Optional[float] = ..., factor: _Optional[float] = ..., total_iters: _Optional[int] = ..., steps_per_epoch: _Optional[int] = ...) -> None: ...

class StepLR(_message.Message):
    __slots__ = ("base_lr", "step_size", "gamma", "steps_per_epoch")
    BASE_LR_FIELD_NUMBER: _ClassVar[int]
    STEP_SIZE_FIELD_NUMBER: _ClassVar[int]
    GAMMA_FIELD_NUMBER: _ClassVar[int]
    STEPS_PER_EPOCH_FIELD_NUMBER: _ClassVar[int]
    base_lr: float
    step_size: int
    gamma: float
    steps_per_epoch: int
    def __init__(self, base_lr: _Optional[float] = ..., step_size: _Optional[int] = ..., gamma: _Optional[float] = ..., steps_per_epoch: _Optional[int] = ...) -> None: ...

class ExponentialLR(_message.Message):
    __slots__ = ("base_lr", "gamma", "steps_per_epoch")
    BASE_LR_FIELD_NUMBER: _ClassVar[int]
    GAMMA_FIELD_NUMBER: _ClassVar[int]
    STEPS_PER_EPOCH_FIELD_NUMBER: _ClassVar[int]
    base_lr: float
    gamma: float
    steps_per_epoch: int
    def __init__(self, base_lr: _Optional[float] = ..., gamma: _Optional[float] = ..., steps_per_epoch: _Optional[int] = ...) -> None: ...
