import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from kedge.v1 import optimizer_pb2 as _optimizer_pb2
from kedge.v1 import run_pb2 as _run_pb2
from kedge.v1 import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class CreateRunRequest(_message.Message):
    __slots__ = ("header", "chunk", "trailer")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    TRAILER_FIELD_NUMBER: _ClassVar[int]
    header: CreateRunHeader
    chunk: _tensor_pb2.Chunk
    trailer: _tensor_pb2.StreamTrailer
    def __init__(self, header: _Optional[_Union[CreateRunHeader, _Mapping]] = ..., chunk: _Optional[_Union[_tensor_pb2.Chunk, _Mapping]] = ..., trailer: _Optional[_Union[_tensor_pb2.StreamTrailer, _Mapping]] = ...) -> None: ...

class CreateRunHeader(_message.Message):
    __slots__ = ("run_id", "manifest", "optimizer", "aggregation", "request_id", "dtype", "size_bytes", "groups", "admission", "durability", "checkpointing")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    OPTIMIZER_FIELD_NUMBER: _ClassVar[int]
    AGGREGATION_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    ADMISSION_FIELD_NUMBER: _ClassVar[int]
    DURABILITY_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINTING_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    manifest: _tensor_pb2.Manifest
    optimizer: _optimizer_pb2.Optimizer
    aggregation: _run_pb2.Aggregation
    request_id: str
    dtype: _tensor_pb2.Dtype
    size_bytes: int
    groups: _containers.RepeatedCompositeFieldContainer[_run_pb2.ParameterGroup]
    admission: _run_pb2.Admission
    durability: _run_pb2.Durability
    checkpointing: _run_pb2.Checkpointing
    def __init__(self, run_id: _Optional[str] = ..., manifest: _Optional[_Union[_tensor_pb2.Manifest, _Mapping]] = ..., optimizer: _Optional[_Union[_optimizer_pb2.Optimizer, _Mapping]] = ..., aggregation: _Optional[_Union[_run_pb2.Aggregation, _Mapping]] = ..., request_id: _Optional[str] = ..., dtype: _Optional[_Union[_tensor_pb2.Dtype, str]] = ..., size_bytes: _Optional[int] = ..., groups: _Optional[_Iterable[_Union[_run_pb2.ParameterGroup, _Mapping]]] = ..., admission: _Optional[_Union[_run_pb2.Admission, _Mapping]] = ..., durability: _Optional[_Union[_run_pb2.Durability, str]] = ..., checkpointing: _Optional[_Union[_run_pb2.Checkpointing, _Mapping]] = ...) -> None: ...

class CreateRunResponse(_message.Message):
    __slots__ = ("run",)
    RUN_FIELD_NUMBER: _ClassVar[int]
    run: _run_pb2.Run
    def __init__(self, run: _Optional[_Union[_run_pb2.Run, _Mapping]] = ...) -> None: ...

class GetRunRequest(_message.Message):
    __slots__ = ("name", "view")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VIEW_FIELD_NUMBER: _ClassVar[int]
    name: str
    view: _run_pb2.RunView
    def __init__(self, name: _Optional[str] = ..., view: _Optional[_Union[_run_pb2.RunView, str]] = ...) -> None: ...

class GetRunResponse(_message.Message):
    __slots__ = ("run",)
    RUN_FIELD_NUMBER: _ClassVar[int]
    run: _run_pb2.Run
    def __init__(self, run: _Optional[_Union[_run_pb2.Run, _Mapping]] = ...) -> None: ...

