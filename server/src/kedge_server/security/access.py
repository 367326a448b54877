"""Who is known to a server, as of now: the tokens of its file, read again when that changes, and certificates.

A certificate that the TLS handshake has accepted says who its holder is in a URI among its subject's alternative names,
`kedge://ID/ROLE` or `kedge://ID/ROLE/RUNS`; a token that comes along with such a one is not looked at. A certificate
without such a URI is a way in, and no identity; one with several is nobody's.
"""

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, NamedTuple

import structlog

from kedge_server.security.roles import EVERYBODY, Caller, parse_caller
from kedge_server.security.tokens import Token, find, parse_tokens

POLL_SECONDS: Final = 1.0
"""How often the file is looked at: a token that is taken out of it ends within this time and `SETTLE_SECONDS`."""

SETTLE_SECONDS: Final = 0.1
"""What has changed holds when it is still the same after this time: an editor may have been in the middle of it."""

_SCHEME = "kedge://"

_log = structlog.get_logger("kedge.access")


class Credentials(NamedTuple):
    """What a call came with: no token, only its digest, so that it can be kept for as long as the call lasts."""

    token_sha256: bytes | None = None
    certificate_uris: tuple[str, ...] = ()
    """The URIs of a client certificate that was verified."""
    certificate_ends_at: datetime | None = None
    """Until when it holds: the handshake looked at that, but a connection lasts on, and a session may be resumed."""

    @property
    def identity_uris(self) -> tuple[str, ...]:
        """What the certificate says of its holder: nothing, one thing, or several, of which none counts."""
        return tuple(uri for uri in self.certificate_uris if uri.startswith(_SCHEME))

    @property
    def has_expired(self) -> bool:
        """Whether the certificate, if there is one, holds no more."""
        return self.certificate_ends_at is not None and datetime.now(UTC) > self.certificate_ends_at


class Access:
    """What is known of callers. Belongs to one loop.

    Args:
        tokens_file: see `kedge_server.security.tokens`; None: there are no tokens.
        takes_certificates: whether client certificates are asked for.

    Raises:
        OSError, ValueError: the file cannot be read, or is none.
    """

    def __init__(self, tokens_file: Path | None = None, *, takes_certificates: bool = False) -> None:
        self._file = tokens_file
        self._takes_certificates = takes_certificates
        self._tokens: tuple[Token, ...] = ()
        self._seen: bytes | str = b""
        self._listeners: list[Callable[[], None]] = []
        if tokens_file is not None:
            self._seen = tokens_file.read_bytes()
            self._tokens = _parse(self._seen)

    @property
    def asks(self) -> bool:
        """Whether it asks who calls."""
        return self._file is not None or self._takes_certificates

    def caller(self, credentials: Credentials) -> Caller | None:
        """Who comes with these; None if that is not known."""
        if not self.asks:
            return EVERYBODY
        if credentials.has_expired:
            return None
        uris = credentials.identity_uris if self._takes_certificates else ()
        if uris:
            return parse_uri(uris[0]) if len(uris) == 1 else None
        return None if credentials.token_sha256 is None else find(self._tokens, credentials.token_sha256)

    def on_change(self, listener: Callable[[], None]) -> None:
        """Has this called whenever other tokens hold than before."""
        self._listeners.append(listener)

    async def watch(self) -> None:
        """Reads the file again whenever it has changed. Ends only when it is cancelled."""
        while True:
            await asyncio.sleep(POLL_SECONDS)
            content = self._content()
            if content != self._seen:
                await asyncio.sleep(SETTLE_SECONDS)
                self.look(settled=content)

    def look(self, *, settled: bytes | str | None = None) -> None:
        """Takes up what the file says now. What cannot be read changes nothing, and is said once.

        Args:
            settled: what the file has to hold still, if given; else nothing is done this time.
        """
        content = self._content()
        if content == self._seen or settled not in (None, content):
            return
        self._seen = content
        try:
            tokens = _parse(content)
        except ValueError as error:
            _log.error("the tokens could not be read, those of before hold on", file=str(self._file), cause=str(error))
            return
        _log.info("tokens read", file=str(self._file), count=len(tokens))
        if tokens != self._tokens:
            self._tokens = tokens
            for listener in self._listeners:
                listener()

    def _content(self) -> bytes | str:
        """The whole file, since no stamp tells of each change; or why there is none."""
        if self._file is None:
            return b""
        try:
            return self._file.read_bytes()
        except OSError as error:
            return f"it cannot be read: {error.strerror}"


def parse_uri(uri: str) -> Caller | None:
    """Who a certificate's URI says its holder is; None if it says nothing that is understood."""
    identity, *rest = uri.removeprefix(_SCHEME).split("/")
    if len(rest) not in (1, 2):
        return None
    try:
        return parse_caller(identity, *rest)
    except ValueError:
        return None


def _parse(content: bytes | str) -> tuple[Token, ...]:
    if isinstance(content, str):
        raise ValueError(content)
    return parse_tokens(content.decode("utf-8-sig", "replace"))  # some editors begin with a byte order mark
