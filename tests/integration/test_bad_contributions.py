"""Bad inputs to a live run, and its whole state before and after: weights, moments, counters, ledgers, held gradients.

The run trains with everything that has a state, and a contribution is held in its open round. Errors change nothing at
all; a rejection uses its sequence up and is counted, and changes nothing else.
"""

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any, NamedTuple

import grpc
import numpy as np
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from local_server import LocalServer, State, changes, fingerprint
from wire_client import WireClient, error_info, floats

from kedge import optim
from kedge.optim.schedules import ExponentialLR
from kedge.v1 import optimizer_service_pb2 as pb
from kedge.v1 import run_pb2, run_service_pb2
from kedge.wire.convert import optimizer_to_wire
from kedge.wire.errors import CATALOGUE, DOMAIN

from .test_bad_input import ERRORS, GRADIENT, INF, NAN, NOT_WORKERS, WEIGHTS, Target, as_exchange

PUSH = pb.PushGradientsRequest
LONG = Duration(seconds=3600)
WORKER_LIMIT, CONTRIBUTION_LIMIT = 5, 32
WORKERS = "good", "bad", "silent"
ROUND_COUNT = 8  # as many as outliers are told by need
OPTIMIZER = optim.Lookahead(
    optim.AdaBelief(lr=ExponentialLR(0.1, gamma=0.9), weight_decay=0.01, grad_clip_norm=3.0), sync_period=3, alpha=0.5
)
ADMISSION = run_pb2.Admission(max_norm=1000, outlier_factor=10)


class World(NamedTuple):
    """A server that can be looked into, a run that trains on it, and workers in every state that one can be in."""

    server: LocalServer
    wire: WireClient
    run: run_pb2.Run
    leases: dict[str, run_service_pb2.JoinRunResponse]

    def target(self, worker: str = "bad") -> Target:
        """The run as a worker sees it now: the next sequence and the step are known."""
        lease = self.leases[worker]
        run = self.wire.run(lease.worker.rpartition("/workers/")[0], full=True)
        sequences = {live.epoch: live.last_sequence for live in run.state.workers}
        return Target(self.wire, run, lease, run.state.step, sequences.get(lease.epoch, 0) + 1)

    def call(self, method: str, request: Any, *, service: str = "RunService") -> None:
        """Calls to the end."""
        answer = self.wire.call(service, method, request)
        if not isinstance(answer, Message):
            list(answer)

    def exchange(self, requests: list[Any]) -> list[Any]:
        """What an exchange answers to what PushGradients takes, too."""
        return list(self.wire.call("OptimizerService", "Exchange", [as_exchange(m) for m in requests]))


def gradient(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=WEIGHTS.size).astype(np.float32)


def train(world: World, rounds: range) -> None:
    """Rounds of all three workers' contributions."""
    for number in rounds:
        for at, worker in enumerate(WORKERS):
            world.wire.push(world.target(worker).good(gradient(3 * number + at), example_count=1 + at, loss=2.0))
        world.wire.pull(world.run.name, min_step=number + 1, wait=Duration(seconds=30))


def new_world(server: LocalServer, wire: WireClient, run_id: str) -> World:
    """A run of three workers after some rounds; the good one's contribution to the next is held.

    The round stays open: it does not wait for who sends bad ones, but for the silent one.
    """
    run = wire.create(
        run_id,
        WEIGHTS,
        optimizer=optimizer_to_wire(OPTIMIZER),
        aggregation=run_pb2.Aggregation(synchronous=run_pb2.Synchronous(quorum=3)),
        admission=ADMISSION,
        shapes=[(2,), (2,)],
    )
    world = World(server, wire, run, {name: wire.join(run.name, name, lease=LONG) for name in WORKERS})
    train(world, range(ROUND_COUNT))
    assert wire.push(world.target("good").good(gradient(100))).outcome == pb.PUSH_OUTCOME_DEFERRED
    return world


@contextmanager
def a_world() -> Iterator[World]:
    """A server of its own, and all that the bad inputs are about."""
    limits = {"workers_per_run": WORKER_LIMIT, "contributions_per_run": CONTRIBUTION_LIMIT, "events_per_run": 64}
    with (
        LocalServer(limits=limits, leases={"min_seconds": 0.01}, device={"block_elements": 3}) as server,
        closing(WireClient(server.address)) as wire,
    ):
        world = new_world(server, wire, "busy")
        add_past_workers(world)
        add_full_run(world)
        add_bounded_run(world)
        yield world


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with a_world() as world:
        yield world


