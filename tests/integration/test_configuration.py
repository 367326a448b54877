"""What only the server can refuse, or a client in another language sends: it is named, and nothing is created."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from server_process import ServerProcess
from wire_client import WireClient, error_info, floats, sgd

import kedge
from kedge import optim
from kedge.v1 import optimizer_pb2, run_pb2, run_service_pb2
from kedge.v1.schedule_pb2 import CosineAnnealingLR, ExponentialLR, LearningRate, StepLR

ALONE = kedge.Synchronous(quorum=1)
PARAMS = {"w": np.ones((3, 2), np.float32), "b": np.ones(2, np.float32)}


@pytest.fixture
def client(server: ServerProcess) -> Iterator[kedge.Client]:
    with kedge.connect(server.address) as client:
        yield client


@pytest.fixture
def wire(server: ServerProcess) -> Iterator[WireClient]:
    wire = WireClient(server.address)
    yield wire
    wire.close()


BAD_ALIASES: dict[str, tuple[optim.Optax, str, str]] = {
    "unknown name": (optim.Optax("adamm"), "name", "one of adabelief, "),
    "needs more than a gradient": (optim.Optax("lbfgs"), "name", "it must be one of"),
    "not an optimizer": (optim.Optax("apply_updates"), "name", "it must be one of"),
    "unknown argument": (optim.Optax("adam", beta1=0.9), "arguments.beta1", "whose arguments are b1, b2, eps"),
    "mask": (optim.Optax("adamw", mask=True), "arguments.mask", "use groups"),
    "text": (optim.Optax("adam", b1="high"), "arguments.b1", "must be a number"),
    "wrong type": (optim.Optax("adam", b1=None), "arguments", "optax.adam cannot take them"),
    "not finite after a step": (optim.Optax("adam", b1=1.0), "arguments", "NaN or infinite weights"),
    "whole numbers for a state": (optim.Optax("adam", mu_dtype="int32"), "arguments.mu_dtype", "one of float32"),
    "a dtype with a size": (optim.Optax("adam", mu_dtype="(100000,100000)f4"), "arguments.mu_dtype", "one of float32"),
}


@pytest.mark.parametrize("case", BAD_ALIASES)
def test_optax_arguments_are_checked_against_optax(client: kedge.Client, run_id: str, case: str) -> None:
    optimizer, field, message = BAD_ALIASES[case]
    with pytest.raises(kedge.KedgeError, match=message) as caught:
        client.create_run(run_id, params=PARAMS, optimizer=optim.Lookahead(optimizer), aggregation=ALONE)

    assert caught.value.reason == "INVALID_CONFIGURATION"
    assert caught.value.metadata["field"] == f"optimizer.optax.{field}"
    with pytest.raises(kedge.KedgeError, match="RUN_NOT_FOUND"):
        client.get_run(run_id)


def test_an_alias_trains_and_comes_back_as_it_was_given(client: kedge.Client, run_id: str) -> None:
    optimizer = optim.Optax("sgd", lr=0.5, momentum=0.5, nesterov=True)
    run = client.create_run(run_id, params=PARAMS, optimizer=optimizer, aggregation=ALONE)
    with run.join() as worker:
        worker.pull()
        worker.step({"w": np.ones((3, 2), np.float32), "b": np.zeros(2, np.float32)})
        weights = worker.step({"w": np.ones((3, 2), np.float32), "b": np.ones(2, np.float32)})

    # Velocities 1, 1.5; directions g + v/2: 1.5, 1.75
    assert weights["w"].tolist() == [[1 - 0.75 - 0.875] * 2] * 3
    assert weights["b"].tolist() == [1 - 0.75] * 2
    assert client.get_run(run_id).optimizer == optimizer


def with_groups(*groups: run_pb2.ParameterGroup) -> dict[str, Any]:
    return {"groups": groups}


def optimizer(**fields: Any) -> dict[str, Any]:
    message = sgd()
    message.MergeFrom(optimizer_pb2.Optimizer(**fields))
    return {"optimizer": message}


Group = run_pb2.ParameterGroup
BAD_HEADERS: dict[str, tuple[str, dict[str, Any]]] = {
    "betas": ("optimizer.adam.betas", optimizer(adam=optimizer_pb2.Adam(betas=[0.9, 1.0], eps=1e-8))),
    "a beta is missing": ("optimizer.adam.betas", optimizer(adam=optimizer_pb2.Adam(betas=[0.9], eps=1e-8))),
    "momentum": ("optimizer.sgd.momentum", optimizer(sgd=optimizer_pb2.Sgd(momentum=-0.5))),
    "alpha": ("optimizer.lookahead.alpha", optimizer(lookahead=optimizer_pb2.Lookahead(sync_period=5, alpha=1.5))),
    "period": ("optimizer.lookahead.sync_period", optimizer(lookahead=optimizer_pb2.Lookahead(alpha=0.5))),
    "coupled decay of AdamW in Lookahead": (
        "optimizer.weight_decay",
        optimizer(
            adamw=optimizer_pb2.AdamW(betas=[0.9, 0.9], eps=1e-8),
            lookahead=optimizer_pb2.Lookahead(sync_period=5, alpha=0.5),
            weight_decay=0.5,
        ),
    ),
    "schedule's own name": (
        "optimizer.lr.cosine_annealing_lr.t_max",
        optimizer(lr=LearningRate(cosine_annealing_lr=CosineAnnealingLR(base_lr=1), steps_per_epoch=1)),
    ),
    "decay that the rule has not": ("optimizer.decoupled_weight_decay", optimizer(decoupled_weight_decay=0.1)),
    "infinite clip": ("optimizer.grad_clip_norm", optimizer(grad_clip_norm=math.inf)),
    "schedule": (
        "optimizer.lr.step_lr.step_size",
        optimizer(lr=LearningRate(step_lr=StepLR(base_lr=1, gamma=0.5), steps_per_epoch=1)),
    ),
    "group without patterns": ("groups[0].patterns", with_groups(Group(name="a"))),
    "group's rate": ("groups[1].lr", with_groups(Group(patterns=["t0"]), Group(patterns=["t1"], lr=LearningRate()))),
    "group's decay": ("groups[0].weight_decay", with_groups(Group(patterns=["*"], weight_decay=-1))),
    "two groups of one name": ("groups", with_groups(*[Group(patterns=["*"], name="a")] * 2)),
    "group without tensors": ("groups", with_groups(Group(patterns=["none"]))),
    "65 groups": ("groups", with_groups(*[Group(patterns=[f"t{i}"]) for i in range(65)])),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_whatever_the_language_the_field_is_named_and_nothing_is_created(
    wire: WireClient, run_id: str, case: str
) -> None:
    field, header = BAD_HEADERS[case]
    with pytest.raises(grpc.RpcError) as caught:
        wire.create(run_id, floats(1, 2), shapes=[(1,), (1,)], **header)

    info = error_info(caught.value)
    assert (caught.value.code(), info.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_CONFIGURATION")
    assert info.metadata["field"] == field
    with pytest.raises(grpc.RpcError):
        wire.run(f"runs/{run_id}")


Change = run_pb2.HyperparameterChange
BAD_CHANGES: dict[str, tuple[str, run_pb2.HyperparameterChange]] = {
    "negative rate": ("hyperparameters.lr", Change(lr=LearningRate(value=-1), weight_decay=0.5)),
    "no rate": ("hyperparameters.lr", Change(lr=LearningRate())),
    "NaN decay": ("hyperparameters.weight_decay", Change(weight_decay=math.nan)),
    "clip 0": ("hyperparameters.grad_clip_norm", Change(grad_clip_norm=0.0)),
    "no such group": ("hyperparameters.group", Change(group="biases", weight_decay=0.5)),
}


@pytest.mark.parametrize("case", BAD_CHANGES)
def test_a_bad_change_is_named_and_changes_nothing(wire: WireClient, run_id: str, case: str) -> None:
    field, change = BAD_CHANGES[case]
    run = wire.create(run_id, floats(1, 2))
    with pytest.raises(grpc.RpcError) as caught:
        update(wire, run.name, change)

    assert error_info(caught.value).reason == "INVALID_CONFIGURATION"
    assert error_info(caught.value).metadata["field"] == field
    assert not wire.run(run.name).changes


def test_a_tick_that_is_asked_for_again_is_made_once(wire: WireClient, run_id: str) -> None:
    by_hand = LearningRate(exponential_lr=ExponentialLR(base_lr=1, gamma=0.5), steps_per_epoch=1, tick="TICK_MANUAL")
    run = wire.create(run_id, floats(1, 2), **optimizer(lr=by_hand))
    request = run_service_pb2.TickScheduleRequest(name=run.name, request_id="one")
    answers = [wire.call("RunService", "TickSchedule", request) for _ in range(3)]

    assert [(answer.tick, answer.learning_rate) for answer in answers] == [(1, 0.5)] * 3
    request.request_id = "two"
    assert wire.call("RunService", "TickSchedule", request).tick == 2
    assert wire.run(run.name).state.learning_rate == 0.25


@pytest.mark.parametrize("method", ["UpdateRun", "TickSchedule"])
def test_a_run_that_there_is_not_cannot_be_changed(wire: WireClient, run_id: str, method: str) -> None:
    request: Callable[..., Any] = getattr(run_service_pb2, f"{method}Request")
    with pytest.raises(grpc.RpcError) as caught:
        wire.call("RunService", method, request(name=f"runs/{run_id}"))

    assert error_info(caught.value).reason == "RUN_NOT_FOUND"


def update(wire: WireClient, run: str, change: run_pb2.HyperparameterChange) -> Any:
    request = run_service_pb2.UpdateRunRequest(name=run, hyperparameters=change)
    return wire.call("RunService", "UpdateRun", request)
