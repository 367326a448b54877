"""From an error of the catalogue to a gRPC status with `google.rpc` details."""

import asyncio
from typing import Any, NoReturn

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from kedge.wire.convert import duration_to_wire
from kedge.wire.errors import DOMAIN, KedgeError
from kedge_server.rpc.calls import hang_up

_DETAILS_KEY = "grpc-status-details-bin"
_MAX_TEXT = 1024  # a trailer has little room, and part of a message may be what the peer sent
_PAUSE_SECONDS = 0.002
_FAREWELL_SECONDS = 1.0
"""A reader that stalled and goes on within this time learns why its call ended."""


async def let_cancellation_come() -> None:
    """Waits until gRPC has told of a call that its peer has cancelled already, which ends it here.

    To be awaited before an answer to somebody who need not be known: of what is sent into a cancelled call gRPC's aio
    server keeps all for ever (grpc/grpc#43360), close to a kilobyte.
    """
    await asyncio.sleep(_PAUSE_SECONDS)


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: KedgeError) -> NoReturn:
    """Ends the call with the error's status, by raising; without it, where the peer does not take that."""
    code = grpc.StatusCode[error.entry.status]
    details = _status(error, code).SerializeToString()
    await let_cancellation_come()
    try:
        async with asyncio.timeout(_FAREWELL_SECONDS):
            await context.abort(code, error.message[:_MAX_TEXT], trailing_metadata=((_DETAILS_KEY, details),))
    except TimeoutError:
        hang_up()
    except grpc.aio.InternalError:  # the peer has gone, and there is nobody to tell
        raise asyncio.CancelledError from None


def _status(error: KedgeError, code: grpc.StatusCode) -> status_pb2.Status:
    status = status_pb2.Status(code=code.value[0], message=error.message[:_MAX_TEXT])
    metadata = {key: value[:_MAX_TEXT] for key, value in error.metadata.items()}
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=metadata)
    status.details.append(_packed(info))
    if error.retry_after_seconds is not None:
        delay = duration_to_wire(error.retry_after_seconds)
        status.details.append(_packed(error_details_pb2.RetryInfo(retry_delay=delay)))
    return status


def _packed(message: Message) -> AnyMessage:
    packed = AnyMessage()
    packed.Pack(message)
    return packed
