import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from kedge.v1 import optimizer_pb2 as _optimizer_pb2
from kedge.v1 import schedule_pb2 as _schedule_pb2
from kedge.v1 import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Durability(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DURABILITY_UNSPECIFIED: _ClassVar[Durability]
    DURABILITY_MEMORY: _ClassVar[Durability]
    DURABILITY_CHECKPOINT: _ClassVar[Durability]
    DURABILITY_JOURNAL: _ClassVar[Durability]
    DURABILITY_JOURNAL_SYNC: _ClassVar[Durability]

class RunView(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    RUN_VIEW_UNSPECIFIED: _ClassVar[RunView]
    RUN_VIEW_BASIC: _ClassVar[RunView]
    RUN_VIEW_FULL: _ClassVar[RunView]

class Combine(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    COMBINE_UNSPECIFIED: _ClassVar[Combine]
    COMBINE_MEAN: _ClassVar[Combine]
    COMBINE_TRIMMED_MEAN: _ClassVar[Combine]
    COMBINE_MEDIAN: _ClassVar[Combine]

class StalenessScaling(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STALENESS_SCALING_UNSPECIFIED: _ClassVar[StalenessScaling]
    STALENESS_SCALING_NONE: _ClassVar[StalenessScaling]
    STALENESS_SCALING_INVERSE: _ClassVar[StalenessScaling]

class EventKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    EVENT_KIND_UNSPECIFIED: _ClassVar[EventKind]
    EVENT_KIND_STEP: _ClassVar[EventKind]
    EVENT_KIND_LOOKAHEAD_SYNC: _ClassVar[EventKind]
    EVENT_KIND_JOINED: _ClassVar[EventKind]
    EVENT_KIND_LEFT: _ClassVar[EventKind]
    EVENT_KIND_EVICTED: _ClassVar[EventKind]
    EVENT_KIND_REJECTED: _ClassVar[EventKind]
    EVENT_KIND_AGGREGATION_CHANGED: _ClassVar[EventKind]
    EVENT_KIND_WAITING: _ClassVar[EventKind]
    EVENT_KIND_SUMMARY: _ClassVar[EventKind]
    EVENT_KIND_CHECKPOINT: _ClassVar[EventKind]
    EVENT_KIND_RECOVERED: _ClassVar[EventKind]
    EVENT_KIND_RESTORED: _ClassVar[EventKind]
DURABILITY_UNSPECIFIED: Durability
DURABILITY_MEMORY: Durability
DURABILITY_CHECKPOINT: Durability
DURABILITY_JOURNAL: Durability
DURABILITY_JOURNAL_SYNC: Durability
RUN_VIEW_UNSPECIFIED: RunView
RUN_VIEW_BASIC: RunView
RUN_VIEW_FULL: RunView
COMBINE_UNSPECIFIED: Combine
COMBINE_MEAN: Combine
COMBINE_TRIMMED_MEAN: Combine
COMBINE_MEDIAN: Combine
STALENESS_SCALING_UNSPECIFIED: StalenessScaling
STALENESS_SCALING_NONE: StalenessScaling
STALENESS_SCALING_INVERSE: StalenessScaling
EVENT_KIND_UNSPECIFIED: EventKind
EVENT_KIND_STEP: EventKind
EVENT_KIND_LOOKAHEAD_SYNC: EventKind
EVENT_KIND_JOINED: EventKind
EVENT_KIND_LEFT: EventKind
EVENT_KIND_EVICTED: EventKind
EVENT_KIND_REJECTED: EventKind
EVENT_KIND_AGGREGATION_CHANGED: EventKind
EVENT_KIND_WAITING: EventKind
EVENT_KIND_SUMMARY: EventKind
EVENT_KIND_CHECKPOINT: EventKind
EVENT_KIND_RECOVERED: EventKind
EVENT_KIND_RESTORED: EventKind

class Run(_message.Message):
    __slots__ = ("name", "create_time", "manifest", "parameter_count", "optimizer", "aggregation", "state", "groups", "changes", "admission", "durability", "checkpointing")
    NAME_FIELD_NUMBER: _ClassVar[int]
    CREATE_TIME_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    PARAMETER_COUNT_FIELD_NUMBER: _ClassVar[int]
    OPTIMIZER_FIELD_NUMBER: _ClassVar[int]
    AGGREGATION_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    CHANGES_FIELD_NUMBER: _ClassVar[int]
    ADMISSION_FIELD_NUMBER: _ClassVar[int]
    DURABILITY_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINTING_FIELD_NUMBER: _ClassVar[int]
    name: str
    create_time: _timestamp_pb2.Timestamp
    manifest: _tensor_pb2.Manifest
    parameter_count: int
    optimizer: _optimizer_pb2.Optimizer
    aggregation: Aggregation
    state: RunState
    groups: _containers.RepeatedCompositeFieldContainer[ParameterGroup]
    changes: _containers.RepeatedCompositeFieldContainer[HyperparameterChange]
    admission: Admission
    durability: Durability
    checkpointing: Checkpointing
    def __init__(self, name: _Optional[str] = ..., create_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., manifest: _Optional[_Union[_tensor_pb2.Manifest, _Mapping]] = ..., parameter_count: _Optional[int] = ..., optimizer: _Optional[_Union[_optimizer_pb2.Optimizer, _Mapping]] = ..., aggregation: _Optional[_Union[Aggregation, _Mapping]] = ..., state: _Optional[_Union[RunState, _Mapping]] = ..., groups: _Optional[_Iterable[_Union[ParameterGroup, _Mapping]]] = ..., changes: _Optional[_Iterable[_Union[HyperparameterChange, _Mapping]]] = ..., admission: _Optional[_Union[Admission, _Mapping]] = ..., durability: _Optional[_Union[Durability, str]] = ..., checkpointing: _Optional[_Union[Checkpointing, _Mapping]] = ...) -> None: ...

class Checkpointing(_message.Message):
    __slots__ = ("every_steps", "every", "keep_latest", "keep_every_steps", "max_age", "keep_best", "metric", "is_greater_better")
    EVERY_STEPS_FIELD_NUMBER: _ClassVar[int]
    EVERY_FIELD_NUMBER: _ClassVar[int]
    KEEP_LATEST_FIELD_NUMBER: _ClassVar[int]
    KEEP_EVERY_STEPS_FIELD_NUMBER: _ClassVar[int]
    MAX_AGE_FIELD_NUMBER: _ClassVar[int]
    KEEP_BEST_FIELD_NUMBER: _ClassVar[int]
    METRIC_FIELD_NUMBER: _ClassVar[int]
    IS_GREATER_BETTER_FIELD_NUMBER: _ClassVar[int]
    every_steps: int
    every: _duration_pb2.Duration
    keep_latest: int
    keep_every_steps: int
    max_age: _duration_pb2.Duration
    keep_best: int
    metric: str
    is_greater_better: bool
    def __init__(self, every_steps: _Optional[int] = ..., every: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., keep_latest: _Optional[int] = ..., keep_every_steps: _Optional[int] = ..., max_age: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., keep_best: _Optional[int] = ..., metric: _Optional[str] = ..., is_greater_better: bool = ...) -> None: ...

class ParameterGroup(_message.Message):
    __slots__ = ("name", "patterns", "lr", "weight_decay", "grad_clip_norm", "grad_clip_value", "frozen")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PATTERNS_FIELD_NUMBER: _ClassVar[int]
    LR_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_DECAY_FIELD_NUMBER: _ClassVar[int]
    GRAD_CLIP_NORM_FIELD_NUMBER: _ClassVar[int]
    GRAD_CLIP_VALUE_FIELD_NUMBER: _ClassVar[int]
    FROZEN_FIELD_NUMBER: _ClassVar[int]
    name: str
    patterns: _containers.RepeatedScalarFieldContainer[str]
    lr: _schedule_pb2.LearningRate
    weight_decay: float
    grad_clip_norm: float
    grad_clip_value: float
    frozen: bool
    def __init__(self, name: _Optional[str] = ..., patterns: _Optional[_Iterable[str]] = ..., lr: _Optional[_Union[_schedule_pb2.LearningRate, _Mapping]] = ..., weight_decay: _Optional[float] = ..., grad_clip_norm: _Optional[float] = ..., grad_clip_value: _Optional[float] = ..., frozen: bool = ...) -> None: ...

class HyperparameterChange(_message.Message):
    __slots__ = ("group", "lr", "weight_decay", "grad_clip_norm", "grad_clip_value", "step")
    GROUP_FIELD_NUMBER: _ClassVar[int]
    LR_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_DECAY_FIELD_NUMBER: _ClassVar[int]
    GRAD_CLIP_NORM_FIELD_NUMBER: _ClassVar[int]
    GRAD_CLIP_VALUE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    group: str
    lr: _schedule_pb2.LearningRate
    weight_decay: float
    grad_clip_norm: float
    grad_clip_value: float
    step: int
    def __init__(self, group: _Optional[str] = ..., lr: _Optional[_Union[_schedule_pb2.LearningRate, _Mapping]] = ..., weight_decay: _Optional[float] = ..., grad_clip_norm: _Optional[float] = ..., grad_clip_value: _Optional[float] = ..., step: _Optional[int] = ...) -> None: ...

class RunState(_message.Message):
    __slots__ = ("step", "lookahead_sync_count", "learning_rate", "workers", "round", "applied_count", "rejected_counts", "loss", "waiting_for", "durable_step", "storage_problem")
    class RejectedCountsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    STEP_FIELD_NUMBER: _ClassVar[int]
    LOOKAHEAD_SYNC_COUNT_FIELD_NUMBER: _ClassVar[int]
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    APPLIED_COUNT_FIELD_NUMBER: _ClassVar[int]
    REJECTED_COUNTS_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    WAITING_FOR_FIELD_NUMBER: _ClassVar[int]
    DURABLE_STEP_FIELD_NUMBER: _ClassVar[int]
    STORAGE_PROBLEM_FIELD_NUMBER: _ClassVar[int]
    step: int
    lookahead_sync_count: int
    learning_rate: float
    workers: _containers.RepeatedCompositeFieldContainer[Worker]
    round: Round
    applied_count: int
    rejected_counts: _containers.ScalarMap[str, int]
    loss: float
    waiting_for: str
    durable_step: int
    storage_problem: str
    def __init__(self, step: _Optional[int] = ..., lookahead_sync_count: _Optional[int] = ..., learning_rate: _Optional[float] = ..., workers: _Optional[_Iterable[_Union[Worker, _Mapping]]] = ..., round: _Optional[_Union[Round, _Mapping]] = ..., applied_count: _Optional[int] = ..., rejected_counts: _Optional[_Mapping[str, int]] = ..., loss: _Optional[float] = ..., waiting_for: _Optional[str] = ..., durable_step: _Optional[int] = ..., storage_problem: _Optional[str] = ...) -> None: ...

class Round(_message.Message):
    __slots__ = ("contribution_count", "required_count")
    CONTRIBUTION_COUNT_FIELD_NUMBER: _ClassVar[int]
    REQUIRED_COUNT_FIELD_NUMBER: _ClassVar[int]
    contribution_count: int
    required_count: int
    def __init__(self, contribution_count: _Optional[int] = ..., required_count: _Optional[int] = ...) -> None: ...

class Worker(_message.Message):
    __slots__ = ("name", "epoch", "lease_remaining", "last_sequence", "applied_count", "rejected_count", "last_staleness", "last_loss", "clock")
    NAME_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    LEASE_REMAINING_FIELD_NUMBER: _ClassVar[int]
    LAST_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    APPLIED_COUNT_FIELD_NUMBER: _ClassVar[int]
    REJECTED_COUNT_FIELD_NUMBER: _ClassVar[int]
    LAST_STALENESS_FIELD_NUMBER: _ClassVar[int]
    LAST_LOSS_FIELD_NUMBER: _ClassVar[int]
    CLOCK_FIELD_NUMBER: _ClassVar[int]
    name: str
    epoch: int
    lease_remaining: _duration_pb2.Duration
    last_sequence: int
    applied_count: int
    rejected_count: int
    last_staleness: int
    last_loss: float
    clock: int
    def __init__(self, name: _Optional[str] = ..., epoch: _Optional[int] = ..., lease_remaining: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., last_sequence: _Optional[int] = ..., applied_count: _Optional[int] = ..., rejected_count: _Optional[int] = ..., last_staleness: _Optional[int] = ..., last_loss: _Optional[float] = ..., clock: _Optional[int] = ...) -> None: ...

class Aggregation(_message.Message):
    __slots__ = ("synchronous", "asynchronous", "bounded_staleness", "buffered")
    SYNCHRONOUS_FIELD_NUMBER: _ClassVar[int]
    ASYNCHRONOUS_FIELD_NUMBER: _ClassVar[int]
    BOUNDED_STALENESS_FIELD_NUMBER: _ClassVar[int]
    BUFFERED_FIELD_NUMBER: _ClassVar[int]
    synchronous: Synchronous
    asynchronous: Asynchronous
    bounded_staleness: BoundedStaleness
    buffered: Buffered
    def __init__(self, synchronous: _Optional[_Union[Synchronous, _Mapping]] = ..., asynchronous: _Optional[_Union[Asynchronous, _Mapping]] = ..., bounded_staleness: _Optional[_Union[BoundedStaleness, _Mapping]] = ..., buffered: _Optional[_Union[Buffered, _Mapping]] = ...) -> None: ...

class Synchronous(_message.Message):
    __slots__ = ("quorum", "timeout", "combine", "trim_count", "deterministic")
    QUORUM_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_FIELD_NUMBER: _ClassVar[int]
    COMBINE_FIELD_NUMBER: _ClassVar[int]
    TRIM_COUNT_FIELD_NUMBER: _ClassVar[int]
    DETERMINISTIC_FIELD_NUMBER: _ClassVar[int]
    quorum: int
    timeout: _duration_pb2.Duration
    combine: Combine
    trim_count: int
    deterministic: bool
    def __init__(self, quorum: _Optional[int] = ..., timeout: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., combine: _Optional[_Union[Combine, str]] = ..., trim_count: _Optional[int] = ..., deterministic: bool = ...) -> None: ...

class Asynchronous(_message.Message):
    __slots__ = ("max_staleness", "scaling")
    MAX_STALENESS_FIELD_NUMBER: _ClassVar[int]
    SCALING_FIELD_NUMBER: _ClassVar[int]
    max_staleness: int
    scaling: StalenessScaling
    def __init__(self, max_staleness: _Optional[int] = ..., scaling: _Optional[_Union[StalenessScaling, str]] = ...) -> None: ...

class BoundedStaleness(_message.Message):
    __slots__ = ("bound",)
    BOUND_FIELD_NUMBER: _ClassVar[int]
    bound: int
    def __init__(self, bound: _Optional[int] = ...) -> None: ...

class Buffered(_message.Message):
    __slots__ = ("size", "max_staleness", "scaling", "combine", "trim_count", "deterministic")
    SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_STALENESS_FIELD_NUMBER: _ClassVar[int]
    SCALING_FIELD_NUMBER: _ClassVar[int]
    COMBINE_FIELD_NUMBER: _ClassVar[int]
    TRIM_COUNT_FIELD_NUMBER: _ClassVar[int]
    DETERMINISTIC_FIELD_NUMBER: _ClassVar[int]
    size: int
    max_staleness: int
    scaling: StalenessScaling
    combine: Combine
    trim_count: int
    deterministic: bool
    def __init__(self, size: _Optional[int] = ..., max_staleness: _Optional[int] = ..., scaling: _Optional[_Union[StalenessScaling, str]] = ..., combine: _Optional[_Union[Combine, str]] = ..., trim_count: _Optional[int] = ..., deterministic: bool = ...) -> None: ...

class Admission(_message.Message):
    __slots__ = ("max_norm", "outlier_factor", "quarantine_after", "quarantine")
    MAX_NORM_FIELD_NUMBER: _ClassVar[int]
    OUTLIER_FACTOR_FIELD_NUMBER: _ClassVar[int]
    QUARANTINE_AFTER_FIELD_NUMBER: _ClassVar[int]
    QUARANTINE_FIELD_NUMBER: _ClassVar[int]
    max_norm: float
    outlier_factor: float
    quarantine_after: int
    quarantine: _duration_pb2.Duration
    def __init__(self, max_norm: _Optional[float] = ..., outlier_factor: _Optional[float] = ..., quarantine_after: _Optional[int] = ..., quarantine: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class Event(_message.Message):
    __slots__ = ("number", "time", "kind", "step", "worker", "epoch", "reason", "message", "contribution_count", "loss", "aggregation", "skipped_counts", "checkpoint")
    class SkippedCountsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    WORKER_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    CONTRIBUTION_COUNT_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    AGGREGATION_FIELD_NUMBER: _ClassVar[int]
    SKIPPED_COUNTS_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    number: int
    time: _timestamp_pb2.Timestamp
    kind: EventKind
    step: int
    worker: str
    epoch: int
    reason: str
    message: str
    contribution_count: int
    loss: float
    aggregation: Aggregation
    skipped_counts: _containers.ScalarMap[str, int]
    checkpoint: str
    def __init__(self, number: _Optional[int] = ..., time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., kind: _Optional[_Union[EventKind, str]] = ..., step: _Optional[int] = ..., worker: _Optional[str] = ..., epoch: _Optional[int] = ..., reason: _Optional[str] = ..., message: _Optional[str] = ..., contribution_count: _Optional[int] = ..., loss: _Optional[float] = ..., aggregation: _Optional[_Union[Aggregation, _Mapping]] = ..., skipped_counts: _Optional[_Mapping[str, int]] = ..., checkpoint: _Optional[str] = ...) -> None: ...