class ListRunsRequest(_message.Message):
    __slots__ = ("page_size", "page_token")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListRunsResponse(_message.Message):
    __slots__ = ("runs", "next_page_token")
    RUNS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    runs: _containers.RepeatedCompositeFieldContainer[_run_pb2.Run]
    next_page_token: str
    def __init__(self, runs: _Optional[_Iterable[_Union[_run_pb2.Run, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class UpdateRunRequest(_message.Message):
    __slots__ = ("name", "hyperparameters", "request_id", "aggregation", "admission")
    NAME_FIELD_NUMBER: _ClassVar[int]
    HYPERPARAMETERS_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    AGGREGATION_FIELD_NUMBER: _ClassVar[int]
    ADMISSION_FIELD_NUMBER: _ClassVar[int]
    name: str
    hyperparameters: _run_pb2.HyperparameterChange
    request_id: str
    aggregation: _run_pb2.Aggregation
    admission: _run_pb2.Admission
    def __init__(self, name: _Optional[str] = ..., hyperparameters: _Optional[_Union[_run_pb2.HyperparameterChange, _Mapping]] = ..., request_id: _Optional[str] = ..., aggregation: _Optional[_Union[_run_pb2.Aggregation, _Mapping]] = ..., admission: _Optional[_Union[_run_pb2.Admission, _Mapping]] = ...) -> None: ...

class UpdateRunResponse(_message.Message):
    __slots__ = ("step",)
    STEP_FIELD_NUMBER: _ClassVar[int]
    step: int
    def __init__(self, step: _Optional[int] = ...) -> None: ...

class TickScheduleRequest(_message.Message):
    __slots__ = ("name", "group", "to_tick", "request_id")
    NAME_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    TO_TICK_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    name: str
    group: str
    to_tick: int
    request_id: str
    def __init__(self, name: _Optional[str] = ..., group: _Optional[str] = ..., to_tick: _Optional[int] = ..., request_id: _Optional[str] = ...) -> None: ...

class TickScheduleResponse(_message.Message):
    __slots__ = ("tick", "learning_rate")
    TICK_FIELD_NUMBER: _ClassVar[int]
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    tick: int
    learning_rate: float
    def __init__(self, tick: _Optional[int] = ..., learning_rate: _Optional[float] = ...) -> None: ...

class DeleteRunRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class DeleteRunResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class JoinRunRequest(_message.Message):
    __slots__ = ("run", "worker_id", "lease")
    RUN_FIELD_NUMBER: _ClassVar[int]
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    run: str
    worker_id: str
    lease: _duration_pb2.Duration
    def __init__(self, run: _Optional[str] = ..., worker_id: _Optional[str] = ..., lease: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class JoinRunResponse(_message.Message):
    __slots__ = ("worker", "epoch", "lease", "step")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    worker: str
    epoch: int
    lease: _duration_pb2.Duration
    step: int
    def __init__(self, worker: _Optional[str] = ..., epoch: _Optional[int] = ..., lease: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., step: _Optional[int] = ...) -> None: ...

class HeartbeatRequest(_message.Message):
    __slots__ = ("worker", "epoch")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    worker: str
    epoch: int
    def __init__(self, worker: _Optional[str] = ..., epoch: _Optional[int] = ...) -> None: ...

class HeartbeatResponse(_message.Message):
    __slots__ = ("lease", "step")
    LEASE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    lease: _duration_pb2.Duration
    step: int
    def __init__(self, lease: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., step: _Optional[int] = ...) -> None: ...

class LeaveRunRequest(_message.Message):
    __slots__ = ("worker", "epoch")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    worker: str
    epoch: int
    def __init__(self, worker: _Optional[str] = ..., epoch: _Optional[int] = ...) -> None: ...

class LeaveRunResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class EvictWorkerRequest(_message.Message):
    __slots__ = ("worker", "cause", "block", "request_id")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    CAUSE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    worker: str
    cause: str
    block: _duration_pb2.Duration
    request_id: str
    def __init__(self, worker: _Optional[str] = ..., cause: _Optional[str] = ..., block: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., request_id: _Optional[str] = ...) -> None: ...

class EvictWorkerResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WatchRunRequest(_message.Message):
    __slots__ = ("name", "from_step", "after_number", "server_generation")
    NAME_FIELD_NUMBER: _ClassVar[int]
    FROM_STEP_FIELD_NUMBER: _ClassVar[int]
    AFTER_NUMBER_FIELD_NUMBER: _ClassVar[int]
    SERVER_GENERATION_FIELD_NUMBER: _ClassVar[int]
    name: str
    from_step: int
    after_number: int
    server_generation: int
    def __init__(self, name: _Optional[str] = ..., from_step: _Optional[int] = ..., after_number: _Optional[int] = ..., server_generation: _Optional[int] = ...) -> None: ...

class WatchRunResponse(_message.Message):
    __slots__ = ("events", "last_number", "server_generation")
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    LAST_NUMBER_FIELD_NUMBER: _ClassVar[int]
    SERVER_GENERATION_FIELD_NUMBER: _ClassVar[int]
    events: _containers.RepeatedCompositeFieldContainer[_run_pb2.Event]
    last_number: int
    server_generation: int
    def __init__(self, events: _Optional[_Iterable[_Union[_run_pb2.Event, _Mapping]]] = ..., last_number: _Optional[int] = ..., server_generation: _Optional[int] = ...) -> None: ...
