"""The transport over gRPC. The only module besides its neighbours in this package that touches grpc and protobuf."""

import logging
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

import grpc
from google.protobuf.message import Message

from kedge.optim.controls import Change
from kedge.transport import Channel, convert
from kedge.transport.channels import Channels, Connection
from kedge.transport.credentials import Credentials
from kedge.transport.memory import LentMemory, Offer, unavailable
from kedge.transport.probe import Diagnosis
from kedge.transport.status import cancelled_error, error_from_rpc, internal_error
from kedge.transport.stream import ErrorOf, GrpcExchange, GrpcWatch, answers, messages_of, read_weights, reported
from kedge.transport.values import (
    Checkpoint,
    Lease,
    NewRun,
    PullRequest,
    RunInfo,
    RunUpdate,
    WatchStart,
    WeightsOfStep,
)
from kedge.v1 import checkpoint_service_pb2, optimizer_service_pb2, run_pb2, run_service_pb2
from kedge.wire.allocation import keep_freed_memory
from kedge.wire.codec import (
    MAX_MESSAGE_BYTES,
    FlatEncoder,
    Malformed,
    parse_message,
    serialize,
    stream_parser,
)
from kedge.wire.convert import duration_to_wire
from kedge.wire.errors import KedgeError, Retry
from kedge.wire.groups import change_to_wire
from kedge.wire.manifest import Manifest

CALL_TIMEOUT_SECONDS = 30.0
"""The deadline of calls that carry no tensors and wait for nothing."""

HEARTBEAT_TIMEOUT_SECONDS = 3.0
"""The most that the answer to a heartbeat is waited for: lost connections are noticed by it."""

_LIST_PAGE_SIZE = 1000
_READY_POLL_SECONDS = 0.1
_FIRST_PATIENCE_SECONDS = 1.0
_CHECKPOINTS = "CheckpointService"

CHANNEL_OPTIONS: tuple[tuple[str, int | str], ...] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.max_frame_size", (16 << 20) - 1),
    ("grpc.http2.lookahead_bytes", 8 << 20),
    ("grpc.http2.write_buffer_size", 8 << 20),
    ("grpc.optimization_target", "throughput"),
    ("grpc.use_local_subchannel_pool", 1),  # else channels to one address share a connection
    ("grpc.enable_retries", 0),  # gRPC never retries large messages; kedge.retry does
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 2_000),  # what its name does not say: how long connecting may take
    ("grpc.max_reconnect_backoff_ms", 1_000),
)

MessageT = TypeVar("MessageT", bound=Message)

_logger = logging.getLogger("kedge")


