"""The server's side of TLS: its certificate and the CAs of its clients, taken up anew when their files change.

A connection gets what holds when it is made. What stands in the files is looked at before it is used: what cannot be
used changes nothing, so that whoever replaces one file after the other breaks nothing in between.
"""

import asyncio
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, NamedTuple, TypeAlias, cast

import grpc
import structlog
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from kedge_server.config import ConfigError, TlsSection
from kedge_server.security import pem
from kedge_server.security.access import POLL_SECONDS, SETTLE_SECONDS

SOON: Final = timedelta(days=7)
"""How long before its end a certificate is said to end soon."""

_RSA_BITS = 2048
_CURVES = (ec.SECP256R1, ec.SECP384R1)
"""What gRPC's TLS agrees on with its clients. With Ed25519 or P-521 no handshake comes about."""

_HANDSHAKE_BEGINS_SECONDS = 0.2
"""A thousand times what a handshake takes from asking for its configuration to holding on to it."""

_Content: TypeAlias = bytes | str
"""Of a file; or why it cannot be read."""

_log = structlog.get_logger("kedge.tls")


class _Contents(NamedTuple):
    cert: _Content
    key: _Content
    client_ca: _Content | None


class _Pair(NamedTuple):
    """A certificate with its chain, and its key, as PEM."""

    chain: bytes
    key: bytes
    ends_at: datetime


class _ClientCas(NamedTuple):
    """A file of them, as PEM, and when each one ends."""

    bundle: bytes
    ends_at: tuple[datetime, ...]


