"""Which services there are, and who answers them."""

import grpc
from google.protobuf.descriptor import ServiceDescriptor

from kedge.v1 import checkpoint_service_pb2, optimizer_service_pb2, run_service_pb2
from kedge_server.engine.limits import Limits
from kedge_server.engine.registry import Registry
from kedge_server.rpc.checkpoint_servicer import CheckpointServicer
from kedge_server.rpc.gate import Gate
from kedge_server.rpc.idle import IdleStreams
from kedge_server.rpc.memory import MemoryDesk
from kedge_server.rpc.methods import Guard, StreamBounds, service_handler
from kedge_server.rpc.optimizer_servicer import OptimizerServicer
from kedge_server.rpc.reflection_servicer import SERVICE as REFLECTION_SERVICE
from kedge_server.rpc.reflection_servicer import ReflectionServicer
from kedge_server.rpc.run_servicer import RunServicer
from kedge_server.security.access import Access

_RUN_SERVICE = run_service_pb2.DESCRIPTOR.services_by_name["RunService"]
_OPTIMIZER_SERVICE = optimizer_service_pb2.DESCRIPTOR.services_by_name["OptimizerService"]

_CHECKPOINT_SERVICE = checkpoint_service_pb2.DESCRIPTOR.services_by_name["CheckpointService"]

NAMES: tuple[str, ...] = (_RUN_SERVICE.full_name, _OPTIMIZER_SERVICE.full_name, _CHECKPOINT_SERVICE.full_name)
"""The full names of the services, for health checks."""


def stream_bounds(limits: Limits) -> StreamBounds:
    """How many streams there may be, and how long they may stand still."""
    return StreamBounds(
        limits.streams, begin_seconds=limits.upload_idle_seconds, read_idle_seconds=limits.read_idle_seconds
    )


def handlers(
    registry: Registry, idle: IdleStreams, desk: MemoryDesk, access: Access, *, with_reflection: bool = False
) -> tuple[grpc.GenericRpcHandler, ...]:
    """The handlers of all services, answered from a registry; of reflection, too, if that is wanted."""
    servicers: dict[ServiceDescriptor, object] = {
        _RUN_SERVICE: RunServicer(registry),
        _OPTIMIZER_SERVICE: OptimizerServicer(registry, idle, desk),
        _CHECKPOINT_SERVICE: CheckpointServicer(registry),
    }
    if with_reflection:
        servicers[REFLECTION_SERVICE] = ReflectionServicer(NAMES, idle)
    guard = Guard(Gate(access), stream_bounds(registry.limits), registry.generation)
    return tuple(service_handler(service, servicer, guard) for service, servicer in servicers.items())
