"""Why no secure connection comes about: gRPC says only that there is none, so it is tried once with Python's `ssl`."""

import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, NamedTuple

from kedge.config import CA_FILE_VARIABLE, CERT_FILE_VARIABLE, KEY_FILE_VARIABLE, SYSTEM_CAS, Place, places
from kedge.transport.credentials import Credentials
from kedge.wire.errors import KedgeError

# What a client of HTTP/2 says first, with empty SETTINGS, and what the frame header of a server's SETTINGS looks like.
_PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\x04\0\0\0\0\0"
_FRAME_HEADER_BYTES = 9
_SETTINGS = 4

_EXPIRED, _NOT_YET_VALID = 10, 9  # OpenSSL's X509_V_ERR_*
_OTHER_NAME = frozenset({62, 63, 64})
_UNKNOWN_ISSUER = frozenset({2, 18, 19, 20, 21, 24, 27})

_PLAINTEXT_REASONS = frozenset(
    {"WRONG_VERSION_NUMBER", "HTTP_REQUEST", "PACKET_LENGTH_TOO_LONG", "RECORD_LAYER_FAILURE"}
)
_VERSION_REASONS = frozenset(
    {"TLSV1_ALERT_PROTOCOL_VERSION", "UNSUPPORTED_PROTOCOL", "TLSV1_ALERT_INSUFFICIENT_SECURITY"}
)
_SHOWN_NAME_COUNT = 8

_PATIENCE_SECONDS = 2.0
_PAUSE_SECONDS = 1.0


class _Finding(NamedTuple):
    cause: str
    message: str


class _Probe(NamedTuple):
    """A server as the probe meets it."""

    address: str
    place: Place
    credentials: Credentials
    timeout_seconds: float

    @property
    def server_name(self) -> str:
        """The name that the certificate must have."""
        return self.credentials.sources.server_name or self.place.host or "localhost"

    @contextmanager
    def connected(self) -> Iterator[socket.socket]:
        """A connection without TLS."""
        place = self.place
        if place.path:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(self.timeout_seconds)
                connection.connect(place.path)
                yield connection
            return
        with socket.create_connection((place.host, place.port), timeout=self.timeout_seconds) as connection:
            yield connection

    @contextmanager
    def secured(self, context: ssl.SSLContext) -> Iterator[ssl.SSLSocket]:
        """A connection with TLS."""
        with (
            self.connected() as connection,
            context.wrap_socket(connection, server_hostname=self.server_name) as secured,
        ):
            yield secured


