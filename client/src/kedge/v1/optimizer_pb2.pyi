from google.protobuf import struct_pb2 as _struct_pb2
from kedge.v1 import schedule_pb2 as _schedule_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Optimizer(_message.Message):
    __slots__ = ("grad_clip_norm", "grad_clip_value", "weight_decay", "sgd", "adam", "adamw", "adabelief", "momentum", "momentum_nesterov", "lion", "yogi", "radam", "nadam", "adamax", "rmsprop", "adagrad", "adadelta", "lamb", "lars", "adafactor", "novograd", "optax", "lr", "lookahead", "decoupled_weight_decay")
    GRAD_CLIP_NORM_FIELD_NUMBER: _ClassVar[int]
    GRAD_CLIP_VALUE_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_DECAY_FIELD_NUMBER: _ClassVar[int]
    SGD_FIELD_NUMBER: _ClassVar[int]
    ADAM_FIELD_NUMBER: _ClassVar[int]
    ADAMW_FIELD_NUMBER: _ClassVar[int]
    ADABELIEF_FIELD_NUMBER: _ClassVar[int]
    MOMENTUM_FIELD_NUMBER: _ClassVar[int]
    MOMENTUM_NESTEROV_FIELD_NUMBER: _ClassVar[int]
    LION_FIELD_NUMBER: _ClassVar[int]
    YOGI_FIELD_NUMBER: _ClassVar[int]
    RADAM_FIELD_NUMBER: _ClassVar[int]
    NADAM_FIELD_NUMBER: _ClassVar[int]
    ADAMAX_FIELD_NUMBER: _ClassVar[int]
    RMSPROP_FIELD_NUMBER: _ClassVar[int]
    ADAGRAD_FIELD_NUMBER: _ClassVar[int]
    ADADELTA_FIELD_NUMBER: _ClassVar[int]
    LAMB_FIELD_NUMBER: _ClassVar[int]
    LARS_FIELD_NUMBER: _ClassVar[int]
    ADAFACTOR_FIELD_NUMBER: _ClassVar[int]
    NOVOGRAD_FIELD_NUMBER: _ClassVar[int]
    OPTAX_FIELD_NUMBER: _ClassVar[int]
    LR_FIELD_NUMBER: _ClassVar[int]
    LOOKAHEAD_FIELD_NUMBER: _ClassVar[int]
    DECOUPLED_WEIGHT_DECAY_FIELD_NUMBER: _ClassVar[int]
    grad_clip_norm: float
    grad_clip_value: float
    weight_decay: float
    sgd: Sgd
    adam: Adam
    adamw: AdamW
    adabelief: AdaBelief
    momentum: Momentum
    momentum_nesterov: MomentumNesterov
    lion: Lion
    yogi: Yogi
    radam: RAdam
    nadam: Nadam
    adamax: Adamax
    rmsprop: RMSprop
    adagrad: Adagrad
    adadelta: Adadelta
    lamb: Lamb
    lars: Lars
    adafactor: Adafactor
    novograd: Novograd
    optax: Optax
    lr: _schedule_pb2.LearningRate
    lookahead: Lookahead
    decoupled_weight_decay: float
    def __init__(self, grad_clip_norm: _Optional[float] = ..., grad_clip_value: _Optional[float] = ..., weight_decay: _Optional[float] = ..., sgd: _Optional[_Union[Sgd, _Mapping]] = ..., adam: _Optional[_Union[Adam, _Mapping]] = ..., adamw: _Optional[_Union[AdamW, _Mapping]] = ..., adabelief: _Optional[_Union[AdaBelief, _Mapping]] = ..., momentum: _Optional[_Union[Momentum, _Mapping]] = ..., momentum_nesterov: _Optional[_Union[MomentumNesterov, _Mapping]] = ..., lion: _Optional[_Union[Lion, _Mapping]] = ..., yogi: _Optional[_Union[Yogi, _Mapping]] = ..., radam: _Optional[_Union[RAdam, _Mapping]] = ..., nadam: _Optional[_Union[Nadam, _Mapping]] = ..., adamax: _Optional[_Union[Adamax, _Mapping]] = ..., rmsprop: _Optional[_Union[RMSprop, _Mapping]] = ..., adagrad: _Optional[_Union[Adagrad, _Mapping]] = ..., adadelta: _Optional[_Union[Adadelta, _Mapping]] = ..., lamb: _Optional[_Union[Lamb, _Mapping]] = ..., lars: _Optional[_Union[Lars, _Mapping]] = ..., adafactor: _Optional[_Union[Adafactor, _Mapping]] = ..., novograd: _Optional[_Union[Novograd, _Mapping]] = ..., optax: _Optional[_Union[Optax, _Mapping]] = ..., lr: _Optional[_Union[_schedule_pb2.LearningRate, _Mapping]] = ..., lookahead: _Optional[_Union[Lookahead, _Mapping]] = ..., decoupled_weight_decay: _Optional[float] = ...) -> None: ...

