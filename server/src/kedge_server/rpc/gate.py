"""Lets a call in, or not: who calls, whether the method may be called, and for how long that holds.

Who calls is known to the servicers through `caller`; which run a call is about only they know, so that they ask
`require_run`. A call that is let in is ended when its token is withdrawn, however long it would last.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable
from contextvars import ContextVar
from typing import Any

import grpc

from kedge.wire import names
from kedge.wire.errors import KedgeError
from kedge_server.rpc.permissions import ADMINISTRATIVE, NEEDED_ROLES
from kedge_server.security import audit
from kedge_server.security.access import Access
from kedge_server.security.roles import EVERYBODY, Caller

_BEARER = "bearer "
_CERTIFICATE_URIS = "peer_uri"

_caller: ContextVar[Caller] = ContextVar("caller", default=EVERYBODY)
_method: ContextVar[str] = ContextVar("method", default="")


def caller() -> Caller:
    """Who makes the call that is being answered."""
    return _caller.get()


def require_run(name: str) -> str:
    """Lets a call go on that is about this run.

    Args:
        name: `runs/{run}`.

    Returns:
        The name.

    Raises:
        KedgeError: PERMISSION_DENIED.
    """
    who, method = caller(), _method.get()
    if not who.may_touch(names.parse_run(name)):
        audit.refused(who, method, run=name, cause="not its run")
        message = f"{who.identity} may not touch {name}: its credentials are for {','.join(who.runs)}"
        raise KedgeError("PERMISSION_DENIED", message, role=who.role.text, needs=who.role.text, run=name)
    if method in ADMINISTRATIVE:
        audit.administered(who, method, run=name)
    return name


class Gate:
    """Lets calls in. Belongs to one loop.

    Args:
        access: who is known.
    """

    def __init__(self, access: Access) -> None:
        self._access = access
        self._inside: dict[asyncio.Timeout, tuple[str | None, tuple[str, ...], Caller]] = {}
        access.on_change(self._look_again)

    @contextlib.asynccontextmanager
    async def entered(self, method: str, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[None]:
        """Around a call.

        Raises:
            KedgeError: UNAUTHENTICATED, also in the middle of it; PERMISSION_DENIED.
        """
        if not self._access.asks:
            yield
            return
        token, uris = _token(context), _certificate_uris(context)
        who = self._admit(method, context.peer(), token, uris)
        _caller.set(who)
        _method.set(method)
        staying = asyncio.timeout(None)
        self._inside[staying] = token, uris, who
        try:
            async with staying:
                yield
        except TimeoutError:
            if not staying.expired():
                raise
            raise KedgeError("UNAUTHENTICATED", "the credentials of this call have been withdrawn") from None
        finally:
            del self._inside[staying]

    def _admit(self, method: str, peer: str, token: str | None, uris: Iterable[str]) -> Caller:
        who = self._access.caller(token, uris)
        if who is None:
            cause = "no token" if token is None else "an unknown token"
            audit.rejected(method, peer=peer, cause=cause)
            raise KedgeError(
                "UNAUTHENTICATED",
                f"the call came with {cause}, and no client certificate that says who it is: give kedge.connect a "
                "token that is valid now, or name its file in KEDGE_TOKEN_FILE",
            )
        needed = NEEDED_ROLES.get(method)
        if needed is None or who.role < needed:
            needs = "no role at all" if needed is None else needed.text
            audit.refused(who, method, run="", cause=f"needs {needs}")
            message = f"{who.identity} is a {who.role.text}, and {method.rpartition('.')[2]} needs {needs}"
            raise KedgeError("PERMISSION_DENIED", message, role=who.role.text, needs=needs, run="")
        return who

    def _look_again(self) -> None:
        """Ends the calls whose credentials are not what they were."""
        for staying, (token, uris, who) in list(self._inside.items()):
            if self._access.caller(token, uris) != who:
                audit.withdrawn(who)
                with contextlib.suppress(RuntimeError):  # it is expiring already
                    staying.reschedule(0)


def _token(context: grpc.aio.ServicerContext[Any, Any]) -> str | None:
    for key, value in context.invocation_metadata() or ():
        if key == "authorization" and isinstance(value, str) and value[: len(_BEARER)].lower() == _BEARER:
            return value[len(_BEARER) :].strip()
    return None


def _certificate_uris(context: grpc.aio.ServicerContext[Any, Any]) -> tuple[str, ...]:
    values = context.auth_context().get(_CERTIFICATE_URIS, ())
    return tuple(value.decode("utf-8", "replace") for value in values)
