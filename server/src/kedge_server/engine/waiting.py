"""Waiting for something on the loop, but not for ever."""

import asyncio


async def within(event: asyncio.Event, wait_seconds: float | None) -> bool:
    """Waits for an event at most so long, None without end, and says whether it came."""
    if wait_seconds is not None and wait_seconds <= 0:
        return event.is_set()
    try:
        async with asyncio.timeout(wait_seconds):
            await event.wait()
    except TimeoutError:
        return False
    return True