class Sgd(_message.Message):
    __slots__ = ("momentum", "nesterov")
    MOMENTUM_FIELD_NUMBER: _ClassVar[int]
    NESTEROV_FIELD_NUMBER: _ClassVar[int]
    momentum: float
    nesterov: bool
    def __init__(self, momentum: _Optional[float] = ..., nesterov: bool = ...) -> None: ...

class Momentum(_message.Message):
    __slots__ = ("momentum",)
    MOMENTUM_FIELD_NUMBER: _ClassVar[int]
    momentum: float
    def __init__(self, momentum: _Optional[float] = ...) -> None: ...

class MomentumNesterov(_message.Message):
    __slots__ = ("momentum",)
    MOMENTUM_FIELD_NUMBER: _ClassVar[int]
    momentum: float
    def __init__(self, momentum: _Optional[float] = ...) -> None: ...

class Lion(_message.Message):
    __slots__ = ("betas",)
    BETAS_FIELD_NUMBER: _ClassVar[int]
    betas: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, betas: _Optional[_Iterable[float]] = ...) -> None: ...

class Adam(_message.Message):
    __slots__ = ("betas", "eps", "amsgrad")
    BETAS_FIELD_NUMBER: _ClassVar[int]
    EPS_FIELD_NUMBER: _ClassVar[int]
    AMSGRAD_FIELD_NUMBER: _ClassVar[int]
    betas: _containers.RepeatedScalarFieldContainer[float]
    eps: float
    amsgrad: bool
    def __init__(self, betas: _Optional[_Iterable[float]] = ..., eps: _Optional[float] = ..., amsgrad: bool = ...) -> None: ...

class AdamW(_message.Message):
    __slots__ = ("betas", "eps")
    BETAS_FIELD_NUMBER: _ClassVar[int]
    EPS_FIELD_NUMBER: _ClassVar[int]
    betas: _containers.RepeatedScalarFieldContainer[float]
    eps: float
    def __init__(self, betas: _Optional[_Iterable[float]] = ..., eps: _Optional[float] = ...) -> None: ...

class Nadam(_message.Message):
    __slots__ = ("betas", "eps", "momentum_decay")
    BETAS_FIELD_NUMBER: _ClassVar[int]
    EPS_FIELD_NUMBER: _ClassVar[int]
    MOMENTUM_DECAY_FIELD_NUMBER: _ClassVar[int]
    betas: _containers.RepeatedScalarFieldContainer[float]
    eps: float
    momentum_decay: float
    def __init__(self, betas: _Optional[_Iterable[float]] = ..., eps: _Optional[float] = ..., momentum_decay: _Optional[float] = ...) -> None: ...

