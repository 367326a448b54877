"""Who may call what, on the wire: each method x each role x each run; and what strangers get, which is nothing.

What is expected stands here, and which methods there are comes from the descriptors: one that is new, and not here,
fails.
"""

import json
import random
import re
import string
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import bare_http2
import grpc
import numpy as np
import psutil
import pytest
from google.protobuf import message_factory
from google.protobuf.descriptor import MethodDescriptor
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2
from local_server import LocalServer
from server_process import ServerProcess
from tokens_file import TokensFile
from wire_client import WireClient, asynchronous, error_info, floats, manifest, push_stream, reason_of, stream

from kedge.v1 import checkpoint_service_pb2 as checkpoints
from kedge.v1 import optimizer_service_pb2 as optimizers
from kedge.v1 import run_service_pb2 as runs
from kedge.v1 import tensor_pb2

ROLES = ("reader", "worker", "admin")

LEAST_ROLE = {
    "CreateRun": "admin",
    "GetRun": "reader",
    "ListRuns": "reader",
    "UpdateRun": "admin",
    "TickSchedule": "worker",
    "DeleteRun": "admin",
    "JoinRun": "worker",
    "Heartbeat": "worker",
    "LeaveRun": "worker",
    "EvictWorker": "admin",
    "WatchRun": "reader",
    "PushGradients": "worker",
    "PullWeights": "reader",
    "Exchange": "worker",
    "OfferMemory": "worker",
    "CreateCheckpoint": "worker",
    "ListCheckpoints": "reader",
    "RestoreCheckpoint": "admin",
    "ForkCheckpoint": "admin",
    "ServerReflectionInfo": "reader",
}

METHODS: dict[str, MethodDescriptor] = {
    method.name: method
    for module in (runs, optimizers, checkpoints, reflection_pb2)
    for service in module.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}

WEIGHTS = floats(1.0, 2.0)
MINE, YOURS, ABSENT = "mine-1", "yours", "nobodys"
"""Runs: one that `mine-*` is for, one that it is not for, and one that is not there."""


def creation(run: str) -> list[Any]:
    data = WEIGHTS.tobytes()
    header = runs.CreateRunHeader(
        run_id=run,
        manifest=manifest((2,)),
        optimizer={"sgd": {}, "lr": {"value": 1.0}},
        aggregation=asynchronous(),
        dtype=tensor_pb2.DTYPE_FLOAT32,
        size_bytes=len(data),
        request_id="the same one",  # so that a run that is there is answered, and not an error
    )
    return stream(runs.CreateRunRequest, runs.CreateRunRequest(header=header), data)


def push_of(run: str) -> optimizers.PushHeader:
    return optimizers.PushHeader(worker=f"runs/{run}/workers/w", epoch=1, sequence=1, size_bytes=8)


REQUESTS: dict[str, Callable[[str], list[Any]]] = {
    "CreateRun": creation,
    "GetRun": lambda run: [runs.GetRunRequest(name=f"runs/{run}")],
    "UpdateRun": lambda run: [runs.UpdateRunRequest(name=f"runs/{run}")],
    "TickSchedule": lambda run: [runs.TickScheduleRequest(name=f"runs/{run}")],
    "DeleteRun": lambda run: [runs.DeleteRunRequest(name=f"runs/{run}")],
    "JoinRun": lambda run: [runs.JoinRunRequest(run=f"runs/{run}")],
    "Heartbeat": lambda run: [runs.HeartbeatRequest(worker=f"runs/{run}/workers/w", epoch=1)],
    "LeaveRun": lambda run: [runs.LeaveRunRequest(worker=f"runs/{run}/workers/w", epoch=1)],
    "EvictWorker": lambda run: [runs.EvictWorkerRequest(worker=f"runs/{run}/workers/w")],
    "WatchRun": lambda run: [runs.WatchRunRequest(name=f"runs/{run}")],
    "PushGradients": lambda run: [optimizers.PushGradientsRequest(header=push_of(run))],
    "PullWeights": lambda run: [optimizers.PullWeightsRequest(run=f"runs/{run}")],
    "Exchange": lambda run: [optimizers.ExchangeRequest(push=push_of(run))],
    "Exchange to pull": lambda run: [optimizers.ExchangeRequest(pull={"worker": f"runs/{run}/workers/w"})],
    "OfferMemory": lambda run: [optimizers.OfferMemoryRequest(worker=f"runs/{run}/workers/w")],
    "CreateCheckpoint": lambda run: [checkpoints.CreateCheckpointRequest(run=f"runs/{run}")],
    "ListCheckpoints": lambda run: [checkpoints.ListCheckpointsRequest(run=f"runs/{run}")],
    "RestoreCheckpoint": lambda run: [checkpoints.RestoreCheckpointRequest(name=f"runs/{run}/checkpoints/0-1")],
    "ForkCheckpoint": lambda run: [
        checkpoints.ForkCheckpointRequest(name=f"runs/{run}/checkpoints/0-1", run_id="mine-forked")
    ],
    "ForkCheckpoint into": lambda run: [
        checkpoints.ForkCheckpointRequest(name=f"runs/{MINE}/checkpoints/0-1", run_id=run)
    ],
}
"""A call about a run, by the method and a word."""

