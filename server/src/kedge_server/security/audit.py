"""The audit log: who did what to the runs, and who was turned away. No line has a secret in it."""

import structlog

from kedge_server.security.roles import Caller

_log = structlog.get_logger("kedge.audit")


def administered(who: Caller, method: str, *, run: str) -> None:
    """An administrative act was let through."""
    _log.info("administrative call", caller=who.identity, method=method, run=run)


def refused(who: Caller, method: str, *, run: str, cause: str) -> None:
    """Somebody who is known asked for what is not theirs."""
    _log.warning("call refused", caller=who.identity, role=who.role.text, method=method, run=run, cause=cause)


def rejected(method: str, *, peer: str, cause: str) -> None:
    """Somebody came with credentials that are not known."""
    _log.warning("credentials rejected", peer=peer, method=method, cause=cause)


def withdrawn(who: Caller) -> None:
    """A call was ended in the middle since its credentials are no longer what they were."""
    _log.warning("call ended, its credentials were withdrawn", caller=who.identity)