class RAdam(_message.Message):
    __slots__ = ("betas", "eps")
    BETAS_FIELD_NUMBER: _ClassVar[int]
    EPS_FIELD_NUMBER: _ClassVar[int]
    betas: _containers.RepeatedScalarFieldContainer[float]
    eps: float
    def __init__(self, betas: _Optional[_Iterable[float]] = ..., eps: _Optional[float] = ...) -> None: ...

class Adamax(_message.Message):
    __slots__ = ("betas", "eps")
    BETAS_FIELD_NUMBER: _ClassVar[int]
    EPS_FIELD_NUMBER: _ClassVar[int]
    betas: _containers.RepeatedScalarFieldContainer[float]
    eps: float
    def __init__(self, betas: _Optional[_Iterable[float]] = ..., eps: _Optional[float] = ...) -> None: ...

class Yogi(_message.Message):
    __slots__ = ("betas", "eps")
    BETAS_FIELD_NUMBER: _ClassVar[int]
    EPS_FIELD_NUMBER: _ClassVar[int]
    betas: _containers.RepeatedScalarFieldContainer[float]
    eps: float
    def __init__(self, betas: _Optional[_Iterable[float]] = ..., eps: _Optional[float] = ...) -> None: ...

class AdaBelief(_message.Message):
    __slots__ = ("betas", "eps", "eps_root", "max_direction")
    BETAS_FIELD_NUMBER: _ClassVar[int]
    EPS_FIELD_NUMBER: _ClassVar[int]
    EPS_ROOT_FIELD_NUMBER: _ClassVar[int]
    MAX_DIRECTION_FIELD_NUMBER: _ClassVar[int]
    betas: _containers.RepeatedScalarFieldContainer[float]
    eps: float
    eps_root: float
    max_direction: float
    def __init__(self, betas: _Optional[_Iterable[float]] = ..., eps: _Optional[float] = ..., eps_root: _Optional[float] = ..., max_direction: _Optional[float] = ...) -> None: ...

class RMSprop(_message.Message):
    __slots__ = ("alpha", "eps", "momentum", "centered")
    ALPHA_FIELD_NUMBER: _ClassVar[int]
    EPS_FIELD_NUMBER: _ClassVar[int]
    MOMENTUM_FIELD_NUMBER: _ClassVar[int]
    CENTERED_FIELD_NUMBER: _ClassVar[int]
    alpha: float
    eps: float
    momentum: float
    centered: bool
    def __init__(self, alpha: _Optional[float] = ..., eps: _Optional[float] = ..., momentum: _Optional[float] = ..., centered: bool = ...) -> None: ...

class Adagrad(_message.Message):
    __slots__ = ("lr_decay", "initial_accumulator_value", "eps")
    LR_DECAY_FIELD_NUMBER: _ClassVar[int]
    INITIAL_ACCUMULATOR_VALUE_FIELD_NUMBER: _ClassVar[int]
    EPS_FIELD_NUMBER: _ClassVar[int]
    lr_decay: float
    initial_accumulator_value: float
    eps: float
    def __init__(self, lr_decay: _Optional[float] = ..., initial_accumulator_value: _Optional[float] = ..., eps: _Optional[float] = ...) -> None: ...

class Adadelta(_message.Message):
    __slots__ = ("rho", "eps")
    RHO_FIELD_NUMBER: _ClassVar[int]
    EPS_FIELD_NUMBER: _ClassVar[int]
    rho: float
    eps: float
    def __init__(self, rho: _Optional[float] = ..., eps: _Optional[float] = ...) -> None: ...

class Lamb(_message.Message):
    __slots__ = ("betas", "eps")
    BETAS_FIELD_NUMBER: _ClassVar[int]
    EPS_FIELD_NUMBER: _ClassVar[int]
    betas: _containers.RepeatedScalarFieldContainer[float]
    eps: float
    def __init__(self, betas: _Optional[_Iterable[float]] = ..., eps: _Optional[float] = ...) -> None: ...