def add_past_workers(world: World) -> None:
    """Workers who may not contribute any more, and a run that is no more."""
    run, wire = world.run.name, world.wire
    for name in ("superseded", "evicted", "left"):
        world.leases[name] = wire.join(run, name, lease=LONG)
        match name:
            case "superseded":
                wire.join(run, name, lease=LONG)
            case "evicted":
                ask("EvictWorker", f"{run}/workers/{name}", cause="sends nonsense", block=LONG)(world)
            case "left":
                ask("LeaveRun", f"{run}/workers/{name}", epoch=world.leases[name].epoch)(world)
    world.leases["expired"] = wire.join(run, "expired", lease=Duration(nanos=10_000_000))
    while any(worker.name.endswith("/expired") for worker in wire.run(run).state.workers):
        pass
    wire.create("gone", WEIGHTS)
    ask("DeleteRun", "runs/gone")(world)


def add_full_run(world: World) -> None:
    """A run without Lookahead that has as many workers as there may be."""
    name = world.wire.create("full", WEIGHTS).name
    for number in range(WORKER_LIMIT):
        world.wire.join(name, f"w{number}", lease=LONG)


def add_bounded_run(world: World) -> None:
    """A run whose worker "ahead" is as far ahead of another one as it may be, and one more."""
    bounded = run_pb2.Aggregation(bounded_staleness=run_pb2.BoundedStaleness(bound=1))
    run = world.wire.create("bounded", WEIGHTS, aggregation=bounded)
    world.wire.join(run.name, "slow", lease=LONG)
    world.leases["ahead"] = world.wire.join(run.name, "ahead", lease=LONG)
    for sequence in (1, 2):
        world.wire.push(Target(world.wire, run, world.leases["ahead"], 0, sequence).good())


# The bad ones ---------------------------------------------------------------------------------------------------------


def as_worker(worker: str) -> Callable[[World], list[Any]]:
    return lambda w: w.target(worker).good(sequence=1)


PUSHES: dict[str, tuple[str, Callable[[World], list[Any]]]] = {
    **{case: (reason, lambda w, make=make: make(w.target())) for case, (reason, make) in ERRORS.items()},
    "lease superseded": ("WORKER_SUPERSEDED", as_worker("superseded")),
    "lease evicted": ("WORKER_EVICTED", as_worker("evicted")),
    "lease given back": ("LEASE_EXPIRED", as_worker("left")),
    "lease expired": ("LEASE_EXPIRED", as_worker("expired")),
    "run deleted": ("RUN_NOT_FOUND", lambda w: [w.target().header(worker="runs/gone/workers/bad")]),
    "another worker's epoch": ("WORKER_SUPERSEDED", lambda w: w.target().good(epoch=w.leases["good"].epoch)),
}


def rejected(values: np.ndarray, **fields: Any) -> Callable[[World], list[Any]]:
    return lambda w: w.target().good(values, **fields)


def with_one(value: float, position: int) -> np.ndarray:
    values = GRADIENT.copy()
    values[position] = value
    return values


REJECTIONS: dict[str, tuple[str, Callable[[World], list[Any]]]] = {
    **{
        f"{value} at element {position}": ("NON_FINITE_GRADIENT", rejected(with_one(value, position)))
        for value in (NAN, INF, -INF)
        for position in (0, 1, 3)
    },
    "nothing but NaN": ("NON_FINITE_GRADIENT", rejected(floats(NAN, NAN, NAN, NAN))),
    "infinities that cancel": ("NON_FINITE_GRADIENT", rejected(floats(INF, -INF, 1, 1))),
    "a NaN with a payload": ("NON_FINITE_GRADIENT", rejected(np.array([1, 2, 3, 0x7FABCDEF], "<u4").view("<f4"))),
    "a stale one with a NaN": ("NON_FINITE_GRADIENT", rejected(with_one(NAN, 2), base_step=0)),
    "a square that overflows": ("GRADIENT_TOO_LARGE", rejected(floats(2e19, 0, 0, 0))),
    "squares that overflow together": ("GRADIENT_TOO_LARGE", rejected(floats(1.5e19, 1.5e19, 0, 0))),
    "the greatest float32": ("GRADIENT_TOO_LARGE", rejected(floats(0, 0, 0, -3.4028235e38))),
    "norm above max_norm": ("NORM_ABOVE_LIMIT", rejected(floats(0, 1001, 0, 0))),
    "norm above max_norm of no large element": ("NORM_ABOVE_LIMIT", rejected(floats(501, -501, 501, -501))),
    "outlier": ("NORM_OUTLIER", rejected(floats(0, 0, 100, 0))),
    "outlier that is a sign-flipped multiple": ("NORM_OUTLIER", rejected(-100 * GRADIENT)),
    "stale by one": ("STALE_GRADIENT", lambda w: (t := w.target()).good(base_step=t.step - 1)),
    "stale by all": ("STALE_GRADIENT", rejected(GRADIENT, base_step=0)),
    "second in a round": ("ALREADY_CONTRIBUTED", lambda w: w.target("good").good()),
    "ahead of the bound": ("AHEAD_OF_BOUND", lambda w: w.target("ahead").good()),
    "ahead of the bound with a NaN": ("NON_FINITE_GRADIENT", lambda w: w.target("ahead").good(with_one(NAN, 1))),
}