class GrpcTransport:
    """A server at an address, over one connection, and another for heartbeats once there is a worker.

    Args:
        address: host:port, or any target that gRPC resolves.
        credentials: what is shown there, and who is trusted.
    """

    def __init__(self, address: str, credentials: Credentials | None = None) -> None:
        keep_freed_memory()
        held = credentials or Credentials()
        self._address = address
        self._is_secure = held.is_secure
        self._diagnosis = Diagnosis(address, held)
        self._channels = Channels(lambda: held.channel(address, CHANNEL_OPTIONS), credentials=held)

    def wait_until_ready(self, timeout_seconds: float) -> None:
        """Returns once the server has answered a small question.

        Raises:
            KedgeError: SERVER_UNAVAILABLE; TLS_FAILED, as soon as that is seen; UNAUTHENTICATED; UNSUPPORTED if it is
                no Kedge server.
        """
        give_up_at, patience = time.monotonic() + timeout_seconds, _FIRST_PATIENCE_SECONDS
        request = run_service_pb2.ListRunsRequest(page_size=1)
        answer = run_service_pb2.ListRunsResponse
        while True:
            remaining = max(give_up_at - time.monotonic(), 0.0)
            try:
                self._call("ListRuns", request, answer, timeout_seconds=min(remaining, patience), wait_for_ready=True)
                return
            except KedgeError as error:
                if error.entry.retry is not Retry.BACKOFF:
                    raise
                # gRPC itself would try until the end, and say no more than that there is no connection.
                diagnosed = self._diagnosis.of(error, min(max(remaining, _READY_POLL_SECONDS), patience))
                if diagnosed.reason == "TLS_FAILED":
                    raise diagnosed from None
                patience *= 2  # a server that is slow to answer is not asked anew for ever
                if time.monotonic() >= give_up_at:
                    raise self._unreachable(timeout_seconds, error) from None
            time.sleep(_READY_POLL_SECONDS)

    def create_run(self, run: NewRun) -> RunInfo:
        """Creates a run."""
        dtype = _creation_dtype(run)
        encoder = FlatEncoder(run.arrays, dtype)
        header = run_service_pb2.CreateRunRequest(header=convert.create_header(run, dtype))
        connection = self._channels.main
        call = connection.channel.stream_unary(
            "/kedge.v1.RunService/CreateRun",
            request_serializer=serialize,
            response_deserializer=_parser(run_service_pb2.CreateRunResponse),
        )
        messages = reported(messages_of(header, encoder, run_service_pb2.CreateRunRequest), connection)
        response = self._invoke(connection, lambda: call(messages, metadata=connection.metadata))
        return convert.run_info(response.run)

    def get_run(self, name: str, *, with_manifest: bool = True) -> RunInfo:
        """Reads one run. Without its manifest it is small: the heartbeats' thread, which asks so, is not held up."""
        view = run_pb2.RUN_VIEW_FULL if with_manifest else run_pb2.RUN_VIEW_BASIC
        request = run_service_pb2.GetRunRequest(name=name, view=view)
        connection = self._channels.main if with_manifest else self._channels.unhindered
        response = self._call("GetRun", request, run_service_pb2.GetRunResponse, connection=connection)
        return convert.run_info(response.run)

    def list_runs(self) -> list[RunInfo]:
        """Reads all runs, page by page."""
        runs: list[RunInfo] = []
        request = run_service_pb2.ListRunsRequest(page_size=_LIST_PAGE_SIZE)
        while True:
            response = self._call("ListRuns", request, run_service_pb2.ListRunsResponse)
            runs.extend(convert.run_info(run) for run in response.runs)
            if not response.next_page_token:
                return runs
            request.page_token = response.next_page_token

    def delete_run(self, name: str) -> None:
        """Deletes a run."""
        request = run_service_pb2.DeleteRunRequest(name=name)
        self._call("DeleteRun", request, run_service_pb2.DeleteRunResponse)

    def set_hyperparameters(self, run: str, group: str, change: Change, *, request_id: str) -> int:
        """Changes a live run."""
        request = run_service_pb2.UpdateRunRequest(
            name=run, hyperparameters=change_to_wire(group, change), request_id=request_id
        )
        return self._call("UpdateRun", request, run_service_pb2.UpdateRunResponse).step

    def update_run(self, run: str, update: RunUpdate, *, request_id: str) -> int:
        """Changes the aggregation or the admission of a live run."""
        request = convert.update_request(run, update, request_id)
        return self._call("UpdateRun", request, run_service_pb2.UpdateRunResponse).step

    def tick_schedule(self, run: str, group: str, *, to: int | None, request_id: str) -> int:
        """Ticks a schedule by hand."""
        request = run_service_pb2.TickScheduleRequest(name=run, group=group, to_tick=to, request_id=request_id)
        return self._call("TickSchedule", request, run_service_pb2.TickScheduleResponse).tick

    def join(self, run: str, worker_id: str, lease_seconds: float | None) -> Lease:
        """Takes a lease."""
        request = run_service_pb2.JoinRunRequest(run=run, worker_id=worker_id, lease=duration_to_wire(lease_seconds))
        answer = run_service_pb2.JoinRunResponse
        return convert.lease(self._call("JoinRun", request, answer, connection=self._channels.for_beats()))

    def heartbeat(self, lease: Lease) -> None:
        """Renews a lease. It does not wait longer than one may last between two heartbeats."""
        request = run_service_pb2.HeartbeatRequest(worker=lease.worker, epoch=lease.epoch)
        answer = run_service_pb2.HeartbeatResponse
        timeout = min(HEARTBEAT_TIMEOUT_SECONDS, max(lease.lease_seconds / 3, 1.0))
        self._channels.beat(
            lambda beats: self._call("Heartbeat", request, answer, timeout_seconds=timeout, connection=beats)
        )

    def leave(self, lease: Lease) -> None:
        """Gives a lease back. It waits only briefly: a lease that is not given back ends by itself."""
        request = run_service_pb2.LeaveRunRequest(worker=lease.worker, epoch=lease.epoch)
        answer = run_service_pb2.LeaveRunResponse
        self._call("LeaveRun", request, answer, timeout_seconds=2.0, connection=self._channels.unhindered)

    def evict(self, worker: str, cause: str, block_seconds: float | None, *, request_id: str) -> None:
        """Ends a worker's lease from outside."""
        request = run_service_pb2.EvictWorkerRequest(
            worker=worker, cause=cause, block=duration_to_wire(block_seconds), request_id=request_id
        )
        self._call("EvictWorker", request, run_service_pb2.EvictWorkerResponse)

    def watch(self, run: str, start: WatchStart) -> GrpcWatch:
        """Tells what happens to a run. Returns when the server has said that the watch has begun."""
        connection = self._channels.main
        call = connection.channel.unary_stream(
            "/kedge.v1.RunService/WatchRun",
            request_serializer=serialize,
            response_deserializer=_parser(run_service_pb2.WatchRunResponse),
        )
        message = convert.watch_request(run, start)
        begun = self._invoke(connection, lambda: call(message, metadata=connection.metadata))
        watch: GrpcWatch = self._invoke(connection, lambda: GrpcWatch(begun, self._error_of(connection), connection))
        return watch

    def create_checkpoint(self, run: str, metrics: Mapping[str, float]) -> Checkpoint:
        """Takes a checkpoint."""
        request = checkpoint_service_pb2.CreateCheckpointRequest(run=run, metrics=metrics)
        response = self._call_storage("CreateCheckpoint", request, checkpoint_service_pb2.CreateCheckpointResponse)
        return convert.checkpoint(response.checkpoint)

    def list_checkpoints(self, run: str) -> list[Checkpoint]:
        """Reads the checkpoints of a run."""
        request = checkpoint_service_pb2.ListCheckpointsRequest(run=run)
        answer = checkpoint_service_pb2.ListCheckpointsResponse
        response = self._call("ListCheckpoints", request, answer, service=_CHECKPOINTS)
        return [convert.checkpoint(message) for message in response.checkpoints]

    def restore_checkpoint(self, name: str, *, request_id: str) -> int:
        """Lets a run go on from one of its checkpoints."""
        request = checkpoint_service_pb2.RestoreCheckpointRequest(name=name, request_id=request_id)
        return self._call_storage("RestoreCheckpoint", request, checkpoint_service_pb2.RestoreCheckpointResponse).step

    def fork_checkpoint(self, name: str, run_id: str, *, request_id: str) -> RunInfo:
        """Creates a run that begins with a checkpoint of another."""
        request = checkpoint_service_pb2.ForkCheckpointRequest(name=name, run_id=run_id, request_id=request_id)
        response = self._call_storage("ForkCheckpoint", request, checkpoint_service_pb2.ForkCheckpointResponse)
        return convert.run_info(response.run)

    def pull(self, run: str, manifest: Manifest, request: PullRequest) -> WeightsOfStep:
        """Fetches weights without a lease."""
        connection = self._channels.main
        call = connection.channel.unary_stream(
            "/kedge.v1.OptimizerService/PullWeights",
            request_serializer=serialize,
            response_deserializer=stream_parser(optimizer_service_pb2.PullWeightsResponse),
        )
        message = optimizer_service_pb2.PullWeightsRequest(run=run, pull=convert.pull_spec(request))
        stream = self._invoke(connection, lambda: call(message, metadata=connection.metadata))
        try:
            return read_weights(answers(stream, self._error_of(connection), connection), manifest)
        finally:
            stream.cancel()

    def open_exchange(self, manifest: Manifest, lease: Lease | None = None, channel: Channel = "grpc") -> GrpcExchange:
        """Opens the Exchange stream of one worker."""
        memory = None if lease is None or channel == "grpc" else self._lend(manifest, lease, channel)
        connection = self._channels.main
        error_of = self._error_of(connection)
        exchange: GrpcExchange = self._invoke(
            connection,
            lambda: GrpcExchange(
                connection,
                manifest,
                error_of if memory is None else self._after_lending(error_of),
                memory,
                is_outdated=lambda: self._channels.is_outdated(connection),
            ),
        )
        return exchange

    def _lend(self, manifest: Manifest, lease: Lease, channel: Channel) -> LentMemory | None:
        """Hands memory over to the server; None where that cannot be, unless it is insisted on."""
        try:
            return LentMemory(manifest, lambda: self._offer(lease))
        except KedgeError as error:
            if error.reason not in ("SHARED_MEMORY_UNAVAILABLE", "UNSUPPORTED"):
                raise
            if channel == "shared_memory":
                raise error if error.reason == "SHARED_MEMORY_UNAVAILABLE" else unavailable(error.message) from None
            _logger.debug("%s sends its payloads over gRPC: %s", lease.worker, error)
            return None

    def _offer(self, lease: Lease) -> Offer:
        request = optimizer_service_pb2.OfferMemoryRequest(worker=lease.worker, epoch=lease.epoch)
        answer = optimizer_service_pb2.OfferMemoryResponse
        offer = self._call(
            "OfferMemory", request, answer, connection=self._channels.unhindered, service="OptimizerService"
        )
        return Offer(offer.socket, offer.ticket)

    def close(self) -> None:
        """Ends every call and the connections."""
        self._channels.close()

    def _call_storage(self, method: str, request: Message, response_type: Callable[[], MessageT]) -> MessageT:
        """Makes one unary call of the CheckpointService. It has no deadline: how long files take is not known."""
        return self._call(method, request, response_type, timeout_seconds=None, service=_CHECKPOINTS)

    def _call(
        self,
        method: str,
        request: Message,
        response_type: Callable[[], MessageT],
        *,
        timeout_seconds: float | None = CALL_TIMEOUT_SECONDS,
        wait_for_ready: bool = False,
        connection: Connection | None = None,
        service: str = "RunService",
    ) -> MessageT:
        """Makes one unary call, on the main connection if none is given."""
        connection = connection or self._channels.main
        call = connection.channel.unary_unary(
            f"/kedge.v1.{service}/{method}",
            request_serializer=serialize,
            response_deserializer=_parser(response_type),
        )
        response: MessageT = self._invoke(
            connection,
            lambda: call(request, timeout=timeout_seconds, metadata=connection.metadata, wait_for_ready=wait_for_ready),
        )
        connection.heard()
        return response

    def _invoke(self, connection: Connection, call: Callable[[], Any]) -> Any:
        try:
            response = call()
        except grpc.RpcError as error:
            raise self._error(connection, error) from None
        except ValueError as error:
            raise self._refusal(error) from None
        if isinstance(response, Malformed):
            raise internal_error(f"the server sent a message that cannot be read: {response.detail}")
        return response

    def _unreachable(self, timeout_seconds: float, error: KedgeError) -> KedgeError:
        return KedgeError(
            "SERVER_UNAVAILABLE",
            f"tried for {timeout_seconds:g} s: {error.message}; start a server with `kedge-server serve`",
            address=self._address,
        )

    def _refusal(self, error: ValueError) -> Exception:
        """What gRPC's refusal to use a closed channel stands for, a bare ValueError; any other error as it is."""
        if not str(error).startswith("Cannot invoke RPC"):
            return error
        if self._channels.is_closed:
            return cancelled_error()
        message = f"the connection to {self._address} was lost, and is just made anew"
        return KedgeError("SERVER_UNAVAILABLE", message, address=self._address)

    def _error_of(self, connection: Connection) -> ErrorOf:
        """Makes errors of what gRPC raises for calls on a connection."""
        return partial(self._error, connection)

    def _error(self, connection: Connection, error: grpc.RpcError, *, is_closed: bool = False) -> KedgeError:
        is_closed = is_closed or self._channels.is_closed
        made = error_from_rpc(error, address=self._address, is_closed=is_closed)
        if is_closed:
            return made
        if made.reason == "UNAUTHENTICATED" and self._channels.is_outdated(connection, at_once=True):
            message = f"the call came with credentials that are no longer valid, and there are others by now: {made}"
            return KedgeError("SERVER_UNAVAILABLE", message, address=self._address)
        if self._is_secure and made.reason == "SERVER_UNAVAILABLE" and _is_unavailable(error):
            return self._diagnosis.of(made)
        return made

    def _after_lending(self, error_of: ErrorOf) -> ErrorOf:
        """The same errors, but for one: a ticket that the server took and does not know is of the one before."""

        def after_lending(error: grpc.RpcError, *, is_closed: bool = False) -> KedgeError:
            made = error_of(error, is_closed=is_closed)
            if made.reason != "SHARED_MEMORY_UNAVAILABLE":
                return made
            message = f"the server has lost the memory: {made.message}"
            return KedgeError("SERVER_UNAVAILABLE", message, address=self._address)

        return after_lending


def _is_unavailable(error: Any) -> bool:
    return bool(error.code() is grpc.StatusCode.UNAVAILABLE)


def _parser(message_type: Callable[[], MessageT]) -> Callable[[bytes], MessageT | Malformed]:
    return lambda raw: parse_message(message_type, raw)


def _creation_dtype(run: NewRun) -> str:
    """The dtype that holds every initial weight exactly in the fewest bytes."""
    dtypes = {spec.dtype for spec in run.manifest.tensors}
    return dtypes.pop() if len(dtypes) == 1 else "float32"
