"""Work that goes on to its end though whoever asked for it is gone."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

import structlog

from kedge.wire.errors import KedgeError

_log = structlog.get_logger("kedge.engine")

ResultT = TypeVar("ResultT")


async def lasting(work: Coroutine[Any, Any, ResultT]) -> ResultT:
    """Waits for work that the caller's cancellation does not end. What comes of it then concerns nobody, but a defect.

    Raises:
        Exception: as the work.
    """
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        task.add_done_callback(_look)
        raise


def _look(task: "asyncio.Future[Any]") -> None:
    error = None if task.cancelled() else task.exception()
    if error is not None and not isinstance(error, KedgeError):
        _log.error("defect", error=type(error).__name__, exc_info=error)
