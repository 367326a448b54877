"""Uploads that end too soon, go on too long, or meet a change of their run: the whole state before and after."""

import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import grpc
import numpy as np
import pytest
from wire_client import WireClient, chunks, crc32c

from kedge.v1 import optimizer_service_pb2 as pb
from kedge.v1 import run_pb2, run_service_pb2, tensor_pb2

from .test_bad_contributions import (
    LONG,
    NEVER,
    PUSH,
    WAYS,
    World,
    a_world,
    assert_refused,
    assert_unchanged,
)
from .test_bad_input import GOOD, GRADIENT, NAN, WEIGHTS, Target, as_exchange, chunk, trailer

_SERVER_PREFACE = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])  # an empty SETTINGS frame: what a client waits for


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with a_world() as world:
        yield world


def in_pieces(target: Target) -> list[Any]:
    """A good push, an element a chunk."""
    return [target.header(), *chunks(PUSH, GOOD, 4), trailer(crc32c(GOOD))]


PIECES = 6


@pytest.mark.parametrize("count", range(PIECES))
def test_call_cancelled_after_so_many_messages_changes_nothing(
    world: World, eventually: Callable[..., None], count: int
) -> None:
    requests, before, lent = in_pieces(world.target()), world.server.state(), world.server.lent_buffer_count()
    assert len(requests) == PIECES
    are_sent, may_end = threading.Event(), threading.Event()

    def stream() -> Iterator[bytes]:
        yield from (message.SerializeToString() for message in requests[:count])
        are_sent.set()
        may_end.wait(30)

    call = world.wire.channel.stream_unary("/kedge.v1.OptimizerService/PushGradients").future(stream(), timeout=30)
    assert are_sent.wait(30)
    world.wire.run(world.run.name)  # on the same connection, so that the messages have arrived before
    if count > 1:  # a buffer is lent to an upload that has begun
        eventually(lambda: world.server.lent_buffer_count() == lent + 1)
    call.cancel()
    may_end.set()
    eventually(lambda: world.server.lent_buffer_count() == lent)
    assert_unchanged(world, before)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("count", range(1, PIECES))
def test_stream_that_ends_after_so_many_messages_is_refused_and_changes_nothing(
    world: World, count: int, way: str
) -> None:
    requests, before = in_pieces(world.target())[:count], world.server.state()
    with pytest.raises(grpc.RpcError) as caught:
        WAYS[way](world, requests)
    assert_refused(caught.value, "UNEXPECTED_MESSAGE")
    assert_unchanged(world, before)


