"""The connections that the gRPC transport opens, replaces and closes, on real sockets."""

import contextlib
import threading

import numpy as np
import psutil
import pytest
from bridge import fake_server_behind_grpc
from faulty_transport import gone

import kedge
from kedge.errors import KedgeError
from kedge.transport import channels
from kedge.transport.grpc import GrpcTransport


@pytest.fixture
def address():
    with fake_server_behind_grpc() as address:
        yield address


@pytest.fixture
def client(address):
    with kedge.connect(address, retry_seconds=30) as client:
        yield client


@pytest.fixture
def run(client):
    return client.create_run(
        "r",
        params={"w": np.zeros(2, np.float32)},
        optimizer=kedge.optim.SGD(lr=1.0),
        aggregation=kedge.Synchronous(quorum=2),
    )


@pytest.fixture
def replace_main(client, monkeypatch):
    """Replaces the client's main connection, as after a lost heartbeat and one that was answered."""
    monkeypatch.setattr(channels, "QUIET_SECONDS", 0.0)

    def replace():
        of_client = client._transport._channels
        before = of_client.main

        def lose(_):
            raise gone()

        with contextlib.suppress(KedgeError):
            of_client.beat(lose)
        of_client.beat(lambda _: None)
        assert of_client.main is not before

    return replace


def connections_to(address):
    port = int(address.rpartition(":")[2])
    return [c.laddr for c in psutil.Process().net_connections("tcp") if c.raddr and c.raddr.port == port]


def test_client_without_a_worker_has_one_connection_and_with_workers_two(address, client, run):
    run.status()
    run.pull()
    with run.watch():
        assert len(connections_to(address)) == 1
        with run.join("a"), run.join("b"):
            run.status()
            assert len(connections_to(address)) == 2


def test_clients_share_no_connection(address, client):
    with kedge.connect(address):
        assert len(connections_to(address)) == 2


def test_closed_client_leaves_no_thread_and_no_descriptor(address, eventually):
    def use(name):
        with kedge.connect(address) as client:
            run = client.create_run(
                name, params=np.zeros(2, np.float32), optimizer=kedge.optim.SGD(), aggregation=kedge.Asynchronous()
            )
            with run.join("a", lease_seconds=0.1) as worker, run.watch():
                worker.pull()
                assert len(connections_to(address)) == 2
                worker.step(np.zeros(2, np.float32))

    process = psutil.Process()
    use("first")  # what gRPC and the server keep for good is made now
    eventually(lambda: not connections_to(address))
    before, descriptor_count = set(threading.enumerate()), process.num_fds()
    use("second")
    eventually(lambda: not connections_to(address))
    eventually(lambda: all("ThreadPool" in thread.name for thread in set(threading.enumerate()) - before))
    eventually(lambda: process.num_fds() <= descriptor_count)


def test_step_that_waits_goes_on_when_its_connection_is_replaced(client, run, replace_main, in_background, eventually):
    with run.join("a") as a, run.join("b") as b:
        a.pull(), b.pull()
        waiting = in_background(a.step, {"w": np.float32([1, 3])})
        eventually(lambda: run.status().round is not None)
        replace_main()
        assert not waiting.done()
        assert b.step({"w": np.float32([3, 5])})["w"].tolist() == [-2, -4]
        assert waiting.result(30)["w"].tolist() == [-2, -4]
        assert a.last_result.outcome == "applied"
    status = run.status()
    assert (status.applied_count, status.rejected_counts) == (2, {})


def test_watch_goes_on_when_its_connection_is_replaced(client, run, replace_main, in_background):
    with run.watch() as events:
        coming = in_background(next, events)
        replace_main()
        with run.join("a"):
            assert coming.result(30).worker == "runs/r/workers/a"


@pytest.mark.parametrize(
    "hear",
    [
        lambda client, run, worker: worker.pull(),
        lambda client, run, worker: run.pull(),
        lambda client, run, worker: run.watch().close(),
        lambda client, run, worker: client.list_runs(),
    ],
)
def test_whatever_comes_says_that_the_main_connection_lives(client, run, hear):
    main = client._transport._channels.main
    with run.join() as worker:
        main.heard_at = None
        hear(client, run, worker)
        assert main.heard_at is not None


def test_each_message_that_gRPC_has_sent_says_that_the_main_connection_may_live(client, run, eventually):
    sent = []
    client._transport._channels.main.sent = lambda: sent.append(1)
    with run.join() as worker:
        worker.pull()
        eventually(lambda: len(sent) == 1)
        worker.push({"w": np.ones(2, np.float32)})
        eventually(lambda: len(sent) == 1 + 3)  # header, chunk, trailer
        client.create_run("s", params=np.zeros(2, np.float32), optimizer=kedge.optim.SGD(), aggregation=run.aggregation)
        assert len(sent) >= 4 + 2  # whether gRPC asks for another after the trailer is a race with the answer


def test_state_of_a_run_waits_behind_no_upload_of_a_worker(client, run):
    with run.join("a"):
        client._transport._channels.main.channel.close()
        assert [worker.name for worker in run.status().workers] == ["runs/r/workers/a"]


def test_call_that_meets_a_connection_as_it_is_replaced_may_be_repeated(client, run):
    client._transport._channels.main.channel.close()
    for call in (
        client._transport.list_runs,
        lambda: client._transport.open_exchange(run.manifest),
        lambda: client._transport.watch(run.name, kedge.transport.WatchStart()),
    ):
        with pytest.raises(KedgeError, match="made anew") as error:
            call()
        assert error.value.reason == "SERVER_UNAVAILABLE"


def test_call_after_closing_is_cancelled(address, run):
    transport = GrpcTransport(address)
    transport.close()
    # gRPC words its refusal of streams in another way.
    for call in (transport.list_runs, lambda: transport.open_exchange(run.manifest)):
        with pytest.raises(KedgeError) as error:
            call()
        assert error.value.reason == "CANCELLED"