def pull(spec: dict[str, Any], run: str = "runs/busy") -> Callable[[World], None]:
    request = pb.PullWeightsRequest(run=run, pull=pb.PullSpec(**spec))
    return lambda w: w.call("PullWeights", request, service="OptimizerService")


def ask(method: str, name: str = "runs/busy", **fields: Any) -> Callable[[World], None]:
    """A call of RunService; its request names a run or a worker, whichever it takes."""
    kind = getattr(run_service_pb2, f"{method}Request")
    named = next(field for field in ("name", "run", "worker") if field in kind.DESCRIPTOR.fields_by_name)
    request = kind(**{named: name}, **fields)
    return lambda w: w.call(method, request)


def raw(method: str, data: bytes, *, service: str = "RunService") -> Callable[[World], None]:
    return lambda w: w.call(method, data, service=service)


def beat(worker: str) -> Callable[[World], None]:
    def act(w: World) -> None:
        lease = w.leases[worker]
        w.call("Heartbeat", run_service_pb2.HeartbeatRequest(worker=lease.worker, epoch=lease.epoch))

    return act


def pull_ahead(w: World) -> None:
    request = pb.ExchangePull(worker="runs/bounded/workers/ahead", pull=pb.PullSpec())
    w.call("Exchange", [pb.ExchangeRequest(pull=request)], service="OptimizerService")


def policy(**kind: Any) -> dict[str, Any]:
    return {"aggregation": run_pb2.Aggregation(**kind)}


def synchronous(**fields: Any) -> dict[str, Any]:
    return policy(synchronous=run_pb2.Synchronous(**({"quorum": 4} | fields)))


def buffered(**fields: Any) -> dict[str, Any]:
    return policy(buffered=run_pb2.Buffered(**({"size": 3} | fields)))


def admission(**fields: Any) -> dict[str, Any]:
    return {"admission": run_pb2.Admission(**fields)}


def change(**fields: Any) -> dict[str, Any]:
    return {"hyperparameters": run_pb2.HyperparameterChange(**fields)}


BUSY, BAD, AHEAD = "runs/busy", "runs/busy/workers/bad", "runs/bounded/workers/ahead"
TRIMMED, MEDIAN = run_pb2.COMBINE_TRIMMED_MEAN, run_pb2.COMBINE_MEDIAN
NEVER, LONGEST = Duration(seconds=-1), Duration(seconds=(1 << 63) - 1)