OF_NO_RUN: dict[str, list[Any]] = {
    "ListRuns": [runs.ListRunsRequest()],
    "ServerReflectionInfo": [reflection_pb2.ServerReflectionRequest(list_services="")],
}


class Scene(NamedTuple):
    """A server that asks who calls, and everybody's tokens by role and runs."""

    server: ServerProcess
    channel: grpc.Channel
    tokens: dict[tuple[str, str], str]
    file: TokensFile

    def call(self, method: str, requests: list[Any], authorization: tuple[str, ...] = ()) -> grpc.RpcError | Any:
        """The first answer to a call, or what it ended with; a call that goes on is ended."""
        described = METHODS[method.partition(" ")[0]]
        kind = f"{_arity(described.client_streaming)}_{_arity(described.server_streaming)}"
        stub = getattr(self.channel, kind)(
            f"/{described.containing_service.full_name}/{described.name}",
            request_serializer=lambda message: message if isinstance(message, bytes) else message.SerializeToString(),
            response_deserializer=message_factory.GetMessageClass(described.output_type).FromString,
        )
        metadata = [("authorization", value) for value in authorization]
        sent = iter(requests) if described.client_streaming else requests[0]
        try:
            answer = stub(sent, metadata=metadata, timeout=30)
            if described.server_streaming:
                call, answer = answer, next(answer)
                call.cancel()
        except grpc.RpcError as error:
            return error
        return answer

    def call_as(self, role: str, patterns: str, method: str, requests: list[Any]) -> grpc.RpcError | Any:
        return self.call(method, requests, (f"Bearer {self.tokens[role, patterns]}",))

    def wire(self, role: str, patterns: str) -> WireClient:
        return WireClient(self.server.address, token=self.tokens[role, patterns])


def _arity(streaming: bool) -> str:
    return "stream" if streaming else "unary"


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    folder = tmp_path_factory.mktemp("access")
    file = TokensFile(folder / "tokens")
    tokens = {
        (role, patterns): file.add(f"{role}-{number}", role, None if patterns == "*" else patterns)
        for number, patterns in enumerate(("*", "mine-*"))
        for role in ROLES
    }
    file.write()
    arguments = ("--data-dir", str(folder / "data"))
    with ServerProcess(*arguments, environment=file.environment | {"KEDGE_SERVER__REFLECTION": "true"}) as server:
        admin = WireClient(server.address, token=tokens["admin", "*"])
        for run in (MINE, "mine-2", YOURS):
            admin.call("RunService", "CreateRun", creation(run))
        yield Scene(server, admin.channel, tokens, file)
        admin.close()


def refusal(outcome: grpc.RpcError | Any) -> str:
    """Why a caller was turned away; "" if it was let in, whatever became of its call then."""
    if not isinstance(outcome, grpc.RpcError):
        return ""
    reason = reason_of(outcome)
    assert reason not in ("INTERNAL", ""), outcome
    return reason if reason in ("UNAUTHENTICATED", "PERMISSION_DENIED", "WRONG_IDENTITY") else ""


