"""From a gRPC status to a `KedgeError`: the one place where `grpc.RpcError` ends."""

from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from kedge.wire.errors import DOMAIN, KedgeError

_DETAILS_KEY = "grpc-status-details-bin"
_OF_AGE = "max connection age"  # as gRPC's servers say it


def error_from_rpc(error: grpc.RpcError, *, address: str, is_closed: bool) -> KedgeError:
    """The error that a failed call stands for.

    Args:
        error: what gRPC raised.
        address: the server's, for the message.
        is_closed: whether this side has closed the call or its channel.
    """
    call: Any = error  # what gRPC raises is the call itself
    return _error_from_details(call) or _error_from_code(call, address, is_closed=is_closed)


def internal_error(message: str) -> KedgeError:
    """An answer that breaks the protocol."""
    return KedgeError("INTERNAL", message)


def cancelled_error() -> KedgeError:
    """What becomes of calls on something that this side has closed."""
    return KedgeError("CANCELLED", "the connection was closed by this process: make another with kedge.connect")


def _error_from_details(call: Any) -> KedgeError | None:
    """The error that the server describes; None if it describes none, as proxies and gRPC itself do not."""
    status = status_pb2.Status()
    info = error_details_pb2.ErrorInfo()
    retry = error_details_pb2.RetryInfo()
    try:
        status.ParseFromString(_raw_details(call))
        for detail in status.details:
            if not detail.Unpack(info):
                detail.Unpack(retry)
    except DecodeError:
        return None
    if info.domain != DOMAIN:
        return None
    delay = retry.retry_delay.ToNanoseconds() / 1e9 if retry.HasField("retry_delay") else None
    error = KedgeError(info.reason, status.message, retry_after_seconds=delay)
    error.metadata = dict(info.metadata)
    return error


def _raw_details(call: Any) -> bytes:
    for key, value in call.trailing_metadata() or ():
        if key == _DETAILS_KEY:
            return value if isinstance(value, bytes) else value.encode()
    return b""


def _error_from_code(call: Any, address: str, *, is_closed: bool) -> KedgeError:
    code, details = call.code(), call.details() or "no details"
    if code is grpc.StatusCode.CANCELLED and is_closed:
        return cancelled_error()
    if code is grpc.StatusCode.UNAVAILABLE and _OF_AGE in details:
        message = (
            f"{address} has ended the connection for its age, and with it this call: what takes longer than "
            "tls.max_connection_age_grace_seconds of that server needs more of it"
        )
        return KedgeError("SERVER_UNAVAILABLE", message, retry_after_seconds=0.0, address=address)
    # A call that someone else cancels is one whose server, or a proxy before it, is going away.
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED):
        message = f"no answer from {address} ({details}): check that kedge-server runs there and can be reached"
        return KedgeError("SERVER_UNAVAILABLE", message, address=address)
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        # Said by gRPC or a proxy: too many calls at once, or no memory for them.
        message = f"the server at {address} has no room for this call now ({details}): let fewer workers come at once"
        return KedgeError("SERVER_UNAVAILABLE", message, address=address)
    if code is grpc.StatusCode.UNIMPLEMENTED:
        message = f"the server at {address} does not know this call ({details}): bring client and server to one version"
        return KedgeError("UNSUPPORTED", message, method="")
    return internal_error(f"the server at {address} failed with {code}: {details}")