BAD_UPDATES: dict[str, tuple[str, dict[str, Any]]] = {
    "no policy": ("INVALID_CONFIGURATION", policy()),
    "quorum 0": ("INVALID_CONFIGURATION", synchronous(quorum=0)),
    "quorum without room": ("RUN_TOO_LARGE", synchronous(quorum=CONTRIBUTION_LIMIT + 1)),
    "quorum of 2**32 - 1": ("RUN_TOO_LARGE", synchronous(quorum=(1 << 32) - 1)),
    "timeout 0": ("INVALID_CONFIGURATION", synchronous(timeout=Duration())),
    "timeout negative": ("INVALID_CONFIGURATION", synchronous(timeout=NEVER)),
    "timeout beyond all": ("INVALID_CONFIGURATION", synchronous(timeout=LONGEST)),
    "combine unknown": ("INVALID_CONFIGURATION", synchronous(combine=77)),
    "trim_count without trimming": ("INVALID_CONFIGURATION", synchronous(trim_count=2)),
    "trim_count that leaves nothing": ("INVALID_CONFIGURATION", synchronous(combine=TRIMMED, trim_count=2)),
    "trim_count of 2**32 - 1": ("INVALID_CONFIGURATION", synchronous(combine=TRIMMED, trim_count=(1 << 32) - 1)),
    "median of two": ("INVALID_CONFIGURATION", synchronous(quorum=2, combine=MEDIAN)),
    "size 0": ("INVALID_CONFIGURATION", buffered(size=0)),
    "size without room": ("RUN_TOO_LARGE", buffered(size=CONTRIBUTION_LIMIT + 1)),
    "buffer's combine unknown": ("INVALID_CONFIGURATION", buffered(combine=77)),
    "buffer's staleness of 2**64 - 1": ("INVALID_CONFIGURATION", buffered(max_staleness=(1 << 64) - 1)),
    "staleness of 2**64 - 1": (
        "INVALID_CONFIGURATION",
        policy(asynchronous=run_pb2.Asynchronous(max_staleness=(1 << 64) - 1)),
    ),
    "max_norm 0": ("INVALID_CONFIGURATION", admission(max_norm=0)),
    "max_norm negative": ("INVALID_CONFIGURATION", admission(max_norm=-1)),
    "max_norm NaN": ("INVALID_CONFIGURATION", admission(max_norm=NAN)),
    "max_norm infinite": ("INVALID_CONFIGURATION", admission(max_norm=INF)),
    "outlier_factor 1": ("INVALID_CONFIGURATION", admission(outlier_factor=1)),
    "outlier_factor NaN": ("INVALID_CONFIGURATION", admission(outlier_factor=NAN)),
    "outlier_factor infinite": ("INVALID_CONFIGURATION", admission(outlier_factor=INF)),
    "quarantine_after 0": ("INVALID_CONFIGURATION", admission(quarantine_after=0)),
    "quarantine 0": ("INVALID_CONFIGURATION", admission(quarantine=Duration())),
    "quarantine negative": ("INVALID_CONFIGURATION", admission(quarantine=NEVER)),
    "weight_decay NaN": ("INVALID_CONFIGURATION", change(weight_decay=NAN)),
    "weight_decay negative": ("INVALID_CONFIGURATION", change(weight_decay=-1)),
    "grad_clip_norm 0": ("INVALID_CONFIGURATION", change(grad_clip_norm=0)),
    "grad_clip_value NaN": ("INVALID_CONFIGURATION", change(grad_clip_value=NAN)),
    "group unknown": ("INVALID_CONFIGURATION", change(group="nobody", weight_decay=0.1)),
    "request_id of 65 characters": ("INVALID_CONFIGURATION", {"request_id": "x" * 65} | synchronous()),
    "good policy, bad admission": ("INVALID_CONFIGURATION", synchronous() | admission(max_norm=NAN)),
    "good policy, bad hyperparameters": ("INVALID_CONFIGURATION", synchronous() | change(group="nobody")),
    "good admission, bad hyperparameters": ("INVALID_CONFIGURATION", admission(max_norm=5) | change(weight_decay=NAN)),
    "good hyperparameters, no room": (
        "RUN_TOO_LARGE",
        change(weight_decay=0.5) | admission(max_norm=5) | synchronous(quorum=CONTRIBUTION_LIMIT + 1),
    ),
}

