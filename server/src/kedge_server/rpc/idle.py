"""Streams that wait for their peer: a stopping server ends them at once instead of waiting with them."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Hashable
from typing import Any

from kedge.wire.errors import KedgeError


class IdleStreams:
    """Where streams wait for their next request, or for the rest of an upload. Belongs to one loop."""

    def __init__(self) -> None:
        self._waiting: set[asyncio.Timeout] = set()
        self._uploads: dict[Hashable, asyncio.Timeout] = {}
        self._has_ended = False

    async def next_request(self, requests: AsyncIterator[Any]) -> Any:
        """The next request of a stream, or None at its end.

        Raises:
            KedgeError: SERVER_DRAINING, when `end` is called meanwhile.
        """
        waiting = self._interruptible()
        try:
            async with waiting:
                return await anext(requests, None)
        except TimeoutError:
            raise KedgeError("SERVER_DRAINING", "the server is shutting down: open the stream again later") from None
        finally:
            self._waiting.discard(waiting)

    @contextlib.asynccontextmanager
    async def upload(self, uploader: Hashable) -> AsyncIterator[None]:
        """Around an upload, the only one of its uploader: an older one is a lost connection's, and ends.

        Raises:
            KedgeError: SERVER_DRAINING, when `end` is called meanwhile; UPLOAD_STALLED for a newer one.
        """
        if uploader in self._uploads:
            _expire(self._uploads[uploader])
        waiting = self._uploads[uploader] = self._interruptible()
        try:
            async with waiting:
                yield
        except TimeoutError:
            if self._has_ended:
                raise KedgeError("SERVER_DRAINING", "the server is shutting down: send it again later") from None
            raise KedgeError(
                "UPLOAD_STALLED", "the worker began another upload: this one was left unfinished", idle_seconds=0
            ) from None
        finally:
            self._waiting.discard(waiting)
            if self._uploads.get(uploader) is waiting:
                del self._uploads[uploader]

    def end(self) -> None:
        """Ends the streams that wait now, and those that come to wait."""
        self._has_ended = True
        for waiting in list(self._waiting):
            _expire(waiting)

    def _interruptible(self) -> asyncio.Timeout:
        """What `end` ends; to be entered at once, and discarded when it is left."""
        waiting = asyncio.timeout(0 if self._has_ended else None)
        self._waiting.add(waiting)
        return waiting


def _expire(waiting: asyncio.Timeout) -> None:
    with contextlib.suppress(RuntimeError):  # it is expiring already
        waiting.reschedule(0)
