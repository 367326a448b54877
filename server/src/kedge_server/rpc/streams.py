"""The grammar of a stream with values: header, chunk*, trailer; read here for every upload."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any, NamedTuple

import numpy as np
from google.protobuf.message import Message

from kedge.wire.codec import Chunk, FlatDecoder
from kedge.wire.errors import KedgeError
from kedge_server.core.admission import Inspection


async def read_header(requests: AsyncIterator[Any]) -> Any:
    """The header of a stream that has begun.

    Raises:
        KedgeError: UNEXPECTED_MESSAGE.
    """
    message: Any = await anext(requests, None)
    if kind_of(message) != "header":
        raise unexpected("header", message)
    return message.header


class Patience(NamedTuple):
    """How long an upload may make no progress, and who wants to know when it does."""

    idle_seconds: float
    on_progress: Callable[[], None] = lambda: None
    """Called after each chunk. May raise to end the upload."""


async def read_values(
    requests: AsyncIterator[Any], out: np.ndarray, *, dtype: str, size_bytes: int, patience: Patience
) -> Inspection:
    """Reads chunks into `out` up to and with the trailer, and inspects the values while they are in the cache.

    Raises:
        KedgeError: SIZE_MISMATCH, UNEXPECTED_MESSAGE, CHECKSUM_MISMATCH, CHUNK_*, or UPLOAD_STALLED.
    """
    decoder = FlatDecoder(out, dtype=dtype, size_bytes=size_bytes)
    inspection = Inspection()
    async for message in _while_it_moves(requests, patience.idle_seconds):
        if type(message) is Chunk:
            inspection.add(decoder.add(message))
            patience.on_progress()
        elif kind_of(message) == "trailer":
            decoder.finish(message.trailer.crc32c)
            return inspection
        else:
            raise unexpected("chunk or trailer", message)
    raise unexpected("chunk or trailer", None)


async def _while_it_moves(requests: AsyncIterator[Any], idle_seconds: float) -> AsyncIterator[Any]:
    while True:
        try:
            async with asyncio.timeout(idle_seconds):
                message = await anext(requests, None)
        except TimeoutError:
            raise KedgeError(
                "UPLOAD_STALLED",
                f"no message of the upload came for {idle_seconds:g} s: send it again",
                idle_seconds=idle_seconds,
            ) from None
        if message is None:
            return
        yield message


def kind_of(message: Message | Chunk | None) -> str:
    """Which payload a streaming message has; "" for none."""
    if message is None:
        return ""
    if type(message) is Chunk:
        return "chunk"
    fields: Any = message
    return fields.WhichOneof("payload") or ""


def unexpected(expected: str, message: Message | Chunk | None) -> KedgeError:
    """The error for a message that the grammar does not allow here."""
    got = "the end of the stream" if message is None else kind_of(message) or "an empty message"
    return KedgeError(
        "UNEXPECTED_MESSAGE",
        f"expected {expected}, got {got}: a stream is a header, then chunks, then a trailer",
        expected=expected,
        got=got,
    )
