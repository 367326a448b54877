"""Which services there are, and who answers them."""

import grpc

from kedge.v1 import checkpoint_service_pb2, optimizer_service_pb2, run_service_pb2
from kedge_server.engine.registry import Registry
from kedge_server.rpc.checkpoint_servicer import CheckpointServicer
from kedge_server.rpc.gate import Gate
from kedge_server.rpc.idle import IdleStreams
from kedge_server.rpc.memory import MemoryDesk
from kedge_server.rpc.methods import Guard, StreamBounds, service_handler
from kedge_server.rpc.optimizer_servicer import OptimizerServicer
from kedge_server.rpc.run_servicer import RunServicer
from kedge_server.security.access import Access

_RUN_SERVICE = run_service_pb2.DESCRIPTOR.services_by_name["RunService"]
_OPTIMIZER_SERVICE = optimizer_service_pb2.DESCRIPTOR.services_by_name["OptimizerService"]

_CHECKPOINT_SERVICE = checkpoint_service_pb2.DESCRIPTOR.services_by_name["CheckpointService"]

NAMES: tuple[str, ...] = (_RUN_SERVICE.full_name, _OPTIMIZER_SERVICE.full_name, _CHECKPOINT_SERVICE.full_name)
"""The full names of the services, for health checks."""


def handlers(
    registry: Registry, idle: IdleStreams, desk: MemoryDesk, access: Access
) -> tuple[grpc.GenericRpcHandler, ...]:
    """The handlers of all services, answered from a registry."""
    limits = registry.limits
    bounds = StreamBounds(
        limits.streams, begin_seconds=limits.upload_idle_seconds, read_idle_seconds=limits.read_idle_seconds
    )
    servicers = {
        _RUN_SERVICE: RunServicer(registry),
        _OPTIMIZER_SERVICE: OptimizerServicer(registry, idle, desk),
        _CHECKPOINT_SERVICE: CheckpointServicer(registry),
    }
    guard = Guard(Gate(access), bounds, registry.generation)
    return tuple(service_handler(service, servicer, guard) for service, servicer in servicers.items())
