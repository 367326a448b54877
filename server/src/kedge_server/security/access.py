"""Who is known to a server, as of now: the tokens of its file, read again when that changes, and certificates.

A certificate that the TLS handshake has accepted says who its holder is in a URI among its subject's alternative names,
`kedge://ID/ROLE` or `kedge://ID/ROLE/RUNS`; a token that comes along with such a one is not looked at. A certificate
without such a URI is a way in, and no identity.
"""

import asyncio
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

import structlog

from kedge_server.security.roles import EVERYBODY, Caller, Role, parse_runs
from kedge_server.security.tokens import Token, find, parse_tokens

POLL_SECONDS: Final = 1.0
"""How often files are looked at: a token that is taken out of its file ends within this time."""

_SCHEME = "kedge://"

_log = structlog.get_logger("kedge.access")


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
        self._seen: object = None
        self._listeners: list[Callable[[], None]] = []
        if tokens_file is not None:
            self._seen, self._tokens = _stamp(tokens_file), _read(tokens_file)

    @property
    def asks(self) -> bool:
        """Whether it asks who calls."""
        return self._file is not None or self._takes_certificates

    def caller(self, token: str | None, certificate_uris: Iterable[str] = ()) -> Caller | None:
        """Who comes with these; None if that is not known.

        Args:
            token: as presented.
            certificate_uris: the URIs of a client certificate that was verified.
        """
        if not self.asks:
            return EVERYBODY
        if self._takes_certificates:
            for uri in certificate_uris:
                if uri.startswith(_SCHEME):
                    return parse_uri(uri)
        return None if token is None else find(self._tokens, token)

    def on_change(self, listener: Callable[[], None]) -> None:
        """Has this called whenever other tokens hold than before."""
        self._listeners.append(listener)

    async def watch(self) -> None:
        """Reads the file again whenever it has changed. Ends only when it is cancelled."""
        while True:
            await asyncio.sleep(POLL_SECONDS)
            self.look()

    def look(self) -> None:
        """Reads the file if it has changed. What cannot be read changes nothing, and is said once."""
        if self._file is None:
            return
        stamp = _stamp(self._file)
        if stamp == self._seen:
            return
        self._seen = stamp
        try:
            tokens = _read(self._file)
        except (OSError, ValueError) as error:
            _log.error("the tokens could not be read, those of before hold on", file=str(self._file), cause=str(error))
            return
        self._tokens = tokens
        _log.info("tokens read", file=str(self._file), count=len(tokens))
        for listener in self._listeners:
            listener()


def parse_uri(uri: str) -> Caller | None:
    """Who a certificate's URI says its holder is; None if it says nothing that is understood."""
    identity, _, rest = uri.removeprefix(_SCHEME).partition("/")
    role, _, runs = rest.partition("/")
    try:
        return Caller(identity, Role.parse(role), parse_runs(runs) if runs else ("*",)) if identity else None
    except ValueError:
        return None


def _stamp(path: Path) -> object:
    """What is another one once the file has changed; None for a file that is not there."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


def _read(path: Path) -> tuple[Token, ...]:
    return parse_tokens(path.read_text(encoding="utf-8"))