CALLS: dict[str, tuple[str, Callable[[World], None]]] = {
    **{f"update: {case}": (reason, ask("UpdateRun", **fields)) for case, (reason, fields) in BAD_UPDATES.items()},
    "update: unknown run": ("RUN_NOT_FOUND", ask("UpdateRun", "runs/nowhere", **synchronous())),
    "update: unknown kind of policy": (
        "INVALID_CONFIGURATION",
        raw("UpdateRun", b"\x0a\x09runs/busy\x22\x03\x4a\x01x"),
    ),
    "update: garbage": ("MALFORMED_MESSAGE", raw("UpdateRun", b"\x0a\xff")),
    "pull: wait negative": ("INVALID_CONFIGURATION", pull({"wait": NEVER})),
    "pull: wait a nanosecond negative": ("INVALID_CONFIGURATION", pull({"wait": Duration(nanos=-1)})),
    "pull: wait beyond all": ("INVALID_CONFIGURATION", pull({"wait": LONGEST})),
    "pull: step ahead": ("STEP_NOT_REACHED", pull({"min_step": ROUND_COUNT + 1})),
    "pull: step 2**64 - 1": ("STEP_NOT_REACHED", pull({"min_step": (1 << 64) - 1, "wait": Duration(nanos=1)})),
    "pull: dtype unknown": ("UNSUPPORTED_DTYPE", pull({"dtype": 64})),
    "pull: slow weights where there are none": ("NO_SLOW_WEIGHTS", pull({"weights": 2}, "runs/full")),
    "pull: both weights where there are none": ("NO_SLOW_WEIGHTS", pull({"weights": 3}, "runs/full")),
    "pull: unknown run": ("RUN_NOT_FOUND", pull({}, "runs/nowhere")),
    "pull: a worker's name": ("INVALID_NAME", pull({}, BAD)),
    "pull: garbage": ("MALFORMED_MESSAGE", raw("PullWeights", b"\xff", service="OptimizerService")),
    "pull: ahead of the bound": ("WAITING_FOR_SLOWEST", pull_ahead),
    "evict: unknown worker": ("WORKER_NOT_FOUND", ask("EvictWorker", f"{BUSY}/workers/nobody")),
    "evict: a worker that has left": ("WORKER_NOT_FOUND", ask("EvictWorker", f"{BUSY}/workers/left")),
    "evict: unknown run": ("RUN_NOT_FOUND", ask("EvictWorker", "runs/nowhere/workers/bad")),
    "evict: cause of 257 characters": ("INVALID_CONFIGURATION", ask("EvictWorker", BAD, cause="x" * 257)),
    "evict: block negative": ("INVALID_CONFIGURATION", ask("EvictWorker", BAD, block=NEVER)),
    "watch: unknown run": ("RUN_NOT_FOUND", ask("WatchRun", "runs/nowhere")),
    "watch: deleted run": ("RUN_NOT_FOUND", ask("WatchRun", "runs/gone", from_step=0)),
    "watch: a worker's name": ("INVALID_NAME", ask("WatchRun", BAD)),
    "join: unknown run": ("RUN_NOT_FOUND", ask("JoinRun", "runs/nowhere")),
    "join: not a run": ("INVALID_NAME", ask("JoinRun", "busy")),
    "join: a name with a slash": ("INVALID_NAME", ask("JoinRun", worker_id="a/b")),
    "join: a name of 64 characters": ("INVALID_NAME", ask("JoinRun", worker_id="w" * 64)),
    "join: lease negative": ("INVALID_CONFIGURATION", ask("JoinRun", worker_id="bad", lease=NEVER)),
    "join: lease beyond all": ("INVALID_CONFIGURATION", ask("JoinRun", worker_id="bad", lease=LONGEST)),
    "join: a worker too many": ("TOO_MANY_WORKERS", ask("JoinRun", "runs/full", worker_id="new")),
    "join: a blocked name": ("WORKER_EVICTED", ask("JoinRun", worker_id="evicted")),
    "heartbeat: superseded": ("WORKER_SUPERSEDED", beat("superseded")),
    "heartbeat: evicted": ("WORKER_EVICTED", beat("evicted")),
    "heartbeat: expired": ("LEASE_EXPIRED", beat("expired")),
    "heartbeat: left": ("LEASE_EXPIRED", beat("left")),
    "heartbeat: unknown worker": ("WORKER_NOT_FOUND", ask("Heartbeat", f"{BUSY}/workers/nobody", epoch=1 << 62)),
    "leave: a run's name": ("INVALID_NAME", ask("LeaveRun")),
    "tick: a schedule that ticks by itself": ("INVALID_CONFIGURATION", ask("TickSchedule")),
    "tick: unknown group": ("INVALID_CONFIGURATION", ask("TickSchedule", group="nobody")),
    "tick: request_id of 65 characters": ("INVALID_CONFIGURATION", ask("TickSchedule", request_id="x" * 65)),
    "delete: unknown run": ("RUN_NOT_FOUND", ask("DeleteRun", "runs/nowhere")),
    "delete: a worker's name": ("INVALID_NAME", ask("DeleteRun", BAD)),
    **{
        f"evict: worker's name is {what}": ("INVALID_NAME", ask("EvictWorker", name))
        for what, name in NOT_WORKERS.items()
    },
}


# What they change -----------------------------------------------------------------------------------------------------

