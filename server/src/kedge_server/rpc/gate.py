"""Lets a call in, or not: who calls, whether the method may be called, and for how long that holds.

Who calls is known to the servicers through `caller`; which run a call is about only they know, so that they ask
`require_run`. A call that is let in is ended when its token is withdrawn, however long it would last.
"""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import grpc

from kedge.wire import names
from kedge.wire.errors import KedgeError
from kedge_server.rpc.permissions import ADMINISTRATIVE, NEEDED_ROLES
from kedge_server.security import audit, pem
from kedge_server.security.access import Access, Credentials
from kedge_server.security.roles import EVERYBODY, Caller
from kedge_server.security.tokens import digest

_CERTIFICATE = "x509_pem_cert"
_CERTIFICATE_URIS = "peer_uri"
_REFUSALS = ("PERMISSION_DENIED", "WRONG_IDENTITY")


class _Call(NamedTuple):
    method: str
    credentials: Credentials
    who: Caller
    administered: list[str]
    """The runs that it was let through to, if it is an administrative one."""


_current: ContextVar[_Call] = ContextVar("call")  # without a default: what no gate let in, may nothing


def caller() -> Caller:
    """Who makes the call that is being answered."""
    return _current.get().who


def require_run(name: str) -> str:
    """Lets a call go on that is about this run, whether there is such a run or not.

    Args:
        name: `runs/{run}`.

    Returns:
        The name.

    Raises:
        KedgeError: PERMISSION_DENIED.
    """
    call = _current.get()
    who = call.who
    if not who.may_touch(names.parse_run(name)):
        message = f"{who.identity} may not touch {name}: its credentials are for {','.join(who.runs)}"
        raise KedgeError("PERMISSION_DENIED", message, role=who.role.text, needs=who.role.text, run=name)
    if call.method in ADMINISTRATIVE:
        call.administered.append(name)
    return name


class Gate:
    """Lets calls in. Belongs to one loop.

    Args:
        access: who is known.
    """

    def __init__(self, access: Access) -> None:
        self._access = access
        self._inside: dict[asyncio.Timeout, _Call] = {}
        access.on_change(self._look_again)

    @contextlib.asynccontextmanager
    async def entered(self, method: str, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[None]:
        """Around a call.

        Raises:
            KedgeError: UNAUTHENTICATED, also in the middle of it; PERMISSION_DENIED.
        """
        if not self._access.asks:
            with _noted(_Call(method, Credentials(), EVERYBODY, [])):
                yield
            return
        credentials, what = _credentials(context)
        who = self._access.caller(credentials)
        if who is None:
            raise _unknown(method, context.peer(), what)
        call = _Call(method, credentials, who, [])
        with _noted(call):
            _require_role(method, who)
            async with self._until_withdrawn(call):
                yield

    @contextlib.asynccontextmanager
    async def _until_withdrawn(self, call: _Call) -> AsyncIterator[None]:
        staying = asyncio.timeout(None)
        self._inside[staying] = call
        try:
            async with staying:
                yield
        except TimeoutError:
            if not staying.expired():
                raise
            raise KedgeError("UNAUTHENTICATED", "the credentials of this call were withdrawn: give others") from None
        finally:
            del self._inside[staying]

    def _look_again(self) -> None:
        """Ends the calls whose credentials are not what they were."""
        known = {call.credentials: self._access.caller(call.credentials) for call in self._inside.values()}
        ended: Counter[str] = Counter()
        for staying, call in list(self._inside.items()):
            if known[call.credentials] != call.who:
                ended[call.who.identity] += 1
                with contextlib.suppress(RuntimeError):  # it is expiring already
                    staying.reschedule(0)
        for identity, count in ended.items():
            audit.withdrawn(identity, count)


@contextlib.contextmanager
def _noted(call: _Call) -> Iterator[None]:
    """Makes it the call that is being answered, and tells the audit log of it where that is wanted."""
    _current.set(call)
    outcome = "CANCELLED"
    try:
        yield
        outcome = "OK"
    except KedgeError as error:
        outcome = error.reason
        if outcome in _REFUSALS:
            about = error.metadata.get("run") or error.metadata.get("worker", "")
            audit.refused(call.who, call.method, about=about, reason=outcome)
        raise
    except Exception:
        outcome = "INTERNAL"
        raise
    finally:
        if call.administered:
            audit.administered(call.who, call.method, runs=call.administered, outcome=outcome)


def _unknown(method: str, peer: str, what: str) -> KedgeError:
    audit.rejected(method, peer=peer, cause=what)
    return KedgeError(
        "UNAUTHENTICATED",
        f"the call came with {what}: give kedge.connect a token that is valid now, or name its file in "
        "KEDGE_TOKEN_FILE; where the server takes client certificates, one whose URI is kedge://ID/ROLE does as well",
    )


def _require_role(method: str, who: Caller) -> None:
    needed = NEEDED_ROLES.get(method)
    if needed is not None and who.role >= needed:
        return
    needs = "no role at all" if needed is None else needed.text
    message = f"{who.identity} is a {who.role.text}, and {method.rpartition('.')[2]} needs {needs}"
    raise KedgeError("PERMISSION_DENIED", message, role=who.role.text, needs=needs, run="")


def _credentials(context: grpc.aio.ServicerContext[Any, Any]) -> tuple[Credentials, str]:
    """What a call came with, and what to call that should it not be known."""
    peer = context.auth_context()
    uris = tuple(uri.decode("utf-8", "replace") for uri in peer.get(_CERTIFICATE_URIS, ()))
    certificate = b"".join(peer.get(_CERTIFICATE, ()))
    token, what = _token(context)
    token_sha256 = None if token is None else digest(token)
    credentials = Credentials(token_sha256, uris, pem.ends_at(certificate) if certificate else None)
    if credentials.has_expired:
        what = "a client certificate that has expired"
    elif credentials.identity_uris:
        what = "a client certificate whose kedge:// URI is not understood, or has several"
    return credentials, what


def _token(context: grpc.aio.ServicerContext[Any, Any]) -> tuple[str | None, str]:
    given = [str(value) for key, value in context.invocation_metadata() or () if key == "authorization"]
    if len(given) != 1:  # of several, nobody could say which one counts
        return None, "several authorization headers" if given else "no token"
    scheme, _, token = given[0].partition(" ")
    if scheme.lower() != "bearer":
        return None, "an authorization that is no bearer token"
    return token, "an unknown token"
