"""Checkpoints as the SDK asks for them, directly and over gRPC. The server at the other end keeps what it is told."""

import numpy as np
import pytest
from bridge import behind_grpc
from faulty_transport import grad
from keeping_server import NAME, OLDER, TAKEN, Keeping

import kedge
from kedge.client import Client
from kedge.errors import KedgeError
from kedge.retry import Retrier
from kedge.transport.grpc import GrpcTransport


@pytest.fixture
def server(transport):
    return Keeping(transport)


@pytest.fixture(params=["direct", "grpc"])
def held(request, run, server):
    """The run of the server."""
    if request.param == "direct":
        yield Client(server, Retrier(10.0, wait=lambda _: None)).get_run("r")
        return
    with (
        behind_grpc(server) as address,
        Client(GrpcTransport(address), Retrier(10.0, wait=lambda _: None)) as client,
    ):
        yield client.get_run("r")


def test_checkpoint_is_taken_with_its_metrics(held, server):
    assert held.checkpoint({"accuracy": np.float32(1.0)}) == TAKEN
    assert held.checkpoint() == TAKEN
    assert server.calls == [("runs/r", {"accuracy": 1.0}), ("runs/r", {})]


def test_checkpoints_are_listed(held, server):
    assert held.checkpoints() == [TAKEN, OLDER]


@pytest.mark.parametrize("checkpoint", [TAKEN, NAME, "5-9"], ids=["value", "name", "id"])
def test_checkpoint_is_named_in_three_ways(held, server, checkpoint):
    assert held.restore(checkpoint) == 5
    assert held.fork(checkpoint, "new").name == "runs/new"
    assert held.fork(checkpoint, "runs/new").name == "runs/new"
    assert [call[:-1] for call in server.calls] == [(NAME,), (NAME, "new"), (NAME, "new")]


@pytest.mark.parametrize("ask", [lambda run: run.restore("5-9"), lambda run: run.fork("5-9", "new")])
def test_repeated_attempt_is_the_same_request(held, server, ask):
    server.answers_lost = 2
    ask(held)
    ask(held)
    ids = [call[-1] for call in server.calls]
    assert ids[0] == ids[1] == ids[2] != ids[3]
    assert all(0 < len(each) <= 64 for each in ids)


def test_fork_has_the_structure_of_the_run(transport, server, run):
    held = Client(server, Retrier(10.0)).get_run("r", like={"w": np.zeros(1, np.float32)})
    forked = held.fork(TAKEN, "new")
    assert (forked.manifest, forked.optimizer) == (run.manifest, run.optimizer)
    with pytest.raises(KedgeError) as error:  # there is no such run at the fake server
        forked.pull()
    assert error.value.reason == "RUN_NOT_FOUND"


@pytest.mark.parametrize(
    ("metrics", "error", "text"),
    [
        ({"a": float("nan")}, ValueError, r"^metrics\['a'\] is nan: it must be finite"),
        ({"a": float("inf")}, ValueError, r"^metrics\['a'\] is inf: it must be finite"),
        ({"a": "high"}, TypeError, r"^metrics\['a'\] is 'high': it must be one number"),
        ({"": 1.0}, ValueError, "^metrics has the name '': give one of 1 to 64 characters"),
        ({"x" * 65: 1.0}, ValueError, "^metrics has the name 'xxx"),
        ({1: 1.0}, ValueError, "^metrics has the name 1: "),
        ({str(i): 1.0 for i in range(33)}, ValueError, "^metrics has 33 names: it may have 32"),
        ([1.0], TypeError, r"^metrics is \[1.0\]: give names and numbers"),
    ],
)
def test_what_can_be_no_metrics_is_refused_before_anything_is_sent(held, server, metrics, error, text):
    with pytest.raises(error, match=text):
        held.checkpoint(metrics)
    assert server.calls == []


@pytest.mark.parametrize(
    ("checkpoint", "error", "text"),
    [
        ("runs/other/checkpoints/5-9", ValueError, "^checkpoint is 'runs/other/checkpoints/5-9': it is none of runs/r"),
        ("runs/r/workers/5-9", KedgeError, "is not the name of a checkpoint"),
        ("5.9", KedgeError, "cannot name a checkpoint"),
        ("-5", KedgeError, "cannot name a checkpoint"),
        ("x" * 64, KedgeError, "cannot name a checkpoint"),
        ("", KedgeError, "cannot name a checkpoint"),
        (5, TypeError, "^checkpoint is 5: give what checkpoints"),
    ],
)
def test_what_names_no_checkpoint_of_the_run_is_refused_before_anything_is_sent(held, server, checkpoint, error, text):
    for ask in (held.restore, lambda each: held.fork(each, "new")):
        with pytest.raises(error, match=text):
            ask(checkpoint)
    assert server.calls == []


def test_fork_needs_a_name_that_can_be_one(held, server):
    with pytest.raises(KedgeError) as error:
        held.fork("5-9", "not/a name")
    assert error.value.reason == "INVALID_NAME"
    assert server.calls == []


def test_other_durability_than_the_runs_own_is_warned_of_where_it_was_asked_for(transport, run, caplog):
    client = Client(transport, Retrier(1.0))
    model = {"params": grad(), "optimizer": run.optimizer, "aggregation": run.aggregation}
    client.get_or_create_run("r", **model)
    client.get_or_create_run("r", **model, durability="memory", checkpoints=kedge.Checkpoints())
    assert "keeps its" not in caplog.text

    checkpoints = kedge.Checkpoints(every_steps=5)
    opened = client.get_or_create_run("r", **model, durability="journal", checkpoints=checkpoints)
    assert opened.durability == "memory"
    assert "keeps its durability: it has memory, asked for is journal" in caplog.text
    assert "keeps its checkpoints: it has Checkpoints(every_steps=None, " in caplog.text


def test_checkpoints_that_differ_by_the_rounding_of_the_wire_alone_are_the_same(transport, caplog):
    client = Client(transport, Retrier(1.0))
    settings = {"optimizer": kedge.optim.SGD(), "aggregation": kedge.Asynchronous()}
    client.create_run("s", params=grad(), checkpoints=kedge.Checkpoints(every_seconds=0.333333333), **settings)
    client.get_or_create_run("s", params=grad(), checkpoints=kedge.Checkpoints(every_seconds=1 / 3), **settings)
    assert "keeps its" not in caplog.text


@pytest.mark.parametrize(
    ("setting", "error", "text"),
    [
        ({"durability": "disk"}, ValueError, "^durability is 'disk': it must be None or one of 'memory', 'checkpoint'"),
        ({"durability": True}, ValueError, "^durability is True"),
        ({"checkpoints": 5}, TypeError, "^checkpoints is 5: give kedge.Checkpoints"),
    ],
)
def test_setting_that_is_none_is_refused_where_it_is_given(transport, setting, error, text):
    client = Client(transport, Retrier(1.0))
    for create in (client.create_run, client.get_or_create_run):
        with pytest.raises(error, match=text):
            create("s", params=grad(), optimizer=kedge.optim.SGD(), aggregation=kedge.Asynchronous(), **setting)
    assert transport.list_runs() == []
