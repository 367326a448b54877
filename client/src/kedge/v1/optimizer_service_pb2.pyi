import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from kedge.v1 import run_pb2 as _run_pb2
from kedge.v1 import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PushOutcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PUSH_OUTCOME_UNSPECIFIED: _ClassVar[PushOutcome]
    PUSH_OUTCOME_APPLIED: _ClassVar[PushOutcome]
    PUSH_OUTCOME_REJECTED: _ClassVar[PushOutcome]
    PUSH_OUTCOME_DEFERRED: _ClassVar[PushOutcome]
PUSH_OUTCOME_UNSPECIFIED: PushOutcome
PUSH_OUTCOME_APPLIED: PushOutcome
PUSH_OUTCOME_REJECTED: PushOutcome
PUSH_OUTCOME_DEFERRED: PushOutcome

class OfferMemoryRequest(_message.Message):
    __slots__ = ("worker", "epoch")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    worker: str
    epoch: int
    def __init__(self, worker: _Optional[str] = ..., epoch: _Optional[int] = ...) -> None: ...

class OfferMemoryResponse(_message.Message):
    __slots__ = ("socket", "ticket")
    SOCKET_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    socket: str
    ticket: bytes
    def __init__(self, socket: _Optional[str] = ..., ticket: _Optional[bytes] = ...) -> None: ...

class PushHeader(_message.Message):
    __slots__ = ("worker", "epoch", "sequence", "base_step", "manifest_digest", "example_count", "dtype", "size_bytes", "loss", "wait", "pull", "in_memory")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    BASE_STEP_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_DIGEST_FIELD_NUMBER: _ClassVar[int]
    EXAMPLE_COUNT_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    WAIT_FIELD_NUMBER: _ClassVar[int]
    PULL_FIELD_NUMBER: _ClassVar[int]
    IN_MEMORY_FIELD_NUMBER: _ClassVar[int]
    worker: str
    epoch: int
    sequence: int
    base_step: int
    manifest_digest: bytes
    example_count: int
    dtype: _tensor_pb2.Dtype
    size_bytes: int
    loss: float
    wait: _duration_pb2.Duration
    pull: PullSpec
    in_memory: _tensor_pb2.MemoryRange
    def __init__(self, worker: _Optional[str] = ..., epoch: _Optional[int] = ..., sequence: _Optional[int] = ..., base_step: _Optional[int] = ..., manifest_digest: _Optional[bytes] = ..., example_count: _Optional[int] = ..., dtype: _Optional[_Union[_tensor_pb2.Dtype, str]] = ..., size_bytes: _Optional[int] = ..., loss: _Optional[float] = ..., wait: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., pull: _Optional[_Union[PullSpec, _Mapping]] = ..., in_memory: _Optional[_Union[_tensor_pb2.MemoryRange, _Mapping]] = ...) -> None: ...

class PullSpec(_message.Message):
    __slots__ = ("weights", "dtype", "min_step", "wait", "if_newer_than", "into")
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    MIN_STEP_FIELD_NUMBER: _ClassVar[int]
    WAIT_FIELD_NUMBER: _ClassVar[int]
    IF_NEWER_THAN_FIELD_NUMBER: _ClassVar[int]
    INTO_FIELD_NUMBER: _ClassVar[int]
    weights: _tensor_pb2.Weights
    dtype: _tensor_pb2.Dtype
    min_step: int
    wait: _duration_pb2.Duration
    if_newer_than: int
    into: _tensor_pb2.MemoryRange
    def __init__(self, weights: _Optional[_Union[_tensor_pb2.Weights, str]] = ..., dtype: _Optional[_Union[_tensor_pb2.Dtype, str]] = ..., min_step: _Optional[int] = ..., wait: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., if_newer_than: _Optional[int] = ..., into: _Optional[_Union[_tensor_pb2.MemoryRange, _Mapping]] = ...) -> None: ...

class WeightsHeader(_message.Message):
    __slots__ = ("step", "lookahead_sync_count", "weights", "dtype", "size_bytes", "manifest_digest", "is_unchanged", "in_memory")
    STEP_FIELD_NUMBER: _ClassVar[int]
    LOOKAHEAD_SYNC_COUNT_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_DIGEST_FIELD_NUMBER: _ClassVar[int]
    IS_UNCHANGED_FIELD_NUMBER: _ClassVar[int]
    IN_MEMORY_FIELD_NUMBER: _ClassVar[int]
    step: int
    lookahead_sync_count: int
    weights: _tensor_pb2.Weights
    dtype: _tensor_pb2.Dtype
    size_bytes: int
    manifest_digest: bytes
    is_unchanged: bool
    in_memory: bool
    def __init__(self, step: _Optional[int] = ..., lookahead_sync_count: _Optional[int] = ..., weights: _Optional[_Union[_tensor_pb2.Weights, str]] = ..., dtype: _Optional[_Union[_tensor_pb2.Dtype, str]] = ..., size_bytes: _Optional[int] = ..., manifest_digest: _Optional[bytes] = ..., is_unchanged: bool = ..., in_memory: bool = ...) -> None: ...

