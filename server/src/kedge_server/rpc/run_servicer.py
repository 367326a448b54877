"""RunService: creating, reading and leaving runs."""

import asyncio
import uuid
from collections.abc import AsyncIterator
from typing import Any

from kedge.v1 import run_pb2, run_service_pb2
from kedge.wire import convert as wire
from kedge.wire import names
from kedge.wire.codec import MAX_MESSAGE_BYTES
from kedge.wire.errors import KedgeError
from kedge_server.engine.registry import Registry
from kedge_server.rpc import convert, streams
from kedge_server.rpc.gate import caller, require_run
from kedge_server.rpc.runs import Runs

_PAGE_SIZE = 100
_MAX_PAGE_SIZE = 1000

_WATCH_SECONDS = 0.05
"""Between two messages of a watch: at many steps a second they take several events each."""


class RunServicer:
    """Answers RunService from a registry."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._runs = Runs(registry)

    async def create_run(self, requests: AsyncIterator[Any]) -> run_service_pb2.CreateRunResponse:
        """Creates a run from a stream of initial weights."""
        header: run_service_pb2.CreateRunHeader = await streams.read_header(requests)
        new = convert.new_run(header)
        require_run(new.name)
        run = await self._registry.find_created(new)
        if run is None:
            plan = await self._registry.plan(new)
            upload = streams.Upload(requests, streams.Patience.of(self._registry.limits, header.size_bytes))
            await upload.begin()
            weights = self._registry.staging.acquire(plan.element_count, padded_count=plan.padded_count)
            try:
                await _read_weights(upload, header, weights.array)
            except BaseException:
                weights.release()
                raise
            run = await self._registry.create(new, plan, weights)
        return run_service_pb2.CreateRunResponse(run=convert.run(run, with_manifest=True))

    async def get_run(self, request: run_service_pb2.GetRunRequest) -> run_service_pb2.GetRunResponse:
        """Reads a run."""
        run = self._runs.get(_run_name(request.name))
        is_full = request.view == run_pb2.RUN_VIEW_FULL
        return run_service_pb2.GetRunResponse(run=convert.run(run, with_manifest=is_full))

    async def list_runs(self, request: run_service_pb2.ListRunsRequest) -> run_service_pb2.ListRunsResponse:
        """Lists runs; a page token is the name of the last run of the page before."""
        size = min(request.page_size, _MAX_PAGE_SIZE) if request.page_size > 0 else _PAGE_SIZE
        runs = [run for run in self._runs.all() if run.config.name > request.page_token]
        page: list[run_pb2.Run] = []
        room = MAX_MESSAGE_BYTES // 2
        for run in runs[:size]:
            message = convert.run(run, with_manifest=False)
            room -= message.ByteSize()
            if page and room < 0:
                break
            page.append(message)
        token = page[-1].name if len(page) < len(runs) else ""
        return run_service_pb2.ListRunsResponse(runs=page, next_page_token=token)

    async def update_run(self, request: run_service_pb2.UpdateRunRequest) -> run_service_pb2.UpdateRunResponse:
        """Changes a live run."""
        run = self._runs.get(_run_name(request.name))
        update = convert.run_update(request)
        step = self._registry.update(run, update, request_id=convert.request_id(request))
        await run.acknowledge()
        return run_service_pb2.UpdateRunResponse(step=step)

    async def tick_schedule(self, request: run_service_pb2.TickScheduleRequest) -> run_service_pb2.TickScheduleResponse:
        """Ticks a schedule by hand."""
        run = self._runs.get(_run_name(request.name))
        to = request.to_tick if request.HasField("to_tick") else None
        rate = run.tick_schedule(request.group, to, request_id=convert.request_id(request))
        await run.acknowledge()
        return run_service_pb2.TickScheduleResponse(tick=rate.tick, learning_rate=rate.rate)

    async def delete_run(self, request: run_service_pb2.DeleteRunRequest) -> run_service_pb2.DeleteRunResponse:
        """Deletes a run."""
        await self._registry.delete(require_run(_run_name(request.name)))
        return run_service_pb2.DeleteRunResponse()

    async def join_run(self, request: run_service_pb2.JoinRunRequest) -> run_service_pb2.JoinRunResponse:
        """Grants a lease."""
        run = self._runs.get(_run_name(request.run))
        worker_id = names.check_id(request.worker_id or f"worker-{uuid.uuid4().hex[:8]}", what="worker")
        lease = run.join(
            worker_id,
            epoch=self._registry.next_epoch(),
            duration_seconds=self._registry.lease_seconds(wire.duration_from_wire(request, "lease")),
            owner=caller().identity,
        )
        await run.acknowledge()
        return run_service_pb2.JoinRunResponse(
            worker=f"{run.config.name}/workers/{worker_id}",
            epoch=lease.epoch,
            lease=wire.duration_to_wire(lease.duration_seconds),
            step=run.snapshot.step,
        )

    async def heartbeat(self, request: run_service_pb2.HeartbeatRequest) -> run_service_pb2.HeartbeatResponse:
        """Renews a lease."""
        worker = names.parse_worker(request.worker)
        run = self._runs.of_worker(worker, request.epoch)
        lease = run.heartbeat(worker.worker_id, request.epoch)
        return run_service_pb2.HeartbeatResponse(
            lease=wire.duration_to_wire(lease.duration_seconds), step=run.snapshot.step
        )

    async def leave_run(self, request: run_service_pb2.LeaveRunRequest) -> run_service_pb2.LeaveRunResponse:
        """Ends a lease."""
        worker = names.parse_worker(request.worker)
        run = self._runs.of_worker(worker, request.epoch)
        run.leave(worker.worker_id, request.epoch)
        await run.acknowledge()
        return run_service_pb2.LeaveRunResponse()

    async def evict_worker(self, request: run_service_pb2.EvictWorkerRequest) -> run_service_pb2.EvictWorkerResponse:
        """Ends a worker's lease from outside."""
        worker = names.parse_worker(request.worker)
        cause, block_seconds = convert.eviction(request)
        run = self._runs.get(worker.run)
        run.evict(worker.worker_id, cause, block_seconds, request_id=convert.request_id(request))
        await run.acknowledge()
        return run_service_pb2.EvictWorkerResponse()

    async def watch_run(
        self, request: run_service_pb2.WatchRunRequest
    ) -> AsyncIterator[run_service_pb2.WatchRunResponse]:
        """Tells what happens to a run."""
        run = self._runs.get(_run_name(request.name))
        generation = self._registry.generation
        reader = run.feed.reader(**convert.watch_start(request, generation))
        yield run_service_pb2.WatchRunResponse(last_number=reader.last_number, server_generation=generation)
        while True:
            events = await run.feed.next(reader)
            yield run_service_pb2.WatchRunResponse(events=[convert.event(event, run.config.name) for event in events])
            await asyncio.sleep(_WATCH_SECONDS)


async def _read_weights(upload: streams.Upload, header: run_service_pb2.CreateRunHeader, out: Any) -> None:
    dtype = wire.dtype_from_wire(header.dtype)
    inspection = await upload.read(out, dtype=dtype, size_bytes=header.size_bytes)
    bad = inspection.non_finite_element
    if bad is not None:
        raise KedgeError(
            "NON_FINITE_WEIGHTS",
            f"element {bad} of the initial weights is NaN or infinite: initialise the model anew",
            element=bad,
        )


def _run_name(name: str) -> str:
    return f"runs/{names.parse_run(name)}"
