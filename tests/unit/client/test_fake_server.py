import numpy as np
import pytest

import kedge
from kedge import testing
from kedge.errors import KedgeError, LeaseError, UnavailableError

ONE = {"w": np.ones(1, np.float32)}


class Time:
    now = 0.0

    def __call__(self):
        return self.now


def create(client, aggregation):
    return client.create_run("r", params=ONE, optimizer=kedge.optim.SGD(lr=1.0), aggregation=aggregation)


def test_servers_know_nothing_of_each_other():
    with testing.FakeServer() as one, testing.FakeServer() as other:
        create(one.connect(), kedge.Asynchronous())

        assert one.address != other.address
        assert other.connect().list_runs() == []
        assert [info.name for info in kedge.connect(one.address).list_runs()] == ["runs/r"]


def test_closed_server_is_unavailable_to_old_and_new_clients():
    with testing.FakeServer() as server:
        client = server.connect(retry_seconds=0.0)
    server.close()

    with pytest.raises(UnavailableError):
        client.list_runs()
    with pytest.raises(UnavailableError):
        kedge.connect(server.address)


def test_leases_and_rounds_go_by_the_clock_given():
    time = Time()
    with testing.FakeServer(clock=time) as server:
        run = create(server.connect(), kedge.Synchronous(quorum=3, timeout_seconds=20.0))
        with run.join(lease_seconds=60.0) as a, run.join(lease_seconds=10.0):
            a.push(ONE, base_step=0)
            time.now = 9.0
            assert len(run.status().workers) == 2
            time.now = 10.0
            assert len(run.status().workers) == 1
            time.now = 19.0
            assert run.status().step == 0
            time.now = 20.0
            assert run.status().step == 1


def test_timeouts_go_by_the_clock_given_also_for_those_that_wait(in_background, eventually):
    time = Time()
    with testing.FakeServer(clock=time) as server:
        run = create(server.connect(), kedge.Synchronous(quorum=2, timeout_seconds=1000.0))
        with run.join(lease_seconds=1e6) as worker:
            waiting = in_background(worker.push, ONE, base_step=0, wait_seconds=2000.0)
            eventually(lambda: run.status().round is not None)
            time.now = 1000.0
            assert waiting.result(30)[:3] == ("applied", "TIMEOUT", 1)


def test_waiting_for_the_slowest_goes_by_the_clock_given(in_background, eventually):
    time = Time()
    with testing.FakeServer(clock=time) as server:
        run = create(server.connect(), kedge.BoundedStaleness(0))
        with run.join("a", lease_seconds=1000.0) as a, run.join("b", lease_seconds=10.0):
            a.push(ONE, base_step=0)
            waiting = in_background(a.pull)
            assert f"{run.name}/workers/b" in run.status().waiting_for
            time.now = 10.0
            assert waiting.result(30)["w"] == [0.0]


def test_blocked_names_go_by_the_clock_given():
    time = Time()
    with testing.FakeServer(clock=time) as server:
        run = create(server.connect(), kedge.Asynchronous())
        with run.join("a"):
            run.evict("a", "a test", block_seconds=600.0)
        time.now = 599.0
        with pytest.raises(LeaseError) as error:
            run.join("a")
        assert "1 s" in str(error.value)
        time.now = 600.0
        run.join("a").close()


def test_quarantine_goes_by_the_clock_given():
    time = Time()
    with testing.FakeServer(clock=time) as server:
        run = create(server.connect(), kedge.Asynchronous())
        run.set_admission(kedge.Admission(quarantine_after=1))
        with run.join("a") as worker:
            worker.push({"w": np.full(1, np.nan, np.float32)}, base_step=0)
        time.now = 599.0
        with pytest.raises(LeaseError):
            run.join("a")
        time.now = 600.0
        run.join("a").close()


def test_closing_the_server_ends_a_watch(in_background):
    with testing.FakeServer() as server:
        run = create(server.connect(retry_seconds=0.0), kedge.Asynchronous())
        with run.watch() as watch:
            waiting = in_background(next, watch)
            server.close()
            with pytest.raises(UnavailableError):
                waiting.result(30)


def test_error_is_pickled_with_all_that_it_says():
    import pickle

    with testing.FakeServer() as server, pytest.raises(KedgeError) as error:
        server.connect().get_run("nowhere")
    copy = pickle.loads(pickle.dumps(error.value))

    assert (type(copy), copy.reason, str(copy), copy.metadata) == (
        type(error.value),
        "RUN_NOT_FOUND",
        str(error.value),
        {"run": "runs/nowhere"},
    )