class Diagnosis:
    """Tells of a server that cannot be reached whether it is for TLS. Thread-safe; looks once a second at most.

    Args:
        address: the server's.
        credentials: with which it is called.
        clock: seconds that only grow.
    """

    def __init__(self, address: str, credentials: Credentials, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._address = address
        self._credentials = credentials
        self._clock = clock
        self._looking = threading.Lock()
        self._look_at = clock()
        self._found: _Finding | None = None

    def of(self, error: KedgeError, timeout_seconds: float = _PATIENCE_SECONDS) -> KedgeError:
        """TLS_FAILED if that is why, else the error as it is."""
        if self._looking.acquire(blocking=False):
            try:
                if self._clock() >= self._look_at:
                    self._found = None  # for who comes meanwhile
                    self._found = _find(self._address, self._credentials, timeout_seconds)
                    self._look_at = self._clock() + _PAUSE_SECONDS
            finally:
                self._looking.release()
        found = self._found
        return (
            error
            if found is None
            else KedgeError("TLS_FAILED", found.message, address=self._address, cause=found.cause)
        )


def _find(address: str, credentials: Credentials, timeout_seconds: float) -> _Finding | None:
    """Tries once; None if it is not TLS that is wrong, as when nobody answers."""
    found = places(address)
    if not found:
        return None
    probe = _Probe(address, found[0], credentials, timeout_seconds)
    try:
        return _look_in_tls(probe) if credentials.is_secure else _look_in_plain(probe)
    except (OSError, ValueError):
        return None  # it cannot be reached, or its name or the files are none at the moment


def _look_in_plain(probe: _Probe) -> _Finding | None:
    if _speaks_plaintext(probe):
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    try:
        with probe.secured(context):
            pass
    except ssl.SSLError as error:
        if not (error.reason or "").startswith(("TLS", "SSLV3_ALERT")):
            return None  # it is no TLS either
    message = (
        f"the server at {probe.address} wants TLS: give ca_file, the CA of its certificate "
        f"({SYSTEM_CAS!r} for those that this system trusts), or set {CA_FILE_VARIABLE}"
    )
    return _Finding("SERVER_WANTS_TLS", message)


def _look_in_tls(probe: _Probe) -> _Finding | None:
    context = probe.credentials.context()
    try:
        with probe.secured(context) as connection:
            if connection.selected_alpn_protocol() != "h2":
                message = f"the server at {probe.address} speaks TLS and not gRPC: give the address of a kedge-server"
                return _Finding("OTHER", message)
            return _look_behind_handshake(probe, connection)
    except ssl.SSLCertVerificationError as error:
        return _of_server_certificate(probe, error)
    except ssl.SSLError as error:
        return _of_handshake(probe, error)
    except ConnectionResetError:
        return _of_plaintext(probe) if _speaks_plaintext(probe) else None


def _look_behind_handshake(probe: _Probe, connection: ssl.SSLSocket) -> _Finding | None:
    """What the server makes of this side. In TLS 1.3 its judgement comes after the handshake, or it just hangs up."""
    try:
        connection.sendall(_PREFACE)
        is_welcome = bool(connection.recv(_FRAME_HEADER_BYTES))
    except ssl.SSLError as error:
        return _of_handshake(probe, error)
    except (BrokenPipeError, ConnectionResetError):
        is_welcome = False
    return None if is_welcome else _of_client_certificate(probe)


def _of_server_certificate(probe: _Probe, error: ssl.SSLCertVerificationError) -> _Finding:
    code = error.verify_code
    if code == _EXPIRED:
        message = f"the certificate of {probe.address}, or one that it hangs on, has expired: renew it on the server"
        return _Finding("CERTIFICATE_EXPIRED", message)
    if code == _NOT_YET_VALID:
        message = f"the certificate of {probe.address} is not valid yet: compare the clocks of the server and this host"
        return _Finding("CERTIFICATE_NOT_YET_VALID", message)
    if code in _OTHER_NAME:
        return _of_name(probe)
    if code in _UNKNOWN_ISSUER:
        ca_file = probe.credentials.sources.ca_file
        trusted = "the system's" if ca_file in (None, SYSTEM_CAS) else f"those in {ca_file}"
        message = (
            f"the certificate of {probe.address} is of no CA that is trusted here, which are {trusted} "
            f"({error.verify_message}): give ca_file the server's CA, or set {CA_FILE_VARIABLE}"
        )
        return _Finding("UNKNOWN_CA", message)
    return _Finding("OTHER", f"the certificate of {probe.address} is refused: {error.verify_message}")


def _of_name(probe: _Probe) -> _Finding:
    names = _names(probe)
    said = f"is for {', '.join(names)}" if names else "names no host"
    message = (
        f"the certificate of {probe.address} {said}, and not for {probe.server_name}: connect by a name that it has, "
        "give server_name if it is the right server by another name, or issue it anew"
    )
    return _Finding("WRONG_NAME", message)


def _names(probe: _Probe) -> list[str]:
    """The names that the server's certificate has, of hosts."""
    context = probe.credentials.context()
    context.check_hostname = False
    with contextlib.suppress(OSError), probe.secured(context) as connection:
        found = (connection.getpeercert() or {}).get("subjectAltName", ())
        names = [repr(str(name[1])) for name in found if name[0] in ("DNS", "IP Address")]
        return names[:_SHOWN_NAME_COUNT]
    return []


def _of_handshake(probe: _Probe, error: ssl.SSLError) -> _Finding | None:
    reason = error.reason or ""
    if reason in _VERSION_REASONS:
        message = f"the server at {probe.address} speaks no TLS that is safe: this side wants TLS 1.2 or 1.3"
        return _Finding("TLS_VERSION", message)
    if "ALERT" in reason:
        return _of_client_certificate(probe, reason)
    has_hung_up = isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError)
    if (reason in _PLAINTEXT_REASONS or has_hung_up) and _speaks_plaintext(probe):
        return _of_plaintext(probe)
    if has_hung_up:
        return None  # it may have been going away
    return _Finding("OTHER", f"no TLS with {probe.address}: {reason.replace('_', ' ').lower() or 'no reason is given'}")


def _of_client_certificate(probe: _Probe, reason: str = "") -> _Finding:
    cert_file = probe.credentials.sources.cert_file
    alert = reason.partition("ALERT_")[2].replace("_", " ").lower()
    said = f" (it says: {alert})" if alert else ""
    if cert_file is None:
        message = (
            f"the server at {probe.address} wants a client certificate{said}: give cert_file and key_file, or set "
            f"{CERT_FILE_VARIABLE} and {KEY_FILE_VARIABLE}"
        )
    else:
        message = (
            f"the server at {probe.address} refuses the certificate in {cert_file}{said}: give one that is valid "
            "now and of a CA that the server trusts (its tls.client_ca_file)"
        )
    return _Finding("CLIENT_CERTIFICATE_REFUSED", message)


def _of_plaintext(probe: _Probe) -> _Finding:
    message = (
        f"the server at {probe.address} speaks no TLS: set tls.cert_file and tls.key_file there, or connect without "
        "ca_file and cert_file if its network is to be trusted"
    )
    return _Finding("SERVER_IS_PLAINTEXT", message)


def _speaks_plaintext(probe: _Probe) -> bool:
    """Whether HTTP/2 is answered without TLS."""
    with contextlib.suppress(OSError), probe.connected() as connection:
        connection.sendall(_PREFACE)
        header = connection.recv(_FRAME_HEADER_BYTES, socket.MSG_WAITALL)
        return len(header) == _FRAME_HEADER_BYTES and header[3] == _SETTINGS
    return False