WAYS: dict[str, Callable[[World, list[Any]], list[Any]]] = {
    "PushGradients": lambda w, requests: [w.wire.push(requests)],
    "Exchange": lambda w, requests: w.exchange(requests),
}
ROWS = {
    **{
        f"{way}: {case}": (reason, lambda w, make=make, send=send: send(w, make(w)))
        for way, send in WAYS.items()
        for case, (reason, make) in PUSHES.items()
        if way == "PushGradients" or case not in ("nothing", "no header")  # such an exchange has not begun
    },
    **CALLS,
}


def assert_unchanged(world: World, before: State) -> None:
    after = world.server.state()
    assert fingerprint(after) == fingerprint(before), changes(before, after)


def assert_refused(error: grpc.RpcError, reason: str) -> None:
    info = error_info(error)
    assert (info.reason, info.domain) == (reason, DOMAIN)
    assert error.code().name == CATALOGUE[reason].status
    assert set(info.metadata) == set(CATALOGUE[reason].metadata)
    assert len(error.details()) > 20, "a message says what is wrong and what to do"


@pytest.mark.parametrize("case", ROWS)
def test_error_names_its_reason_and_changes_nothing_at_all(world: World, case: str) -> None:
    reason, act = ROWS[case]
    before = world.server.state()
    with pytest.raises(grpc.RpcError) as caught:
        act(world)
    assert_refused(caught.value, reason)
    assert_unchanged(world, before)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", REJECTIONS)
def test_rejection_uses_one_sequence_up_and_changes_nothing_else(world: World, case: str, way: str) -> None:
    reason, make = REJECTIONS[case]
    requests = make(world)
    before = world.server.state()
    (answer,) = WAYS[way](world, requests)
    after = world.server.state()
    result = answer.result if way == "Exchange" else answer
    assert (result.outcome, result.reason) == (pb.PUSH_OUTCOME_REJECTED, reason)
    assert reason in CATALOGUE
    assert len(result.message) > 20
    header = requests[0].header
    run, _, worker = header.worker.partition("/workers/")
    lease = f"{run}._coordinator.leases._live.{worker}"
    counted = f"{run}._coordinator.rejected_counts.{reason}"
    for count in (f"{lease}.rejected_count", f"{lease}.ledger.last_sequence", counted):
        assert int(after[count]) == int(before.get(count, 0)) + 1, count
    told = f"{run}._coordinator.rejected_counts", f"{run}.feed._log", f"{lease}.last_", f"{lease}.bad_count"
    noted = (
        f"{run}._coordinator._norms",
        f"{run}._coordinator._round.unfit_worker_ids",
        f"{run}._coordinator._round.late_unfit_worker_ids",
    )
    expected = (*told, *noted, f"{lease}.rejected_count", f"{lease}.ledger.last_sequence", f"{lease}.ledger._entries")
    assert {p: c for p, c in changes(before, after).items() if not p.startswith(expected)} == {}
    entries = {
        p.removeprefix(f"{lease}.ledger._entries").split(".")[1] for p in changes(before, after) if "_entries." in p
    }
    assert entries <= {str(result.sequence), str(result.sequence - 64)}, "of the others only the oldest may go"


def test_after_all_of_them_training_goes_on_as_in_a_run_that_saw_none() -> None:
    with a_world() as world:
        for _, act in ROWS.values():
            with pytest.raises(grpc.RpcError):
                act(world)
        for _, make in REJECTIONS.values():
            assert world.wire.push(make(world)).outcome == pb.PUSH_OUTCOME_REJECTED
        spared = new_world(world.server, world.wire, "spared")
        for run in (world, spared):
            run.wire.push(run.target("bad").good(gradient(101)))
            result = run.wire.push(run.target("silent").good(gradient(102), wait=Duration(seconds=30)))
            assert (result.outcome, result.step) == (pb.PUSH_OUTCOME_APPLIED, ROUND_COUNT + 1)
            train(run, range(ROUND_COUNT + 1, ROUND_COUNT + 8))
        got, expected = (trained(world.server.state(), run.run.name) for run in (world, spared))
    assert len(ROWS) + len(REJECTIONS) >= 60
    assert len(expected) > 50, "moments, counters and weights were found"
    assert changes(expected, got) == {}


def trained(state: State, run: str) -> State:
    """What training has made of a run."""
    coordinated = (f"_coordinator.{name}" for name in ("applied_count", "closed_step", "loss"))
    held = ("_pipeline._writer", "_publication.snapshot", "_tuning.controls", *coordinated)
    prefixes = tuple(f"{run}.{part}" for part in held)
    return {place.removeprefix(run): fact for place, fact in state.items() if place.startswith(prefixes)}