def test_each_method_has_its_role_and_a_call_here() -> None:
    assert LEAST_ROLE.keys() == METHODS.keys()
    assert {name.partition(" ")[0] for name in REQUESTS} | OF_NO_RUN.keys() == METHODS.keys()


def test_document_tells_of_each_method_whose_it_is() -> None:
    text = (Path(__file__).parents[2] / "docs" / "security.md").read_text(encoding="utf-8")
    told = {
        method: role
        for role in ROLES
        for methods in re.findall(rf"^\| {role} \| (.*) \|$", text, re.MULTILINE)
        for method in re.findall("`([A-Za-z]+)`", methods)
    }
    assert told | {"ServerReflectionInfo": "reader"} == LEAST_ROLE


@pytest.mark.parametrize("patterns", ["*", "mine-*"])
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("method", [*REQUESTS, *OF_NO_RUN])
def test_who_may_call_a_method_may_and_who_may_not_is_told_the_role_that_it_needs(
    scene: Scene, method: str, role: str, patterns: str
) -> None:
    run = "mine-absent" if method == "DeleteRun" else MINE
    outcome = scene.call_as(role, patterns, method, REQUESTS[method](run) if method in REQUESTS else OF_NO_RUN[method])
    needs = LEAST_ROLE[method.partition(" ")[0]]
    if ROLES.index(role) >= ROLES.index(needs):
        assert refusal(outcome) == ""
        return
    assert refusal(outcome) == "PERMISSION_DENIED"
    assert outcome.code() is grpc.StatusCode.PERMISSION_DENIED
    assert error_info(outcome).metadata == {"role": role, "needs": needs, "run": ""}
    assert needs in outcome.details()


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("method", REQUESTS)
def test_who_is_for_some_runs_is_refused_at_others_and_not_told_whether_they_are_there(
    scene: Scene, method: str, role: str
) -> None:
    told = []
    for run in (YOURS, ABSENT):
        outcome = scene.call_as(role, "mine-*", method, REQUESTS[method](run))
        assert refusal(outcome) == "PERMISSION_DENIED"
        told.append((outcome.code(), outcome.details().replace(run, "R"), error_info(outcome).metadata["role"]))
    assert told[0] == told[1]


@pytest.mark.parametrize("method", [*REQUESTS, *OF_NO_RUN])
def test_strangers_are_refused_at_each_method(scene: Scene, method: str) -> None:
    requests = REQUESTS[method](MINE) if method in REQUESTS else OF_NO_RUN[method]
    token = scene.tokens["admin", "*"]
    for authorization in ((), ("Bearer wrong",), (f"Bearer {token}", "Bearer wrong"), (f"Bearer {token}",) * 2):
        outcome = scene.call(method, requests, authorization)
        assert refusal(outcome) == "UNAUTHENTICATED"
        assert outcome.code() is grpc.StatusCode.UNAUTHENTICATED
        assert "KEDGE_TOKEN_FILE" in outcome.details()
        assert token not in str(outcome)


@pytest.mark.parametrize("method", METHODS)
def test_strangers_are_not_told_what_is_wrong_with_their_message(scene: Scene, method: str) -> None:
    assert refusal(scene.call(method, [b"\xff\xff\xff"])) == "UNAUTHENTICATED"


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_scheme_is_known_in_any_case(scene: Scene, scheme: str) -> None:
    outcome = scene.call("ListRuns", OF_NO_RUN["ListRuns"], (f"{scheme} {scene.tokens['reader', '*']}",))
    assert refusal(outcome) == ""


def test_lists_show_the_runs_that_the_caller_may_touch_and_no_others(scene: Scene) -> None:
    listed = {}
    for patterns in ("*", "mine-*"):
        names, token = [], ""
        while True:
            page = scene.call_as("reader", patterns, "ListRuns", [runs.ListRunsRequest(page_size=1, page_token=token)])
            names += [run.name for run in page.runs]
            token = page.next_page_token
            if not token:
                break
        listed[patterns] = names
    assert listed == {"*": [f"runs/{run}" for run in (MINE, "mine-2", YOURS)], "mine-*": ["runs/mine-1", "runs/mine-2"]}


