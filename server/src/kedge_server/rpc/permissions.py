"""What role each method needs: the one table of it. A method that is not in it is refused to everybody."""

from types import MappingProxyType

from kedge_server.security.roles import Role

NEEDED_ROLES: MappingProxyType[str, Role] = MappingProxyType(
    {
        "kedge.v1.RunService.CreateRun": Role.ADMIN,
        "kedge.v1.RunService.GetRun": Role.READER,
        "kedge.v1.RunService.ListRuns": Role.READER,
        "kedge.v1.RunService.UpdateRun": Role.ADMIN,
        "kedge.v1.RunService.TickSchedule": Role.WORKER,
        "kedge.v1.RunService.DeleteRun": Role.ADMIN,
        "kedge.v1.RunService.JoinRun": Role.WORKER,
        "kedge.v1.RunService.Heartbeat": Role.WORKER,
        "kedge.v1.RunService.LeaveRun": Role.WORKER,
        "kedge.v1.RunService.EvictWorker": Role.ADMIN,
        "kedge.v1.RunService.WatchRun": Role.READER,
        "kedge.v1.OptimizerService.PushGradients": Role.WORKER,
        "kedge.v1.OptimizerService.PullWeights": Role.READER,
        "kedge.v1.OptimizerService.Exchange": Role.WORKER,
        "kedge.v1.OptimizerService.OfferMemory": Role.WORKER,
        "kedge.v1.CheckpointService.CreateCheckpoint": Role.WORKER,
        "kedge.v1.CheckpointService.ListCheckpoints": Role.READER,
        "kedge.v1.CheckpointService.RestoreCheckpoint": Role.ADMIN,
        "kedge.v1.CheckpointService.ForkCheckpoint": Role.ADMIN,
        "grpc.reflection.v1alpha.ServerReflection.ServerReflectionInfo": Role.READER,
    }
)
"""By a method's full name, as descriptors have it."""

ADMINISTRATIVE: frozenset[str] = frozenset(name for name, role in NEEDED_ROLES.items() if role is Role.ADMIN)
"""The methods that are written to the audit log when they are called."""