def bytes_sent(requests: list[Any]) -> bytes:
    """What a client puts on its connection for a push, up to the last byte of the trailer."""
    end = requests[-1].SerializeToString()
    data = bytearray()

    def take(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            connection.sendall(_SERVER_PREFACE)
            while not data.endswith(end):
                data.extend(connection.recv(1))

    with socket.create_server(("127.0.0.1", 0)) as listener:
        taker = threading.Thread(target=take, args=(listener,))
        taker.start()
        with closing(WireClient(f"127.0.0.1:{listener.getsockname()[1]}")) as client, pytest.raises(grpc.RpcError):
            client.push(requests)
        taker.join(30)
    return bytes(data)


def connected(world: World, data: bytes) -> socket.socket:
    """A connection on which these bytes were sent."""
    host, port = world.server.address.rsplit(":", 1)
    connection = socket.create_connection((host, int(port)), timeout=30)
    connection.sendall(data)
    return connection


def test_connection_cut_after_any_byte_changes_nothing_until_the_last(
    world: World, eventually: Callable[..., None]
) -> None:
    run, lent = world.wire.create("cut", WEIGHTS), world.server.lent_buffer_count()
    target = Target(world.wire, run, world.wire.join(run.name, "w", lease=LONG), 0, 1)
    data, before, seen = bytes_sent(in_pieces(target)), world.server.state(), set()
    for count in (*range(1, len(data), 7), len(data) - 1):
        with connected(world, data[:count]) as connection:
            world.wire.run(run.name)  # time for the server to read them
            seen.add(world.server.lent_buffer_count() - lent)
            if count % 2:  # RST, else FIN
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        eventually(lambda: world.server.lent_buffer_count() == lent)
        assert_unchanged(world, before)
    assert seen == {0, 1}, "some were cut in the middle of the upload"
    with connected(world, data):
        eventually(lambda: world.wire.run(run.name).state.step == 1)
    assert world.wire.pull(run.name)[1].tolist() == (WEIGHTS - GRADIENT).tolist()


@pytest.mark.parametrize("extra", [chunk(0, GOOD), trailer(crc32c(GOOD)), trailer(0)], ids=["chunk", "same", "other"])
def test_what_follows_the_trailer_is_refused_and_changes_nothing(world: World, extra: Any) -> None:
    held = world.target("good")
    again = held.good(sequence=held.sequence - 1)  # a repetition is answered with what is recorded
    before = world.server.state()
    answers = []
    with pytest.raises(grpc.RpcError) as caught:
        answers.extend(world.wire.call("OptimizerService", "Exchange", map(as_exchange, [*again, extra])))
    assert_refused(caught.value, "UNEXPECTED_MESSAGE")
    assert [answer.result.outcome for answer in answers] == [pb.PUSH_OUTCOME_DEFERRED]
    assert world.wire.push([*again, extra]).outcome == pb.PUSH_OUTCOME_DEFERRED
    assert_unchanged(world, before)


def supersede(wire: WireClient, worker: str) -> None:
    run, _, worker_id = worker.partition("/workers/")
    wire.join(run, worker_id, lease=LONG)


def evict(wire: WireClient, worker: str) -> None:
    wire.call("RunService", "EvictWorker", run_service_pb2.EvictWorkerRequest(worker=worker))


def delete(wire: WireClient, worker: str) -> None:
    run, _, _ = worker.partition("/workers/")
    wire.call("RunService", "DeleteRun", run_service_pb2.DeleteRunRequest(name=run))


@pytest.mark.parametrize(
    ("change", "reason"),
    [(supersede, "WORKER_SUPERSEDED"), (evict, "WORKER_EVICTED"), (delete, "RUN_NOT_FOUND")],
)
@pytest.mark.parametrize("count", range(1, PIECES))
def test_upload_that_outlives_its_lease_or_run_is_refused_and_adds_nothing(
    world: World, run_id: str, change: Callable[..., None], reason: str, count: int
) -> None:
    run = world.wire.create(run_id, WEIGHTS)
    target = Target(world.wire, run, world.wire.join(run.name, "w", lease=LONG), 0, 1)
    states = []

    def stream() -> Iterator[Any]:
        requests = in_pieces(target)
        yield from requests[:count]
        world.wire.run(run.name)
        change(world.wire, target.lease.worker)
        states.append(world.server.state())
        yield from requests[count:]

    with pytest.raises(grpc.RpcError) as caught:
        world.wire.push(stream())
    assert_refused(caught.value, reason)
    assert_unchanged(world, states[0])
    if change is not delete:
        delete(world.wire, target.lease.worker)


def test_sequence_whose_result_is_forgotten_is_refused_and_not_applied_again(world: World, run_id: str) -> None:
    run = world.wire.create(run_id, WEIGHTS)
    target = Target(world.wire, run, world.wire.join(run.name, "w", lease=LONG), 0, 1)
    poison = [message for n in range(1, 67) for message in target.good(GRADIENT * np.float32(NAN), sequence=n)]
    assert len(world.exchange(poison)) == 66
    before = world.server.state()
    for sequence in (1, 2):
        with pytest.raises(grpc.RpcError) as caught:
            world.wire.push(target.good(sequence=sequence))
        assert_refused(caught.value, "SEQUENCE_FORGOTTEN")
    assert world.wire.push(target.good(sequence=3)).reason == "NON_FINITE_GRADIENT"  # the oldest that is kept
    assert_unchanged(world, before)
    delete(world.wire, target.lease.worker)


def test_epoch_that_is_forgotten_is_refused(world: World, run_id: str) -> None:
    run = world.wire.create(run_id, WEIGHTS)
    first = Target(world.wire, run, world.wire.join(run.name, "w", lease=LONG), 0, 1)

    async def come_and_go() -> None:
        engine, registry = world.server.registry.get(run.name), world.server.registry
        engine.leave("w", first.lease.epoch)
        for number in range(1024):  # as many past leases as are remembered
            epoch = registry.next_epoch()
            engine.join(f"w{number}", epoch=epoch, duration_seconds=60)
            engine.leave(f"w{number}", epoch)

    world.server.call(come_and_go())
    before = world.server.state()
    with pytest.raises(grpc.RpcError) as caught:
        world.wire.push(first.good())
    assert_refused(caught.value, "EPOCH_FORGOTTEN")
    assert_unchanged(world, before)
    delete(world.wire, first.lease.worker)


BAD_HEADERS: dict[str, tuple[str, dict[str, Any]]] = {
    "wait negative": ("INVALID_CONFIGURATION", {"wait": NEVER}),
    "its pull's dtype is unknown": ("UNSUPPORTED_DTYPE", {"pull": pb.PullSpec(dtype=64)}),
    "its pull waits a negative time": ("INVALID_CONFIGURATION", {"pull": pb.PullSpec(wait=NEVER)}),
    "its pull wants slow weights of none": ("NO_SLOW_WEIGHTS", {"pull": pb.PullSpec(weights=tensor_pb2.WEIGHTS_SLOW)}),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_push_whose_answer_cannot_be_given_is_refused_before_it_is_taken(world: World, run_id: str, case: str) -> None:
    reason, fields = BAD_HEADERS[case]
    run = world.wire.create(run_id, WEIGHTS)
    target = Target(world.wire, run, world.wire.join(run.name, "w", lease=LONG), 0, 1)
    before = world.server.state()
    try:
        with pytest.raises(grpc.RpcError) as caught:
            world.exchange(target.good(**fields))
        assert_refused(caught.value, reason)
        assert_unchanged(world, before)
    finally:
        delete(world.wire, target.lease.worker)


AGGREGATIONS = {
    "scaling": run_pb2.Aggregation(asynchronous=run_pb2.Asynchronous(scaling=77)),
    "buffer's scaling": run_pb2.Aggregation(buffered=run_pb2.Buffered(size=2, scaling=77)),
}


@pytest.mark.parametrize("case", AGGREGATIONS)
def test_scaling_that_this_server_does_not_know_is_refused(world: World, run_id: str, case: str) -> None:
    run = world.wire.create(run_id, WEIGHTS)
    request = run_service_pb2.UpdateRunRequest(name=run.name, aggregation=AGGREGATIONS[case])
    before = world.server.state()
    with pytest.raises(grpc.RpcError) as caught:
        world.call("UpdateRun", request)
    assert_refused(caught.value, "INVALID_CONFIGURATION")
    assert_unchanged(world, before)


def test_weights_that_this_server_does_not_know_are_refused(world: World) -> None:
    before = world.server.state()
    with pytest.raises(grpc.RpcError) as caught:
        world.wire.pull(world.run.name, weights=77)
    assert_refused(caught.value, "INVALID_CONFIGURATION")
    assert_unchanged(world, before)
