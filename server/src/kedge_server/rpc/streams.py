"""The grammar of a stream with values: header, chunk*, trailer; read here for every upload, and within a deadline."""

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any, NamedTuple, Self

import grpc
import numpy as np
from google.protobuf.message import Message

from kedge.wire.codec import Chunk, Malformed
from kedge.wire.compressed import gradient_decoder
from kedge.wire.errors import KedgeError
from kedge_server.core.admission import Inspection
from kedge_server.engine.limits import Limits
from kedge_server.rpc import calls

_PIECES_A_TURN = 16
"""Of compressed gradients, up to 64 Ki elements each: about a millisecond."""


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
    """How long an upload may make no progress, how long it may take, and who wants to know that it goes on."""

    idle_seconds: float
    on_progress: Callable[[], None] = lambda: None
    """Called after each chunk. May raise to end the upload."""
    total_seconds: float = math.inf
    """From the header on."""

    @classmethod
    def of(cls, limits: Limits, size_bytes: int, on_progress: Callable[[], None] = lambda: None) -> Self:
        """What the limits grant an upload of so many bytes."""
        total_seconds = limits.upload_idle_seconds + size_bytes / limits.upload_min_bytes_per_second
        return cls(limits.upload_idle_seconds, on_progress, total_seconds)


class Upload:
    """What follows a header: chunk*, trailer. Its time runs from here on.

    Args:
        requests: the stream, its header read.
        patience: its deadline.
    """

    def __init__(self, requests: AsyncIterator[Any], patience: Patience) -> None:
        self._requests = requests
        self._patience = patience
        self._ends_at = asyncio.get_running_loop().time() + patience.total_seconds
        self._begun_with: Any = None

    async def begin(self) -> None:
        """Waits for the first message, so that nothing is held for who sends no more than a header.

        Raises:
            KedgeError: UPLOAD_STALLED.
        """
        self._begun_with = await self._next()

    async def read(self, out: np.ndarray, *, dtype: str, size_bytes: int) -> Inspection:
        """Reads chunks into `out` up to and with the trailer, and inspects the values while they are in the cache.

        Raises:
            KedgeError: SIZE_MISMATCH, UNEXPECTED_MESSAGE, MALFORMED_MESSAGE, CHECKSUM_MISMATCH, CHUNK_*, or
                UPLOAD_STALLED.
        """
        decoder = gradient_decoder(out, dtype=dtype, size_bytes=size_bytes)
        inspection = Inspection()
        message, self._begun_with = self._begun_with, None
        while True:
            message = message or await self._next()
            if type(message) is Chunk:
                await _fill(decoder.pieces(message), inspection)
                self._patience.on_progress()
            elif kind_of(message) == "trailer":
                decoder.finish(message.trailer.crc32c)
                await _fill(decoder.rest(), inspection)
                return inspection
            else:
                raise unexpected("chunk or trailer", message)
            message = None

    async def _next(self) -> Any:
        idle_until = asyncio.get_running_loop().time() + self._patience.idle_seconds
        try:
            async with asyncio.timeout_at(min(idle_until, self._ends_at)):
                return await anext(self._requests, None)
        except TimeoutError:
            raise self._stalled(is_late=self._ends_at < idle_until) from None

    def _stalled(self, *, is_late: bool) -> KedgeError:
        patience = self._patience
        return stalled(
            patience.idle_seconds,
            f"the upload was not whole after {patience.total_seconds:g} s, which is all that its size is given"
            if is_late
            else f"no message of the upload came for {patience.idle_seconds:g} s",
        )


async def _fill(pieces: Iterable[np.ndarray], inspection: Inspection) -> None:
    """Reads a chunk. A few bytes may stand for many elements, so others get their turn in between."""
    for number, values in enumerate(pieces, 1):
        inspection.add(values)
        if number % _PIECES_A_TURN == 0:
            await asyncio.sleep(0)


async def only_message(seconds: float, context: "grpc.aio.ServicerContext[Any, Any]") -> Any:
    """The message of a call that has one.

    Raises:
        KedgeError: MALFORMED_MESSAGE, UPLOAD_STALLED.
    """
    try:
        # Not from the iterator of requests, which refers to itself and so to the call: it could not be hung up.
        message = await calls.read(context, seconds)
    except TimeoutError:
        raise _no_message(seconds) from None
    if message is grpc.aio.EOF:
        raise KedgeError("MALFORMED_MESSAGE", "the call ended without its message")
    return checked(message)


async def beginning_within(idle_seconds: float, requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    """The messages of a stream, the first one of which has to come in time.

    Raises:
        KedgeError: UPLOAD_STALLED.
    """
    try:
        async with asyncio.timeout(idle_seconds):
            first = await anext(requests, None)
    except TimeoutError:
        raise _no_message(idle_seconds) from None
    if first is not None:
        yield first
        async for message in requests:
            yield message


def checked(message: Any) -> Any:
    """Returns a message.

    Raises:
        KedgeError: MALFORMED_MESSAGE, if the bytes were none.
    """
    if isinstance(message, Malformed):
        raise KedgeError("MALFORMED_MESSAGE", f"the bytes are not this method's message: {message.detail}")
    return message


def stalled(idle_seconds: float, what: str) -> KedgeError:
    """The error for an upload that does not go on."""
    return KedgeError("UPLOAD_STALLED", f"{what}: send it again", idle_seconds=idle_seconds)


def _no_message(seconds: float) -> KedgeError:
    return stalled(seconds, f"no message came for {seconds:g} s")


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