class PushResult(_message.Message):
    __slots__ = ("sequence", "outcome", "reason", "message", "step", "staleness", "durability", "durable_step", "weights")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    STALENESS_FIELD_NUMBER: _ClassVar[int]
    DURABILITY_FIELD_NUMBER: _ClassVar[int]
    DURABLE_STEP_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    outcome: PushOutcome
    reason: str
    message: str
    step: int
    staleness: int
    durability: _run_pb2.Durability
    durable_step: int
    weights: WeightsHeader
    def __init__(self, sequence: _Optional[int] = ..., outcome: _Optional[_Union[PushOutcome, str]] = ..., reason: _Optional[str] = ..., message: _Optional[str] = ..., step: _Optional[int] = ..., staleness: _Optional[int] = ..., durability: _Optional[_Union[_run_pb2.Durability, str]] = ..., durable_step: _Optional[int] = ..., weights: _Optional[_Union[WeightsHeader, _Mapping]] = ...) -> None: ...

class PushGradientsRequest(_message.Message):
    __slots__ = ("header", "chunk", "trailer")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    TRAILER_FIELD_NUMBER: _ClassVar[int]
    header: PushHeader
    chunk: _tensor_pb2.Chunk
    trailer: _tensor_pb2.StreamTrailer
    def __init__(self, header: _Optional[_Union[PushHeader, _Mapping]] = ..., chunk: _Optional[_Union[_tensor_pb2.Chunk, _Mapping]] = ..., trailer: _Optional[_Union[_tensor_pb2.StreamTrailer, _Mapping]] = ...) -> None: ...

class PushGradientsResponse(_message.Message):
    __slots__ = ("result",)
    RESULT_FIELD_NUMBER: _ClassVar[int]
    result: PushResult
    def __init__(self, result: _Optional[_Union[PushResult, _Mapping]] = ...) -> None: ...

class PullWeightsRequest(_message.Message):
    __slots__ = ("run", "pull")
    RUN_FIELD_NUMBER: _ClassVar[int]
    PULL_FIELD_NUMBER: _ClassVar[int]
    run: str
    pull: PullSpec
    def __init__(self, run: _Optional[str] = ..., pull: _Optional[_Union[PullSpec, _Mapping]] = ...) -> None: ...

class PullWeightsResponse(_message.Message):
    __slots__ = ("header", "chunk", "trailer")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    TRAILER_FIELD_NUMBER: _ClassVar[int]
    header: WeightsHeader
    chunk: _tensor_pb2.Chunk
    trailer: _tensor_pb2.StreamTrailer
    def __init__(self, header: _Optional[_Union[WeightsHeader, _Mapping]] = ..., chunk: _Optional[_Union[_tensor_pb2.Chunk, _Mapping]] = ..., trailer: _Optional[_Union[_tensor_pb2.StreamTrailer, _Mapping]] = ...) -> None: ...

class ExchangeRequest(_message.Message):
    __slots__ = ("push", "chunk", "trailer", "pull", "memory")
    PUSH_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    TRAILER_FIELD_NUMBER: _ClassVar[int]
    PULL_FIELD_NUMBER: _ClassVar[int]
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    push: PushHeader
    chunk: _tensor_pb2.Chunk
    trailer: _tensor_pb2.StreamTrailer
    pull: ExchangePull
    memory: ExchangeMemory
    def __init__(self, push: _Optional[_Union[PushHeader, _Mapping]] = ..., chunk: _Optional[_Union[_tensor_pb2.Chunk, _Mapping]] = ..., trailer: _Optional[_Union[_tensor_pb2.StreamTrailer, _Mapping]] = ..., pull: _Optional[_Union[ExchangePull, _Mapping]] = ..., memory: _Optional[_Union[ExchangeMemory, _Mapping]] = ...) -> None: ...

class ExchangeMemory(_message.Message):
    __slots__ = ("ticket",)
    TICKET_FIELD_NUMBER: _ClassVar[int]
    ticket: bytes
    def __init__(self, ticket: _Optional[bytes] = ...) -> None: ...

class ExchangePull(_message.Message):
    __slots__ = ("worker", "pull")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    PULL_FIELD_NUMBER: _ClassVar[int]
    worker: str
    pull: PullSpec
    def __init__(self, worker: _Optional[str] = ..., pull: _Optional[_Union[PullSpec, _Mapping]] = ...) -> None: ...

class ExchangeResponse(_message.Message):
    __slots__ = ("header", "chunk", "trailer", "result")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    TRAILER_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    header: WeightsHeader
    chunk: _tensor_pb2.Chunk
    trailer: _tensor_pb2.StreamTrailer
    result: PushResult
    def __init__(self, header: _Optional[_Union[WeightsHeader, _Mapping]] = ..., chunk: _Optional[_Union[_tensor_pb2.Chunk, _Mapping]] = ..., trailer: _Optional[_Union[_tensor_pb2.StreamTrailer, _Mapping]] = ..., result: _Optional[_Union[PushResult, _Mapping]] = ...) -> None: ...
