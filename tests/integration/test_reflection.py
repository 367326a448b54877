"""The server tells what its services are where that is switched on, and only to those who may read."""

import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from server_process import ServerProcess
from wire_client import reason_of

from kedge.v1 import run_service_pb2
from kedge_server.security.roles import Role
from kedge_server.security.tokens import new_token

ON = {"KEDGE_SERVER__REFLECTION": "true"}
LIST = reflection_pb2.ServerReflectionRequest(list_services="")
METHOD = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"


@pytest.fixture(scope="module")
def telling() -> Iterator[str]:
    with ServerProcess(environment=ON) as server:
        yield server.address
        assert server.log == []


def asked(address: str, *requests: Any, metadata: tuple[tuple[str, str], ...] = ()) -> list[Any]:
    with grpc.insecure_channel(address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        return list(stub.ServerReflectionInfo(iter(requests), metadata=metadata, timeout=20))


def test_it_is_off_unless_it_is_switched_on(server: ServerProcess) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        asked(server.address, LIST)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_switched_on_it_describes_every_service(telling: str) -> None:
    with grpc.insecure_channel(telling) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        assert set(database.get_services()) == {
            "kedge.v1.RunService",
            "kedge.v1.OptimizerService",
            "kedge.v1.CheckpointService",
            "grpc.reflection.v1alpha.ServerReflection",
        }
        told = database.FindFileContainingSymbol("kedge.v1.RunService")
    assert told.SerializeToString() == run_service_pb2.DESCRIPTOR.serialized_pb


def test_it_asks_for_a_role(tmp_path: Path) -> None:
    token, line = new_token("eve", Role.READER)
    path = tmp_path / "tokens"
    path.write_text(line.line)
    with ServerProcess(environment=ON | {"KEDGE_ACCESS__TOKENS_FILE": str(path)}) as server:
        for metadata in ((), (("authorization", "Bearer kedge_no"),)):
            with pytest.raises(grpc.RpcError) as caught:
                asked(server.address, LIST, metadata=metadata)
            assert reason_of(caught.value) == "UNAUTHENTICATED"
        [answer] = asked(server.address, LIST, metadata=(("authorization", f"Bearer {token}"),))
        assert len(answer.list_services_response.service) == 4


def test_unknown_names_and_empty_questions_are_answered_and_the_stream_goes_on(telling: str) -> None:
    kind = reflection_pb2.ServerReflectionRequest
    extension = reflection_pb2.ExtensionRequest(containing_type="kedge.v1.Run", extension_number=-1)
    questions = [
        kind(file_by_filename="../../etc/passwd"),
        kind(file_containing_symbol="kedge.v1.Nothing"),
        kind(file_containing_extension=extension),
        kind(all_extension_numbers_of_type="?"),
        kind(),
        LIST,
    ]
    codes = [answer.error_response.error_code for answer in asked(telling, *questions)]
    not_found, invalid = grpc.StatusCode.NOT_FOUND.value[0], grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert codes == [not_found] * 4 + [invalid, 0]


@pytest.mark.parametrize("raw", [b"\xff", b"\x1a\x7fa", b"\x3a\x02\xff\xfe"])
def test_bytes_that_are_no_question_are_refused(telling: str, raw: bytes) -> None:
    with grpc.insecure_channel(telling) as channel, pytest.raises(grpc.RpcError) as caught:
        list(channel.stream_stream(METHOD)(iter([raw]), timeout=20))
    assert reason_of(caught.value) == "MALFORMED_MESSAGE"


def test_what_looks_like_a_chunk_is_a_question_like_any_other(telling: str) -> None:
    with grpc.insecure_channel(telling) as channel:
        assert len(list(channel.stream_stream(METHOD)(iter([b"\x12\x05\x08\x01\x12\x01a"]), timeout=20))) == 1


def test_idle_stream_does_not_keep_the_server_from_ending() -> None:
    def endless() -> Iterator[Any]:
        yield LIST
        threading.Event().wait(60)

    environment = ON | {"KEDGE_SERVER__GRACE_SECONDS": "60"}
    with ServerProcess(environment=environment) as server, grpc.insecure_channel(server.address) as channel:
        answers = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(endless())
        next(answers)
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises(grpc.RpcError) as caught:
            next(answers)
        assert reason_of(caught.value) == "SERVER_DRAINING"
        assert server.process.wait(timeout=30) == 0
