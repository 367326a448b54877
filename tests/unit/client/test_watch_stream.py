"""What the gRPC transport asks for and makes of the answers: events, changes of a run, evictions."""

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp

import kedge
from kedge.errors import KedgeError
from kedge.transport import Event, RunUpdate, WatchStart
from kedge.transport.grpc import GrpcTransport
from kedge.v1 import run_pb2
from kedge.v1 import run_service_pb2 as pb

# Written as the bytes of a message, so that the numbers of the fields are held too: number 3, kind 5 (evicted), step 2,
# worker, epoch 7, reason and message.
EVICTED = b"\x08\x03\x18\x05\x20\x02\x2a\x10runs/r/workers/a\x30\x07\x3a\x0eWORKER_EVICTED\x42\x03why"  # no time: 1970


class Server:
    """Answers WatchRun with these messages and then ends, with `code` or not; or waits until the watcher leaves."""

    def __init__(self, *answers, code=None, stays=False):
        self.requests = []
        self.left = threading.Event()
        self._answers, self._code, self._stays = answers, code, stays
        self._server = grpc.server(ThreadPoolExecutor(4))
        handlers = {
            "WatchRun": grpc.unary_stream_rpc_method_handler(self._watch),
            "UpdateRun": grpc.unary_unary_rpc_method_handler(self._answering(pb.UpdateRunResponse(step=8))),
            "EvictWorker": grpc.unary_unary_rpc_method_handler(self._answering(pb.EvictWorkerResponse())),
        }
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("kedge.v1.RunService", handlers),))
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def _watch(self, request, context):
        context.add_callback(self.left.set)
        self.requests.append(request)
        yield from (answer if isinstance(answer, bytes) else answer.SerializeToString() for answer in self._answers)
        if self._stays:
            self.left.wait(30)
        if self._code is not None:
            context.abort(self._code, "as the test wants it")

    def _answering(self, answer):
        def method(request, _):
            self.requests.append(request)
            return answer.SerializeToString()

        return method

    def stop(self):
        self._server.stop(0).wait()


@pytest.fixture
def serve():
    """Starts such a server, and gives it with a transport to it."""
    opened = []

    def start(*answers, **options):
        server = Server(*answers, **options)
        transport = GrpcTransport(server.address)
        opened.extend([transport.close, server.stop])
        return server, transport

    yield start
    for close in opened:
        close()


def events(*messages):
    return pb.WatchRunResponse(events=messages)


def message(number, kind=run_pb2.EVENT_KIND_STEP, **fields):
    return run_pb2.Event(number=number, kind=kind, time=Timestamp(seconds=86_400), **fields)


BEGUN = pb.WatchRunResponse()


def test_event_is_read_from_its_bytes(serve):
    _, transport = serve(BEGUN, b"\x0a" + bytes([len(EVICTED)]) + EVICTED)
    assert next(transport.watch("runs/r", WatchStart())) == Event(
        number=3,
        time=datetime(1970, 1, 1, tzinfo=UTC),
        kind="evicted",
        step=2,
        worker="runs/r/workers/a",
        epoch=7,
        reason="WORKER_EVICTED",
        message="why",
    )


def test_events_are_read_one_by_one_with_all_that_they_tell(serve):
    changed = run_pb2.Aggregation(bounded_staleness=run_pb2.BoundedStaleness(bound=4))
    _, transport = serve(
        events(message(1, step=1, contribution_count=3, loss=0.0, reason="QUORUM_REACHED"), message(2, step=2)),
        BEGUN,
        events(message(3, run_pb2.EVENT_KIND_AGGREGATION_CHANGED, aggregation=changed)),
        events(message(9, run_pb2.EVENT_KIND_SUMMARY, skipped_counts={"STEP": 4, "LOOKAHEAD_SYNC": 2})),
    )
    watch = transport.watch("runs/r", WatchStart())
    first, second, third, fourth = (next(watch) for _ in range(4))
    day = datetime(1970, 1, 2, tzinfo=UTC)
    assert first == Event(
        number=1, time=day, kind="step", step=1, reason="QUORUM_REACHED", contribution_count=3, loss=0.0
    )
    assert second == Event(number=2, time=day, kind="step", step=2, loss=None)
    assert (third.kind, third.aggregation) == ("aggregation_changed", kedge.BoundedStaleness(bound=4))
    assert (fourth.kind, fourth.skipped_counts) == ("summary", {"step": 4, "lookahead_sync": 2})


def test_event_of_a_kind_that_only_a_newer_server_knows_is_passed_over(serve):
    _, transport = serve(BEGUN, events(message(1, 99), message(2)))
    assert next(transport.watch("runs/r", WatchStart())).number == 2


def test_generation_of_the_server_is_told_and_asked_for(serve):
    server, transport = serve(pb.WatchRunResponse(last_number=12, server_generation=3))
    watch = transport.watch("runs/r", WatchStart(after_number=12, server_generation=2))
    assert (watch.last_number, watch.server_generation) == (12, 3)
    (raw,) = server.requests
    assert pb.WatchRunRequest.FromString(raw).server_generation == 2


