"""The audit log: who did what to the runs, and who was turned away. No line has a secret in it.

Who is turned away may come again as often as it likes, so of such lines only some are written, and of the others how
many there were.
"""

import asyncio
import time
from collections.abc import Iterable
from typing import Final

import structlog

from kedge_server.security.roles import Caller

WINDOW_SECONDS: Final = 10.0
WINDOW_LINES: Final = 20
"""So many lines of a kind are written in so long a time."""

_log = structlog.get_logger("kedge.audit")


class Tap:
    """Lets some lines of a kind through, and says of the others how many there were.

    Args:
        event: what a line says.
    """

    def __init__(self, event: str) -> None:
        self._event = event
        self._ends_at = 0.0
        self._written_count = 0
        self._left_out_count = 0

    def warn(self, **fields: object) -> None:
        """Writes a line, or counts it."""
        now = time.monotonic()
        if now >= self._ends_at:
            self._say_left_out()
            self._ends_at, self._written_count = now + WINDOW_SECONDS, 0
        if self._written_count < WINDOW_LINES:
            self._written_count += 1
            _log.warning(self._event, **fields)
            return
        if not self._left_out_count:
            asyncio.get_running_loop().call_later(self._ends_at - now, self._say_left_out)
        self._left_out_count += 1

    def _say_left_out(self) -> None:
        if self._left_out_count:
            _log.warning(f"{self._event}: lines were left out", count=self._left_out_count)
            self._left_out_count = 0


_rejections = Tap("credentials rejected")
_refusals = Tap("call refused")


def administered(who: Caller, method: str, *, runs: Iterable[str], outcome: str) -> None:
    """An administrative act was let through, and came to its end: OK, or the reason why not."""
    _log.info("administrative call", caller=who.identity, method=method, run=",".join(runs), outcome=outcome)


def refused(who: Caller, method: str, *, about: str, reason: str) -> None:
    """Somebody who is known asked for what is not theirs: a run, a worker, or the whole method."""
    _refusals.warn(caller=who.identity, role=who.role.text, method=method, about=about, reason=reason)


def rejected(method: str, *, peer: str, cause: str) -> None:
    """Somebody came with credentials that are not known."""
    _rejections.warn(peer=peer, method=method, cause=cause)


def withdrawn(identity: str, count: int) -> None:
    """So many calls were ended in the middle since their credentials are no longer what they were."""
    _log.warning("calls ended, their credentials were withdrawn", caller=identity, count=count)