def test_health_is_told_to_anybody(scene: Scene) -> None:
    stub = health_pb2_grpc.HealthStub(scene.channel)
    for service in ("", "kedge.v1.RunService"):
        answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=30)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_worker_trains_what_it_may_touch(scene: Scene) -> None:
    """That it is let in, above, is not all: a whole round trip."""
    wire = scene.wire("worker", "mine-*")
    lease = wire.join(f"runs/{MINE}", "trainer")
    digest = wire.run(f"runs/{MINE}", full=True).manifest.digest
    assert wire.push(push_stream(lease, digest, floats(0.5, 0.5))).outcome == optimizers.PUSH_OUTCOME_APPLIED
    np.testing.assert_array_equal(wire.pull(f"runs/{MINE}")[1], WEIGHTS - np.float32(0.5))
    wire.close()


# What strangers cost


def test_stranger_holds_no_buffer_and_takes_no_place_among_the_streams(
    tmp_path: Any, eventually: Callable[..., None]
) -> None:
    file = TokensFile(tmp_path / "tokens")
    token = file.add("a", "admin")
    file.write()
    with LocalServer(access={"tokens_file": file.path}, limits={"streams": 1}) as server:
        wire, stranger = WireClient(server.address, token=token), WireClient(server.address)
        wire.create("r", WEIGHTS)
        lease, digest = wire.join("runs/r", "w"), wire.run("runs/r", full=True).manifest.digest
        upload = push_stream(lease, digest, WEIGHTS)[:-1]  # as if the rest were still to come
        for _ in range(20):
            with pytest.raises(grpc.RpcError) as refused:
                stranger.push(upload)
            assert reason_of(refused.value) == "UNAUTHENTICATED"
            assert server.lent_buffer_count() == 0
            wire.pull("runs/r")  # the one stream that there may be is free
        assert wire.push(push_stream(lease, digest, WEIGHTS)).outcome == optimizers.PUSH_OUTCOME_APPLIED
        eventually(lambda: server.lent_buffer_count() == 0)
        watch = wire.call("RunService", "WatchRun", runs.WatchRunRequest(name="runs/r"))
        next(watch)
        for client, reason in ((stranger, "UNAUTHENTICATED"), (wire, "TOO_MANY_STREAMS")):
            with pytest.raises(grpc.RpcError) as refused:
                client.pull("runs/r")
            assert reason_of(refused.value) == reason  # a stranger does not learn how many there are
        watch.cancel()
        for client in (wire, stranger):
            client.close()


ACCEPTED_BYTES = (string.ascii_letters + string.digits + "-_").encode()
BATCH = 200


def mutated(token: bytes, count: int) -> Iterator[list[bytes]]:
    """Authorizations with a token that is nearly right, and none that is: each a list of headers."""
    dice = random.Random(20260711)
    one_way = [flipped, cut, longer, in_another_case, with_space, with_text, with_anything, repeated, of_another_scheme]
    yield from (
        [],
        [b""],
        [b" "],
        [b"Bearer"],
        [b"Bearer "],
        [token],
        [b"Bearer " + token[:-1]],
        [b"Bearer " + token] * 2,
    )
    for number in range(count - 8):
        yield one_way[number % len(one_way)](token, dice)


def flipped(token: bytes, dice: random.Random) -> list[bytes]:
    at = dice.randrange(len(token))
    return [b"Bearer " + token[:at] + bytes([token[at] ^ 1 << dice.randrange(8)]) + token[at + 1 :]]


def cut(token: bytes, dice: random.Random) -> list[bytes]:
    begin, end = sorted(dice.sample(range(len(token) + 1), 2))
    return [b"Bearer " + token[:begin] + token[end:]]


