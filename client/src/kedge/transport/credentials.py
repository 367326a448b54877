"""What this side shows to a server, and whom it trusts there: read from files, and read again when they change.

gRPC keeps the files that a channel was made with, so that other ones need another channel: who holds a channel asks
`Credentials.have_changed`. Nothing that is secret stands in a message, a log line or a `repr`.
"""

import logging
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

import grpc

from kedge.config import CA_FILE_VARIABLE, CredentialSources, check_token

LOOK_SECONDS: Final = 0.1
"""How often, at most, the files are looked at."""

Metadata = tuple[tuple[str, str], ...] | None

_MAX_TOKEN_FILE_BYTES = 64 << 10
_NO_SOURCES = CredentialSources()

_logger = logging.getLogger("kedge")


@dataclass(frozen=True, repr=False)
class _Material:
    """What the files hold."""

    token: str | None
    ca: bytes | None
    cert: bytes | None
    key: bytes | None


class Credentials:
    """What a client shows and trusts. Thread-safe.

    Args:
        sources: where it is.
        clock: seconds that only grow.

    Raises:
        ValueError: for a file that cannot be read or does not hold what it should; the message says what to do.
    """

    def __init__(
        self, sources: CredentialSources = _NO_SOURCES, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.sources = sources
        self._clock = clock
        self._files = [
            path
            for path in (sources.token_file, sources.ca_file, sources.cert_file, sources.key_file)
            if isinstance(path, Path)
        ]
        self._looking = threading.Lock()
        self._look_at = clock() + LOOK_SECONDS
        self._seen = self._seen_last = self._stamps()
        self._material = _read(sources)

    @property
    def is_secure(self) -> bool:
        """Whether the connection is TLS."""
        return self.sources.is_secure

    @property
    def metadata(self) -> Metadata:
        """What goes along with every call."""
        token = self._material.token
        return None if token is None else (("authorization", f"Bearer {token}"),)

    def have_changed(self, *, at_once: bool = False) -> bool:
        """Whether they are others than when this was last asked. What cannot be used changes nothing, and is logged.

        Args:
            at_once: look now, however lately it was looked.
        """
        if not self._files or (self._clock() < self._look_at and not at_once):
            return False
        with self._looking:
            self._look_at = self._clock() + LOOK_SECONDS
            seen = self._stamps()
            is_settled = seen == self._seen_last  # one file of several is written before the others
            self._seen_last = seen
            if not at_once and (seen == self._seen or not is_settled):
                return False
            self._seen = seen
            try:
                material = _read(self.sources)
            except ValueError as error:
                _logger.warning("credentials were changed and cannot be used, those of before hold on: %s", error)
                return False
            if material == self._material:
                return False
            self._material = material
        _logger.info("credentials were changed: they are used from now on")
        return True

    def channel(self, address: str, options: Sequence[tuple[str, Any]]) -> grpc.Channel:
        """A channel to a server, with what the files held when they were last read."""
        material, name = self._material, self.sources.server_name
        if not self.is_secure:
            # A proxy would carry a token off this host.
            proxy = [] if material.token is None else [("grpc.enable_http_proxy", 0)]
            return grpc.insecure_channel(address, options=[*options, *proxy])
        secrets = grpc.ssl_channel_credentials(material.ca, material.key, material.cert)
        named = [] if name is None else [("grpc.ssl_target_name_override", name)]
        return grpc.secure_channel(address, secrets, options=[*options, *named])

    def context(self) -> ssl.SSLContext:
        """The same for Python's own TLS, as gRPC does it, from the files as they are now.

        Raises:
            ValueError: they cannot be used now.
        """
        return _context(self.sources)

    def _stamps(self) -> list[object]:
        return [_stamp(path) for path in self._files]


def _stamp(path: Path) -> object:
    """What is another one once the file has changed; None for a file that is not there."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


def _read(sources: CredentialSources) -> _Material:
    """What the files hold, checked.

    Raises:
        ValueError: something is wrong with one of them, or they were changed meanwhile.
    """
    before = _read_bytes(sources)
    if sources.is_secure:
        _context(sources)  # it takes paths only
        if _read_bytes(sources) != before:
            raise ValueError("the files are being written")
    return before


def _read_bytes(sources: CredentialSources) -> _Material:
    return _Material(
        token=sources.token if sources.token_file is None else _read_token(sources.token_file),
        ca=_read_cas(sources) if sources.is_secure else None,
        cert=None if sources.cert_file is None else _read_file("cert_file", sources.cert_file),
        key=None if sources.key_file is None else _read_file("key_file", sources.key_file),
    )


def _read_token(path: Path) -> str:
    content = _read_file("token_file", path)
    try:
        token = content.decode("ascii").strip() if len(content) <= _MAX_TOKEN_FILE_BYTES else ""
    except UnicodeDecodeError:
        token = ""
    return check_token(token, f"token_file {path}")


def _read_cas(sources: CredentialSources) -> bytes:
    """The CAs to trust: where none are named, those of the system, and not the ones that come with gRPC."""
    if isinstance(sources.ca_file, Path):
        return _read_file("ca_file", sources.ca_file)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_default_certs()
    found = context.get_ca_certs(binary_form=True)
    if not found:
        raise ValueError(
            f"this system has no CAs where Python looks for them: give ca_file or set {CA_FILE_VARIABLE}, "
            "a file with the CA of the server's certificate"
        )
    return "".join(map(ssl.DER_cert_to_PEM_cert, found)).encode()


def _read_file(name: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        message = f"{name} {path} cannot be read: {error.strerror}; name a file that this process may read"
        raise ValueError(message) from None


def _context(sources: CredentialSources) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # an intermediate CA may be trusted by itself
    context.set_alpn_protocols(["h2"])
    if isinstance(sources.ca_file, Path):
        _load("ca_file", sources.ca_file, "certificates of CAs", context.load_verify_locations)
    else:
        context.load_default_certs()
    if sources.cert_file is not None and sources.key_file is not None:
        _load_pair(context, sources.cert_file, sources.key_file)
    return context


def _load(name: str, path: Path, content: str, load: Callable[[Path], object]) -> None:
    try:
        load(path)
    except ssl.SSLError:
        raise ValueError(f"{name} {path} holds no {content}: give them in PEM") from None
    except OSError as error:
        raise ValueError(f"{name} {path} cannot be read: {error.strerror}") from None


def _load_pair(context: ssl.SSLContext, cert_file: Path, key_file: Path) -> None:
    try:
        context.load_cert_chain(cert_file, key_file, password=_refuse_password)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise ValueError(f"cert_file {cert_file} and key_file {key_file} are not of one pair") from None
        message = f"cert_file {cert_file} and key_file {key_file}: one holds no certificate or no private key in PEM"
        raise ValueError(message) from None
    except OSError as error:
        raise ValueError(f"cert_file {cert_file} or key_file {key_file} cannot be read: {error.strerror}") from None
    except _EncryptedKeyError:
        raise ValueError(f"key_file {key_file} is encrypted: give one without a password") from None


class _EncryptedKeyError(Exception):
    pass


def _refuse_password() -> NoReturn:
    raise _EncryptedKeyError
