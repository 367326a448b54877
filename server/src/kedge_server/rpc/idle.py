"""Streams that are open but idle: a stopping server ends them at once instead of waiting for them."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from kedge.wire.errors import KedgeError


class IdleStreams:
    """Where long-lived streams wait for their next request. Belongs to one loop."""

    def __init__(self) -> None:
        self._waiting: set[asyncio.Timeout] = set()
        self._has_ended = False

    async def next_request(self, requests: AsyncIterator[Any]) -> Any:
        """The next request of a stream, or None at its end.

        Raises:
            KedgeError: SERVER_DRAINING, when `end` is called meanwhile.
        """
        try:
            async with asyncio.timeout(0 if self._has_ended else None) as waiting:
                self._waiting.add(waiting)
                try:
                    return await anext(requests, None)
                finally:
                    self._waiting.discard(waiting)
        except TimeoutError:
            raise KedgeError("SERVER_DRAINING", "the server is shutting down: open the stream again later") from None

    def end(self) -> None:
        """Ends the streams that wait now, and those that come to wait."""
        self._has_ended = True
        for waiting in list(self._waiting):
            waiting.reschedule(0)