def longer(token: bytes, dice: random.Random) -> list[bytes]:
    more = bytes(dice.choice(ACCEPTED_BYTES) for _ in range(dice.choice((1, 2, 43, 8000, 14_000))))
    return [b"Bearer " + (token + more if dice.random() < 0.5 else more + token)]


def in_another_case(token: bytes, dice: random.Random) -> list[bytes]:
    letters = [at for at, byte in enumerate(token) if chr(byte).isalpha()]
    changed = set(dice.sample(letters, dice.randint(1, len(letters))))
    return [b"Bearer " + bytes(byte ^ 32 if at in changed else byte for at, byte in enumerate(token))]


def with_space(token: bytes, dice: random.Random) -> list[bytes]:
    at, space = (
        dice.randrange(len(token) + 1),
        dice.choice([b" ", b"\t", b"  ", b"\r\n", b"\n", b"\xc2\xa0", b"\xe2\x80\x8b"]),
    )
    return [b"Bearer " + token[:at] + space + token[at:]]


def with_text(token: bytes, dice: random.Random) -> list[bytes]:
    """Letters that look alike, or become the right ones when they are normalized."""
    at = dice.randrange(len(token))
    wide = chr(0xFEE0 + token[at]) if dice.random() < 0.5 else chr(token[at]) + "\u0301"
    return [b"Bearer " + token[:at] + wide.encode() + token[at + 1 :]]


def with_anything(token: bytes, dice: random.Random) -> list[bytes]:
    """Bytes that are no text, which a lenient reader might leave out."""
    at = dice.randrange(len(token) + 1)
    return [
        b"Bearer "
        + token[:at]
        + dice.choice([b"\xff", b"\x00", b"\xc3", b"\xed\xa0\x80", b"\x7f", b"%00"])
        + token[at:]
    ]


def repeated(token: bytes, dice: random.Random) -> list[bytes]:
    headers = [b"Bearer " + token, b"Bearer " + dice.choice([b"x", b"", token, token[::-1]])]
    dice.shuffle(headers)
    return headers if dice.random() < 0.5 else [b", ".join(headers)]


def of_another_scheme(token: bytes, dice: random.Random) -> list[bytes]:
    scheme = dice.choice(
        [b"Basic ", b"Digest ", b"Bearer\t", b"Bearer:", b"Bearer=", b" Bearer ", b"Token ", b"", b"Bear er "]
    )
    return [scheme + token]


def test_ten_thousand_mutated_tokens_are_refused_at_a_bounded_cost(
    tmp_path: Any, record_property: Callable[[str, object], None], eventually: Callable[..., None]
) -> None:
    file, count = TokensFile(tmp_path / "tokens"), 10_000
    token = file.add("a", "admin")
    for number in range(20):
        file.add(f"other-{number}", "admin")
    file.write()
    path, right = "/kedge.v1.RunService/ListRuns", [(b"authorization", f"Bearer {token}".encode())]
    wrong = [[(b"authorization", value) for value in values] for values in mutated(token.encode(), count)]
    with ServerProcess(environment=file.environment | {"KEDGE_LOG__FORMAT": "json"}) as server:
        process, sizes = psutil.Process(server.process.pid), []
        for begin in range(0, count, BATCH):
            calls = [right, *wrong[begin : begin + BATCH], right]
            answered = bare_http2.answered(server.address, path, calls)
            assert answered == [True, *[False] * BATCH, True]
            sizes.append(process.memory_info().rss)
        warm, grown = sizes[len(sizes) // 5], sizes[-1]
        assert grown - warm < 16 << 20
        eventually(lambda: rejected_count(server.log) == count)
    log = "".join(server.log)
    assert len(server.log) < 500
    assert token not in log
    assert not any(digest in log for digest in file.digests)
    record_property("measured", f"{count} tokens, {len(server.log)} lines, {(grown - warm) / 2**20:.1f} MiB more")


def rejected_count(log: list[str]) -> int:
    """How many calls the log tells of: in lines of their own, and as those that were left out."""
    lines = [json.loads(line) for line in log]
    assert {line["event"].partition(":")[0] for line in lines} <= {"credentials rejected"}
    return sum(line.get("count", 1) for line in lines)
