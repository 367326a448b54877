"""CheckpointService: durable states of runs."""

from kedge.v1 import checkpoint_service_pb2 as pb
from kedge.wire import names
from kedge_server.engine.registry import Registry
from kedge_server.rpc import convert
from kedge_server.rpc.gate import require_run
from kedge_server.rpc.runs import Runs

_MOST_LISTED = 1000


class CheckpointServicer:
    """Answers CheckpointService from a registry."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._runs = Runs(registry)

    async def create_checkpoint(self, request: pb.CreateCheckpointRequest) -> pb.CreateCheckpointResponse:
        """Takes a checkpoint."""
        run = self._runs.get(names.run_name(names.parse_run(request.run)))
        info = await run.checkpoint(convert.metrics(request.metrics))
        return pb.CreateCheckpointResponse(checkpoint=convert.checkpoint(info, run.config.name))

    async def list_checkpoints(self, request: pb.ListCheckpointsRequest) -> pb.ListCheckpointsResponse:
        """Lists the checkpoints of a run, newest first."""
        run = self._runs.get(names.run_name(names.parse_run(request.run)))
        infos = run.store.checkpoints()[:_MOST_LISTED]
        return pb.ListCheckpointsResponse(checkpoints=[convert.checkpoint(info, run.config.name) for info in infos])

    async def restore_checkpoint(self, request: pb.RestoreCheckpointRequest) -> pb.RestoreCheckpointResponse:
        """Lets a run go on from a checkpoint."""
        checkpoint = names.parse_checkpoint(request.name)
        run = self._runs.get(checkpoint.run)
        step = await run.restore(checkpoint.checkpoint_id, request_id=convert.request_id(request))
        return pb.RestoreCheckpointResponse(step=step)

    async def fork_checkpoint(self, request: pb.ForkCheckpointRequest) -> pb.ForkCheckpointResponse:
        """Creates a run that begins where a checkpoint is."""
        checkpoint = names.parse_checkpoint(request.name)
        run = self._runs.get(checkpoint.run)
        name = require_run(f"runs/{names.check_id(request.run_id, what='run')}")
        made = await self._registry.fork(run, checkpoint.checkpoint_id, name, request_id=convert.request_id(request))
        return pb.ForkCheckpointResponse(run=convert.run(made, with_manifest=True))