def test_checkpoints_are_told_of(serve):
    name = "runs/r/checkpoints/5-9"
    _, transport = serve(
        BEGUN,
        events(
            message(1, run_pb2.EVENT_KIND_RECOVERED, step=5, message="from the journal"),
            message(2, run_pb2.EVENT_KIND_CHECKPOINT, step=5, checkpoint=name),
            message(3, run_pb2.EVENT_KIND_RESTORED, step=5, checkpoint=name),
        ),
    )
    watch = transport.watch("runs/r", WatchStart())
    told = [next(watch) for _ in range(3)]
    assert [event.kind for event in told] == ["recovered", "checkpoint", "restored"]
    assert [event.checkpoint for event in told] == ["", name, name]
    assert told[0].message == "from the journal"


@pytest.mark.parametrize(
    ("start", "field", "value"),
    [
        (WatchStart(), None, None),
        (WatchStart(from_step=0), "from_step", 0),
        (WatchStart(after_number=0), "after_number", 0),
        (WatchStart(after_number=12), "after_number", 12),
    ],
)
def test_beginning_is_asked_for(serve, start, field, value):
    server, transport = serve(BEGUN)
    transport.watch("runs/r", start)
    (raw,) = server.requests
    request = pb.WatchRunRequest.FromString(raw)
    assert request.name == "runs/r"
    assert request.WhichOneof("start") == field
    assert field is None or getattr(request, field) == value


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (None, "SERVER_UNAVAILABLE"),  # a server that drains may end a stream in good order
        (grpc.StatusCode.UNAVAILABLE, "SERVER_UNAVAILABLE"),
        (grpc.StatusCode.CANCELLED, "SERVER_UNAVAILABLE"),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "SERVER_UNAVAILABLE"),
        (grpc.StatusCode.UNKNOWN, "INTERNAL"),
    ],
)
def test_stream_that_ends_is_an_error(serve, code, reason):
    for answers in ([], [BEGUN], [events(message(1))]):
        _, transport = serve(*answers, code=code)
        with pytest.raises(KedgeError) as error:
            for _ in transport.watch("runs/r", WatchStart()):
                pass
        assert error.value.reason == reason


def test_message_that_cannot_be_read_is_an_error(serve):
    _, transport = serve(BEGUN, b"\xff\xff")
    with pytest.raises(KedgeError) as error:
        next(transport.watch("runs/r", WatchStart()))
    assert error.value.reason == "INTERNAL"


def test_server_that_cannot_watch_is_unsupported():
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    transport = GrpcTransport(f"127.0.0.1:{port}")
    with pytest.raises(KedgeError) as error:
        transport.watch("runs/r", WatchStart())
    assert error.value.reason == "UNSUPPORTED"
    transport.close()
    server.stop(0).wait()


def test_closing_from_another_thread_ends_a_watch_that_waits(serve, in_background):
    server, transport = serve(events(message(1)), stays=True)
    watch = transport.watch("runs/r", WatchStart())
    assert next(watch).number == 1
    waiting = in_background(next, watch)
    watch.close()
    with pytest.raises(KedgeError) as error:
        waiting.result(30)
    assert error.value.reason == "CANCELLED"
    assert server.left.wait(30)


def test_closed_watch_gives_no_event_that_has_come_before(serve):
    _, transport = serve(events(message(1), message(2)))
    watch = transport.watch("runs/r", WatchStart())
    assert next(watch).number == 1
    watch.close()
    watch.close()
    with pytest.raises(KedgeError) as error:
        next(watch)
    assert error.value.reason == "CANCELLED"


def test_closed_transport_ends_a_watch_that_waits(serve, in_background):
    _, transport = serve(BEGUN, stays=True)
    waiting = in_background(next, transport.watch("runs/r", WatchStart()))
    transport.close()
    with pytest.raises(KedgeError) as error:
        waiting.result(30)
    assert error.value.reason == "CANCELLED"


def test_forgotten_watch_leaves_the_server(serve):
    server, transport = serve(BEGUN, stays=True)
    transport.watch("runs/r", WatchStart())
    assert server.left.wait(30)


def test_change_of_a_run_says_what_changes_and_nothing_else(serve):
    server, transport = serve()
    assert transport.update_run("runs/r", RunUpdate(aggregation=kedge.Buffered(size=3)), request_id="x") == 8
    transport.update_run("runs/r", RunUpdate(admission=kedge.Admission(max_norm=0.5)), request_id="y")
    first, second = (pb.UpdateRunRequest.FromString(raw) for raw in server.requests)
    assert (first.name, first.request_id, first.aggregation.buffered.size) == ("runs/r", "x", 3)
    assert not first.HasField("admission")
    assert not first.HasField("hyperparameters")
    assert (second.request_id, second.admission.max_norm) == ("y", 0.5)
    assert not second.HasField("aggregation")


def test_eviction_says_for_how_long_the_name_is_blocked(serve):
    server, transport = serve()
    transport.evict("runs/r/workers/a", "why", 2.5, request_id="x")
    transport.evict("runs/r/workers/a", "", None, request_id="y")
    first, second = (pb.EvictWorkerRequest.FromString(raw) for raw in server.requests)
    assert (first.worker, first.cause, first.request_id) == ("runs/r/workers/a", "why", "x")
    assert second.request_id == "y"
    assert first.block.ToMilliseconds() == 2500
    assert not second.HasField("block")
