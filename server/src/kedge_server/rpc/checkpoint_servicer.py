"""CheckpointService: durable states of runs."""

from kedge.v1 import checkpoint_service_pb2 as pb
from kedge.wire import names
from kedge_server.engine.registry import Registry
from kedge_server.engine.run import RunEngine
from kedge_server.rpc import convert

_MOST_LISTED = 1000


class CheckpointServicer:
    """Answers CheckpointService from a registry."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    async def create_checkpoint(self, request: pb.CreateCheckpointRequest) -> pb.CreateCheckpointResponse:
        """Takes a checkpoint."""
        run = self._run(names.parse_run(request.run))
        info = await run.checkpoint(convert.metrics(request.metrics))
        return pb.CreateCheckpointResponse(checkpoint=convert.checkpoint(info, run.config.name))

    async def list_checkpoints(self, request: pb.ListCheckpointsRequest) -> pb.ListCheckpointsResponse:
        """Lists the checkpoints of a run, newest first."""
        run = self._run(names.parse_run(request.run))
        infos = run.store.checkpoints()[:_MOST_LISTED]
        return pb.ListCheckpointsResponse(checkpoints=[convert.checkpoint(info, run.config.name) for info in infos])

    async def restore_checkpoint(self, request: pb.RestoreCheckpointRequest) -> pb.RestoreCheckpointResponse:
        """Lets a run go on from a checkpoint."""
        checkpoint = names.parse_checkpoint(request.name)
        run = self._registry.get(checkpoint.run)
        step = await run.restore(checkpoint.checkpoint_id, request_id=convert.request_id(request))
        return pb.RestoreCheckpointResponse(step=step)

    async def fork_checkpoint(self, request: pb.ForkCheckpointRequest) -> pb.ForkCheckpointResponse:
        """Creates a run that begins where a checkpoint is."""
        checkpoint = names.parse_checkpoint(request.name)
        run = self._registry.get(checkpoint.run)
        name = f"runs/{names.check_id(request.run_id, what='run')}"
        made = await self._registry.fork(run, checkpoint.checkpoint_id, name, request_id=convert.request_id(request))
        return pb.ForkCheckpointResponse(run=convert.run(made, with_manifest=True))

    def _run(self, run_id: str) -> RunEngine:
        return self._registry.get(f"runs/{run_id}")
