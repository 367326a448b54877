"""Kedge's protocol on top of the fake server: what the SDK's gRPC transport meets where no real server is wanted."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2

from kedge import testing
from kedge.transport import (
    Checkpoint,
    Event,
    Lease,
    NewRun,
    PullRequest,
    Push,
    PushResult,
    RunInfo,
    RunUpdate,
    WatchStart,
    WeightsOfStep,
    in_process,
)
from kedge.v1 import checkpoint_service_pb2 as checkpoint_pb
from kedge.v1 import optimizer_service_pb2 as optimizer_pb
from kedge.v1 import run_pb2
from kedge.v1 import run_service_pb2 as run_pb
from kedge.v1.tensor_pb2 import StreamTrailer, Weights
from kedge.wire import codec, convert
from kedge.wire.compressed import COMPRESSED
from kedge.wire.errors import DOMAIN, KedgeError
from kedge.wire.groups import change_from_wire, change_to_wire, group_to_wire, groups_from_wire
from kedge.wire.manifest import Manifest
from kedge.wire.policies import (
    admission_from_wire,
    admission_to_wire,
    checkpoints_from_wire,
    checkpoints_to_wire,
    durability_from_wire,
    durability_to_wire,
    policy_from_wire,
    policy_to_wire,
)


@contextlib.contextmanager
def fake_server_behind_grpc() -> Iterator[str]:
    """The address of one."""
    with testing.FakeServer() as fake, behind_grpc(in_process.transport_to(fake.address)) as address:
        yield address


@contextlib.contextmanager
def behind_grpc(fake: Any) -> Iterator[str]:
    """The address of a server that asks this transport."""
    server = grpc.server(ThreadPoolExecutor(32), options=[("grpc.so_reuseport", 0)])
    server.add_generic_rpc_handlers(Bridge(fake).handlers())
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(0).wait()


class Bridge:
    """Kedge's protocol on top of the fake server, written from the .proto files."""

    def __init__(self, fake: Any) -> None:
        self._fake = fake

    def handlers(self) -> tuple[grpc.GenericRpcHandler, ...]:
        unary = {
            "GetRun": (self._get_run, run_pb.GetRunRequest),
            "ListRuns": (self._list_runs, run_pb.ListRunsRequest),
            "UpdateRun": (self._update_run, run_pb.UpdateRunRequest),
            "TickSchedule": (self._tick_schedule, run_pb.TickScheduleRequest),
            "DeleteRun": (self._delete_run, run_pb.DeleteRunRequest),
            "JoinRun": (self._join_run, run_pb.JoinRunRequest),
            "Heartbeat": (self._heartbeat, run_pb.HeartbeatRequest),
            "LeaveRun": (self._leave_run, run_pb.LeaveRunRequest),
            "EvictWorker": (self._evict_worker, run_pb.EvictWorkerRequest),
        }
        runs = _unary_handlers(unary)
        checkpoints = {
            "CreateCheckpoint": (self._create_checkpoint, checkpoint_pb.CreateCheckpointRequest),
            "ListCheckpoints": (self._list_checkpoints, checkpoint_pb.ListCheckpointsRequest),
            "RestoreCheckpoint": (self._restore_checkpoint, checkpoint_pb.RestoreCheckpointRequest),
            "ForkCheckpoint": (self._fork_checkpoint, checkpoint_pb.ForkCheckpointRequest),
        }
        runs["CreateRun"] = grpc.stream_unary_rpc_method_handler(
            _answering(self._create_run),
            request_deserializer=codec.stream_parser(run_pb.CreateRunRequest),
            response_serializer=codec.serialize,
        )
        runs["WatchRun"] = grpc.unary_stream_rpc_method_handler(
            _streaming(self._watch_run),
            request_deserializer=run_pb.WatchRunRequest.FromString,
            response_serializer=codec.serialize,
        )
        optimizers = {
            "PullWeights": grpc.unary_stream_rpc_method_handler(
                _streaming(self._pull_weights),
                request_deserializer=optimizer_pb.PullWeightsRequest.FromString,
                response_serializer=codec.serialize,
            ),
            "Exchange": grpc.stream_stream_rpc_method_handler(
                _streaming(self._exchange),
                request_deserializer=codec.stream_parser(optimizer_pb.ExchangeRequest),
                response_serializer=codec.serialize,
            ),
        }
        return (
            grpc.method_handlers_generic_handler("kedge.v1.RunService", runs),
            grpc.method_handlers_generic_handler("kedge.v1.OptimizerService", optimizers),
            grpc.method_handlers_generic_handler("kedge.v1.CheckpointService", _unary_handlers(checkpoints)),
        )

    def _create_run(self, requests: Iterator[Any]) -> Any:
        header = next(requests).header
        manifest = convert.manifest_from_wire(header.manifest)
        new = NewRun(
            header.run_id,
            manifest,
            [_read_flat(requests, header, manifest)],
            convert.optimizer_from_wire(header.optimizer),
            policy_from_wire(header.aggregation),
            groups_from_wire(header.groups),
            header.request_id,
            admission_from_wire(header.admission),
            durability_from_wire(header.durability),
            checkpoints_from_wire(header.checkpointing),
        )
        return run_pb.CreateRunResponse(run=_run_message(self._fake.create_run(new)))

    def _get_run(self, request: Any) -> Any:
        info = self._fake.get_run(request.name, with_manifest=request.view == run_pb2.RUN_VIEW_FULL)
        return run_pb.GetRunResponse(run=_run_message(info))

    def _list_runs(self, request: Any) -> Any:
        """Pages of two, so that the client has to ask for more."""
        infos = self._fake.list_runs()
        start = int(request.page_token or 0)
        following = str(start + 2) if start + 2 < len(infos) else ""
        page = [_run_message(info) for info in infos[start : start + 2]]
        return run_pb.ListRunsResponse(runs=page, next_page_token=following)

    def _update_run(self, request: Any) -> Any:
        update = RunUpdate(
            aggregation=policy_from_wire(request.aggregation) if request.HasField("aggregation") else None,
            admission=admission_from_wire(request.admission) if request.HasField("admission") else None,
        )
        if request.HasField("hyperparameters"):
            _, group, change = change_from_wire(request.hyperparameters)
            self._fake.set_hyperparameters(request.name, group, change, request_id=request.request_id)
        step = self._fake.update_run(request.name, update, request_id=request.request_id)
        return run_pb.UpdateRunResponse(step=step)

    def _tick_schedule(self, request: Any) -> Any:
        to = request.to_tick if request.HasField("to_tick") else None
        tick = self._fake.tick_schedule(request.name, request.group, to=to, request_id=request.request_id)
        return run_pb.TickScheduleResponse(tick=tick)

    def _delete_run(self, request: Any) -> Any:
        self._fake.delete_run(request.name)
        return run_pb.DeleteRunResponse()

    def _join_run(self, request: Any) -> Any:
        lease = self._fake.join(request.run, request.worker_id, convert.duration_from_wire(request, "lease"))
        return run_pb.JoinRunResponse(
            worker=lease.worker, epoch=lease.epoch, lease=convert.duration_to_wire(lease.lease_seconds)
        )

    def _heartbeat(self, request: Any) -> Any:
        self._fake.heartbeat(Lease(request.worker, request.epoch, 0.0))
        return run_pb.HeartbeatResponse()

    def _leave_run(self, request: Any) -> Any:
        self._fake.leave(Lease(request.worker, request.epoch, 0.0))
        return run_pb.LeaveRunResponse()

    def _evict_worker(self, request: Any) -> Any:
        block_seconds = convert.duration_from_wire(request, "block")
        self._fake.evict(request.worker, request.cause, block_seconds, request_id=request.request_id)
        return run_pb.EvictWorkerResponse()

    def _watch_run(self, request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        kind = request.WhichOneof("start")
        start = WatchStart(
            **({kind: getattr(request, kind)} if kind else {}), server_generation=request.server_generation
        )
        watch = self._fake.watch(request.name, start)
        context.add_callback(watch.close)
        yield run_pb.WatchRunResponse(last_number=watch.last_number, server_generation=watch.server_generation)
        for event in watch:
            yield run_pb.WatchRunResponse(events=[_event_message(event)])

    def _create_checkpoint(self, request: Any) -> Any:
        taken = self._fake.create_checkpoint(request.run, dict(request.metrics))
        return checkpoint_pb.CreateCheckpointResponse(checkpoint=_checkpoint_message(taken))

    def _list_checkpoints(self, request: Any) -> Any:
        messages = [_checkpoint_message(checkpoint) for checkpoint in self._fake.list_checkpoints(request.run)]
        return checkpoint_pb.ListCheckpointsResponse(checkpoints=messages)

    def _restore_checkpoint(self, request: Any) -> Any:
        step = self._fake.restore_checkpoint(request.name, request_id=request.request_id)
        return checkpoint_pb.RestoreCheckpointResponse(step=step)

    def _fork_checkpoint(self, request: Any) -> Any:
        info = self._fake.fork_checkpoint(request.name, request.run_id, request_id=request.request_id)
        return checkpoint_pb.ForkCheckpointResponse(run=_run_message(info))

    def _pull_weights(self, request: Any, _: grpc.ServicerContext) -> Iterator[Any]:
        manifest = self._fake.get_run(request.run).manifest
        weights = self._fake.pull(request.run, manifest, _pull_request(request.pull))
        yield from _weights_messages(weights, request.pull, manifest, optimizer_pb.PullWeightsResponse)

    def _exchange(self, requests: Iterator[Any], _: grpc.ServicerContext) -> Iterator[Any]:
        for message in requests:
            header = getattr(message, message.WhichOneof("payload"))
            manifest = self._fake.get_run(header.worker.split("/workers/")[0]).manifest
            exchange = self._fake.open_exchange(manifest)
            if message.HasField("push"):
                result, _ = exchange.push(_push(header, requests, manifest))
                yield optimizer_pb.ExchangeResponse(result=_result_message(result, header.sequence))
            if header.HasField("pull"):
                weights = exchange.pull(header.worker, _pull_request(header.pull))
                yield from _weights_messages(weights, header.pull, manifest, optimizer_pb.ExchangeResponse)


def _push(header: Any, requests: Iterator[Any], manifest: Manifest) -> Push:
    assert header.manifest_digest == manifest.digest
    is_compressed = convert.gradient_dtype_from_wire(header.dtype) in COMPRESSED
    return Push(
        Lease(header.worker, header.epoch, 0.0),
        header.sequence,
        header.base_step,
        header.example_count,
        header.loss if header.HasField("loss") else None,
        [_read_records(requests) if is_compressed else _read_flat(requests, header, manifest)],
        convert.gradient_dtype_from_wire(header.dtype) if is_compressed else "float32",
        convert.duration_from_wire(header, "wait") or 0.0,
        None,  # what it pulls is sent after its result
    )


def _result_message(result: PushResult, sequence: int) -> Any:
    return optimizer_pb.PushResult(
        sequence=sequence,
        outcome=optimizer_pb.PushOutcome.Value(f"PUSH_OUTCOME_{result.outcome.upper()}"),
        reason=result.reason,
        message=result.message,
        step=result.step,
        staleness=result.staleness,
        durability=durability_to_wire(result.durability),
        durable_step=result.durable_step,
    )


def _pull_request(spec: Any) -> PullRequest:
    return PullRequest(
        Weights.Name(spec.weights).removeprefix("WEIGHTS_").lower(),
        convert.dtype_from_wire(spec.dtype, default="float32"),
        spec.min_step,
        convert.duration_from_wire(spec, "wait") or 0.0,
        spec.if_newer_than if spec.HasField("if_newer_than") else None,
    )


def _read_flat(requests: Iterator[Any], header: Any, manifest: Manifest) -> np.ndarray:
    flat = np.empty(manifest.element_count, np.float32)
    decoder = codec.FlatDecoder(flat, dtype=convert.dtype_from_wire(header.dtype), size_bytes=header.size_bytes)
    for message in requests:
        if isinstance(message, codec.Chunk):
            decoder.add(message)
        else:
            decoder.finish(message.trailer.crc32c)
            return flat
    raise AssertionError("the stream has no trailer")


def _read_records(requests: Iterator[Any]) -> np.ndarray:
    data = bytearray()
    for message in requests:
        if not isinstance(message, codec.Chunk):
            return np.frombuffer(bytes(data), np.uint8)
        assert message.offset == len(data)
        data += message.data
    raise AssertionError("the stream has no trailer")


def _weights_messages(weights: WeightsOfStep, spec: Any, manifest: Manifest, response: Any) -> Iterator[Any]:
    flat = [] if weights.flat is None else [weights.flat]
    encoder = codec.FlatEncoder(flat, convert.dtype_from_wire(spec.dtype, default="float32"))
    header = optimizer_pb.WeightsHeader(
        step=weights.step,
        weights=spec.weights,
        dtype=spec.dtype,
        size_bytes=encoder.size_bytes,
        manifest_digest=manifest.digest,
        is_unchanged=weights.flat is None,
    )
    yield response(header=header)
    yield from encoder
    yield response(trailer=StreamTrailer(crc32c=encoder.crc32c))


def _checkpoint_message(checkpoint: Checkpoint) -> checkpoint_pb.Checkpoint:
    message = checkpoint_pb.Checkpoint(
        name=checkpoint.name, step=checkpoint.step, size_bytes=checkpoint.size_bytes, metrics=checkpoint.metrics
    )
    message.create_time.FromDatetime(checkpoint.create_time)
    return message


def _event_message(event: Event) -> run_pb2.Event:
    message = run_pb2.Event(
        number=event.number,
        kind=f"EVENT_KIND_{event.kind.upper()}",
        step=event.step,
        worker=event.worker,
        epoch=event.epoch,
        reason=event.reason,
        message=event.message,
        contribution_count=event.contribution_count,
        loss=event.loss,
        aggregation=policy_to_wire(event.aggregation) if event.aggregation is not None else None,
        skipped_counts={kind.upper(): count for kind, count in event.skipped_counts.items()},
        checkpoint=event.checkpoint,
    )
    message.time.FromDatetime(event.time)
    return message


def _run_message(info: RunInfo) -> run_pb2.Run:
    status = info.status
    state = run_pb2.RunState(
        step=status.step,
        lookahead_sync_count=status.lookahead_sync_count,
        learning_rate=status.learning_rate,
        applied_count=status.applied_count,
        rejected_counts=status.rejected_counts,
        loss=status.loss,
        waiting_for=status.waiting_for,
        durable_step=status.durable_step,
        storage_problem=status.storage_problem,
    )
    for worker in status.workers:
        remaining = convert.duration_to_wire(worker.lease_remaining_seconds)
        fields = {name: value for name, value in vars(worker).items() if name != "lease_remaining_seconds"}
        state.workers.append(run_pb2.Worker(lease_remaining=remaining, **fields))
    if status.round is not None:
        state.round.CopyFrom(run_pb2.Round(**vars(status.round)))
    message = run_pb2.Run(
        name=info.name,
        parameter_count=info.parameter_count,
        optimizer=convert.optimizer_to_wire(info.optimizer),
        aggregation=policy_to_wire(info.aggregation),
        admission=admission_to_wire(info.admission),
        groups=[group_to_wire(group) for group in info.groups],
        changes=[change_to_wire(made.group, made.change, step=made.step) for made in info.changes],
        state=state,
        manifest=convert.manifest_to_wire(info.manifest) if info.manifest else None,
        durability=durability_to_wire(info.durability),
        checkpointing=checkpoints_to_wire(info.checkpoints),
    )
    message.create_time.FromDatetime(info.create_time)
    return message


def _unary_handlers(methods: Mapping[str, tuple[Callable[[Any], Any], Any]]) -> dict[str, grpc.RpcMethodHandler]:
    """By name: each method, and the type of its requests."""
    return {
        name: grpc.unary_unary_rpc_method_handler(
            _answering(method), request_deserializer=request.FromString, response_serializer=codec.serialize
        )
        for name, (method, request) in methods.items()
    }


def _answering(method: Callable[[Any], Any]) -> Callable[[Any, grpc.ServicerContext], Any]:
    def answer(request: Any, context: grpc.ServicerContext) -> Any:
        try:
            return method(request)
        except KedgeError as error:
            context.abort_with_status(RichStatus(error))

    return answer


Streaming = Callable[[Any, grpc.ServicerContext], Iterator[Any]]


def _streaming(method: Streaming) -> Streaming:
    def answer(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        try:
            yield from method(request, context)
        except KedgeError as error:
            context.abort_with_status(RichStatus(error))

    return answer


class RichStatus(grpc.Status):
    """A status with its details, as the wire contract has it."""

    def __init__(self, error: KedgeError) -> None:
        self.code = getattr(grpc.StatusCode, error.entry.status)
        self.details = error.message
        info = any_pb2.Any()
        info.Pack(error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=error.metadata))
        status = status_pb2.Status(code=self.code.value[0], message=error.message, details=[info])
        self.trailing_metadata = (("grpc-status-details-bin", status.SerializeToString()),)