class ServerCertificates:
    """What a server shows to its clients, and what it wants to see of them. Its watch belongs to one loop.

    Args:
        tls: of a configuration with a certificate.
        clock: tells the time.

    Raises:
        ConfigError: a file cannot be read, or is not what it has to be.
    """

    def __init__(self, tls: TlsSection, *, clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._tls = tls
        self._clock = clock
        self._seen = self._contents()
        self._pair = self._read_pair(self._seen)
        self._client_cas = self._read_client_cas(self._seen)
        self._ended_ca_count = self._count_ended_cas()
        self._version = 1
        self._complaints: list[str] = []
        self._notice = ""
        self._say_read()

    def credentials(self) -> grpc.ServerCredentials:
        """What a port of a server is made with."""
        taken = self._version

        def newer() -> grpc.ServerCertificateConfiguration | None:
            """What gRPC asks for when a handshake begins, in a thread of its own; None: it has the newest.

            It asks in one thread at a time, but then frees what it had, and another handshake may be about to begin
            with that (https://github.com/grpc/grpc/issues/36693). The pause lets that one begin.
            """
            nonlocal taken
            if taken == self._version:
                return None
            time.sleep(_HANDSHAKE_BEGINS_SECONDS)
            taken = self._version
            return self._configuration()

        fetch = cast(Callable[[], grpc.ServerCertificateConfiguration], newer)  # the types do not know of None
        return grpc.dynamic_ssl_server_credentials(self._configuration(), fetch, self._client_cas is not None)

    async def watch(self) -> None:
        """Looks at the files again and again. Ends only when it is cancelled."""
        while True:
            await asyncio.sleep(POLL_SECONDS)
            contents = self._contents()
            if contents != self._seen:
                await asyncio.sleep(SETTLE_SECONDS)
                if self._contents() != contents:
                    continue  # they are being written
            self._look_at(contents)

    def look(self) -> None:
        """Takes up what the files say now. What cannot be used changes nothing, and is said once."""
        self._look_at(self._contents())

    def _look_at(self, contents: _Contents) -> None:
        if contents != self._seen or self._complaints:  # with time, what is not valid yet becomes so
            self._seen = contents
            self._take(contents)
        if self._ended_ca_count != self._count_ended_cas():  # in a session that is resumed nobody would see that
            self._ended_ca_count = self._count_ended_cas()
            self._version += 1
        self._say_end()

    def _take(self, contents: _Contents) -> None:
        """Takes pair and CAs each for itself: a CA is withdrawn whatever is wrong with the certificate."""
        before = self._pair, self._client_cas
        complaints = []
        try:
            self._pair = self._read_pair(contents)
        except ConfigError as error:
            complaints.append(str(error))
        try:
            self._client_cas = self._read_client_cas(contents)
        except ConfigError as error:
            complaints.append(str(error))
        for cause in complaints:
            if cause not in self._complaints:
                _log.error("TLS files cannot be used, what held before holds on", cause=cause)
        self._complaints = complaints
        if (self._pair, self._client_cas) != before:
            self._version += 1
            self._say_read()

    def _configuration(self) -> grpc.ServerCertificateConfiguration:
        """What handshakes are made with. A new one ends the sessions that could be resumed."""
        bundle = None if self._client_cas is None else self._client_cas.bundle
        return grpc.ssl_server_certificate_configuration([(self._pair.key, self._pair.chain)], bundle)

    def _count_ended_cas(self) -> int:
        now = self._clock()
        return 0 if self._client_cas is None else sum(now > end for end in self._client_cas.ends_at)

    def _contents(self) -> _Contents:
        tls = self._tls
        client_ca = None if tls.client_ca_file is None else _content(tls.client_ca_file)
        return _Contents(_content(tls.cert_file), _content(tls.key_file), client_ca)

    def _read_pair(self, contents: _Contents) -> _Pair:
        chain_pem = _require("cert_file", self._tls.cert_file, contents.cert)
        chain = _certificates("cert_file", self._tls.cert_file, chain_pem)
        key_pem = _require("key_file", self._tls.key_file, contents.key)
        public_key = _public_key(self._tls.key_file, key_pem)
        if chain[0].public_key() != public_key:
            raise _wrong(
                "key_file",
                self._tls.key_file,
                f"it is not the key of the first certificate in {str(self._tls.cert_file)!r}: give the two of one pair",
            )
        self._require_valid("cert_file", self._tls.cert_file, chain[0])
        return _Pair(chain_pem, key_pem, chain[0].not_valid_after_utc)

    def _read_client_cas(self, contents: _Contents) -> _ClientCas | None:
        if contents.client_ca is None:
            return None
        path = self._tls.client_ca_file
        bundle = _require("client_ca_file", path, contents.client_ca)
        cas = _certificates("client_ca_file", path, bundle)
        # Some may have ended: a bundle holds the old one along with the new one.
        self._require_valid("client_ca_file", path, max(cas, key=lambda ca: ca.not_valid_after_utc))
        return _ClientCas(bundle, tuple(ca.not_valid_after_utc for ca in cas))

    def _require_valid(self, key: str, path: Path | None, certificate: x509.Certificate) -> None:
        now = self._clock()
        if now > certificate.not_valid_after_utc:
            raise _wrong(key, path, f"it expired at {_text(certificate.not_valid_after_utc)}: issue another one")
        if now < certificate.not_valid_before_utc:
            begins_at = _text(certificate.not_valid_before_utc)
            raise _wrong(key, path, f"it is not valid before {begins_at}: wait, or set this host's clock")

    def _say_read(self) -> None:
        _log.info("certificates read", file=str(self._tls.cert_file), ends_at=_text(self._pair.ends_at))
        self._say_end()

    def _say_end(self) -> None:
        """Says once that the certificate ends soon, and once that it has ended."""
        left = self._pair.ends_at - self._clock()
        notice = "" if left > SOON else "the certificate expires soon" if left > timedelta() else "it has expired"
        if notice and notice != self._notice:
            _log.warning(f"{notice}: replace it", file=str(self._tls.cert_file), ends_at=_text(self._pair.ends_at))
        self._notice = notice


def _content(path: Path | None) -> _Content:
    """The whole file, since no stamp tells of each change."""
    if path is None:
        return "there is none"
    try:
        return path.read_bytes()
    except OSError as error:
        return f"it cannot be read: {error.strerror}"


def _wrong(key: str, path: Path | None, what: str) -> ConfigError:
    return ConfigError(f"tls.{key} = {str(path)!r}: {what}")


def _require(key: str, path: Path | None, content: _Content) -> bytes:
    if isinstance(content, str):
        raise _wrong(key, path, f"{content}; name a file that this process may read")
    return content


def _certificates(key: str, path: Path | None, content: bytes) -> list[x509.Certificate]:
    try:
        return pem.certificates(content)
    except ValueError as error:
        raise _wrong(key, path, str(error)) from None


def _public_key(path: Path | None, content: bytes) -> object:
    """The public half of a private key."""
    try:
        key = pem.private_key(content)
    except ValueError as error:
        raise _wrong("key_file", path, str(error)) from None
    is_fit = (isinstance(key, rsa.RSAPrivateKey) and key.key_size >= _RSA_BITS) or (
        isinstance(key, ec.EllipticCurvePrivateKey) and isinstance(key.curve, _CURVES)
    )
    if not is_fit:
        what = (
            f"its kind of key is too weak or not known to gRPC: use RSA of {_RSA_BITS} bits or more, or P-256 or P-384"
        )
        raise _wrong("key_file", path, what)
    return key.public_key()


def _text(moment: datetime) -> str:
    return moment.isoformat(timespec="seconds")
