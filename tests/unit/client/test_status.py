import grpc
import pytest
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2

from kedge.errors import ConflictError, InternalError, InvalidInputError, KedgeError, UnavailableError
from kedge.transport.status import error_from_rpc


class Failed(grpc.RpcError):
    def __init__(self, code, details="why", metadata=()):
        self._code, self._details, self._metadata = code, details, metadata

    def code(self):
        return self._code

    def details(self):
        return self._details

    def trailing_metadata(self):
        return self._metadata


def rich(*details, code=9, message="what happened"):
    status = status_pb2.Status(code=code, message=message)
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return (("other", "x"), ("grpc-status-details-bin", status.SerializeToString()))


def info(reason, domain="kedge.dev", **metadata):
    return error_details_pb2.ErrorInfo(reason=reason, domain=domain, metadata=metadata)


def translated(code, details="why", metadata=(), *, is_closed=False):
    return error_from_rpc(Failed(code, details, metadata), address="host:1", is_closed=is_closed)


def test_error_info_gives_reason_family_message_and_metadata():
    error = translated(grpc.StatusCode.ABORTED, metadata=rich(info("STALE_GRADIENT", base_step="1", limit="4")))

    assert type(error) is ConflictError
    assert (error.reason, error.message) == ("STALE_GRADIENT", "what happened")
    assert error.metadata == {"base_step": "1", "limit": "4"}
    assert error.retry_after_seconds is None


def test_retry_info_gives_the_delay():
    delay = error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(seconds=1, nanos=500_000_000))
    for reason in ("STAGING_FULL", "QUEUE_FULL", "TOO_MANY_STREAMS"):
        for details in ((info(reason), delay), (delay, info(reason))):
            error = translated(grpc.StatusCode.RESOURCE_EXHAUSTED, metadata=rich(*details))
            assert (error.reason, error.retry_after_seconds) == (reason, 1.5)


def test_limit_that_grpc_itself_or_a_proxy_names_is_one_to_come_back_for():
    error = translated(grpc.StatusCode.RESOURCE_EXHAUSTED, "Concurrent RPC limit exceeded!")

    assert (error.reason, error.entry.retry) == ("SERVER_UNAVAILABLE", "backoff")
    assert "host:1" in error.message
    assert "Concurrent RPC limit exceeded!" in error.message


def test_reason_of_a_newer_server_is_kept():
    keys = {"message": "a key", "reason": "too"}
    future = error_details_pb2.ErrorInfo(reason="FROM_THE_FUTURE", domain="kedge.dev", metadata=keys)
    error = translated(grpc.StatusCode.ABORTED, metadata=rich(future))

    assert (type(error), error.reason) == (KedgeError, "FROM_THE_FUTURE")
    assert error.metadata == keys
    assert error.entry.retry == "never"


@pytest.mark.parametrize(
    "metadata", [rich(info("RUN_NOT_FOUND", domain="example.com")), (("grpc-status-details-bin", b"\xff\xff"),), rich()]
)
def test_details_that_are_not_ours_are_passed_over(metadata):
    assert translated(grpc.StatusCode.UNAVAILABLE, metadata=metadata).reason == "SERVER_UNAVAILABLE"


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED])
def test_server_that_does_not_answer_is_named(code):
    error = translated(code)

    assert type(error) is UnavailableError
    assert error.metadata == {"address": "host:1"}
    assert "host:1" in error.message
    assert "why" in error.message


def test_own_cancelling_is_told_from_that_of_a_server_that_goes_away():
    assert translated(grpc.StatusCode.CANCELLED, is_closed=True).reason == "CANCELLED"
    assert translated(grpc.StatusCode.CANCELLED).reason == "SERVER_UNAVAILABLE"


def test_unknown_method_is_unsupported():
    error = translated(grpc.StatusCode.UNIMPLEMENTED)

    assert (type(error), error.reason) == (InvalidInputError, "UNSUPPORTED")


@pytest.mark.parametrize("code", [grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL, grpc.StatusCode.PERMISSION_DENIED])
def test_all_else_is_internal_with_its_text(code):
    error = translated(code)

    assert type(error) is InternalError
    assert "why" in error.message
    assert translated(code, details=None).reason == "INTERNAL"