class Lars(_message.Message):
    __slots__ = ("momentum", "trust_coefficient", "eps")
    MOMENTUM_FIELD_NUMBER: _ClassVar[int]
    TRUST_COEFFICIENT_FIELD_NUMBER: _ClassVar[int]
    EPS_FIELD_NUMBER: _ClassVar[int]
    momentum: float
    trust_coefficient: float
    eps: float
    def __init__(self, momentum: _Optional[float] = ..., trust_coefficient: _Optional[float] = ..., eps: _Optional[float] = ...) -> None: ...

class Adafactor(_message.Message):
    __slots__ = ("eps", "clip_threshold", "decay_rate", "beta1", "factored")
    EPS_FIELD_NUMBER: _ClassVar[int]
    CLIP_THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    DECAY_RATE_FIELD_NUMBER: _ClassVar[int]
    BETA1_FIELD_NUMBER: _ClassVar[int]
    FACTORED_FIELD_NUMBER: _ClassVar[int]
    eps: _containers.RepeatedScalarFieldContainer[float]
    clip_threshold: float
    decay_rate: float
    beta1: float
    factored: bool
    def __init__(self, eps: _Optional[_Iterable[float]] = ..., clip_threshold: _Optional[float] = ..., decay_rate: _Optional[float] = ..., beta1: _Optional[float] = ..., factored: bool = ...) -> None: ...

class Novograd(_message.Message):
    __slots__ = ("betas", "eps")
    BETAS_FIELD_NUMBER: _ClassVar[int]
    EPS_FIELD_NUMBER: _ClassVar[int]
    betas: _containers.RepeatedScalarFieldContainer[float]
    eps: float
    def __init__(self, betas: _Optional[_Iterable[float]] = ..., eps: _Optional[float] = ...) -> None: ...

class Optax(_message.Message):
    __slots__ = ("name", "arguments")
    class ArgumentsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: OptaxArgument
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[OptaxArgument, _Mapping]] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    ARGUMENTS_FIELD_NUMBER: _ClassVar[int]
    name: str
    arguments: _containers.MessageMap[str, OptaxArgument]
    def __init__(self, name: _Optional[str] = ..., arguments: _Optional[_Mapping[str, OptaxArgument]] = ...) -> None: ...

class OptaxArgument(_message.Message):
    __slots__ = ("none", "number", "integer", "flag", "text", "tuple")
    NONE_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    INTEGER_FIELD_NUMBER: _ClassVar[int]
    FLAG_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TUPLE_FIELD_NUMBER: _ClassVar[int]
    none: _struct_pb2.NullValue
    number: float
    integer: int
    flag: bool
    text: str
    tuple: OptaxTuple
    def __init__(self, none: _Optional[_Union[_struct_pb2.NullValue, str]] = ..., number: _Optional[float] = ..., integer: _Optional[int] = ..., flag: bool = ..., text: _Optional[str] = ..., tuple: _Optional[_Union[OptaxTuple, _Mapping]] = ...) -> None: ...

class OptaxTuple(_message.Message):
    __slots__ = ("elements",)
    ELEMENTS_FIELD_NUMBER: _ClassVar[int]
    elements: _containers.RepeatedCompositeFieldContainer[OptaxArgument]
    def __init__(self, elements: _Optional[_Iterable[_Union[OptaxArgument, _Mapping]]] = ...) -> None: ...

class Lookahead(_message.Message):
    __slots__ = ("sync_period", "alpha", "reset_state")
    SYNC_PERIOD_FIELD_NUMBER: _ClassVar[int]
    ALPHA_FIELD_NUMBER: _ClassVar[int]
    RESET_STATE_FIELD_NUMBER: _ClassVar[int]
    sync_period: int
    alpha: float
    reset_state: bool
    def __init__(self, sync_period: _Optional[int] = ..., alpha: _Optional[float] = ..., reset_state: bool = ...) -> None: ...
