"""Where the SDK's settings come from besides arguments: an address, and what is shown to the server there."""

import ipaddress
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple

ADDRESS_VARIABLE = "KEDGE_ADDRESS"
TOKEN_FILE_VARIABLE = "KEDGE_TOKEN_FILE"
CA_FILE_VARIABLE = "KEDGE_CA_FILE"
CERT_FILE_VARIABLE = "KEDGE_CERT_FILE"
KEY_FILE_VARIABLE = "KEDGE_KEY_FILE"
SERVER_NAME_VARIABLE = "KEDGE_SERVER_NAME"

SYSTEM_CAS: Final = "system"
"""What is given for `ca_file` to trust the CAs that the operating system trusts."""

FilePath = str | os.PathLike[str]

_TARGET = re.compile(r"(dns|ipv4|ipv6|unix|unix-abstract|xds|fake):.+")
_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]+=*")  # as RFC 6750 has it
_MAX_PORT = 65535
_DEFAULT_PORT = 443  # gRPC's, of a target with a scheme


@dataclass(frozen=True, kw_only=True)
class CredentialSources:
    """Where credentials are, as they were given. What a file holds is read elsewhere.

    Attributes:
        token: a bearer token itself.
        token_file: a file that holds one.
        ca_file: the CAs that a server's certificate is checked against, or `SYSTEM_CAS`.
        cert_file: this side's certificate, and those that link it to its CA.
        key_file: its private key.
        server_name: the name that the server's certificate must have; None: that of the address.
    """

    token: str | None = field(default=None, repr=False)
    token_file: Path | None = None
    ca_file: Path | str | None = None
    cert_file: Path | None = None
    key_file: Path | None = None
    server_name: str | None = None

    @property
    def is_secure(self) -> bool:
        """Whether the connection is to be encrypted."""
        return self.ca_file is not None or self.cert_file is not None

    @property
    def has_token(self) -> bool:
        """Whether a token goes along."""
        return self.token is not None or self.token_file is not None


def resolve_address(address: str | None) -> str:
    """The address given, else that of the environment.

    Raises:
        ValueError: if there is neither, or it is not HOST:PORT nor a target of gRPC's with a scheme.
    """
    resolved = address or os.environ.get(ADDRESS_VARIABLE, "")
    if not resolved:
        raise ValueError(f'no address: give one, as in kedge.connect("localhost:50051"), or set {ADDRESS_VARIABLE}')
    if not _TARGET.fullmatch(resolved) and not _is_host_and_port(resolved):
        raise ValueError(f"address is {resolved!r}: write HOST:PORT, as in localhost:50051")
    return resolved


def resolve_credentials(
    *,
    token: str | None = None,
    token_file: FilePath | None = None,
    ca_file: FilePath | None = None,
    cert_file: FilePath | None = None,
    key_file: FilePath | None = None,
    server_name: str | None = None,
) -> CredentialSources:
    """What is given, and from the environment what is not.

    A token stands for a token file, and a certificate with its key is one thing: where one of these is given, the
    environment's other one does not count.

    Raises:
        ValueError: for what contradicts itself or is not whole; the message says what to do, and holds no token.
    """
    given = {"token": token, "token_file": token_file, "ca_file": ca_file, "cert_file": cert_file, "key_file": key_file}
    given["server_name"] = server_name
    for name, value in given.items():
        if value is not None and not os.fspath(value):
            raise ValueError(f"{name} is empty: leave it out, or give one")
    if token is not None and token_file is not None:
        raise ValueError("token and token_file are two ways to say one thing: give one of them")
    if token is None:
        token_file = token_file or os.environ.get(TOKEN_FILE_VARIABLE)
    if cert_file is None and key_file is None:
        cert_file, key_file = os.environ.get(CERT_FILE_VARIABLE), os.environ.get(KEY_FILE_VARIABLE)
    sources = CredentialSources(
        token=None if token is None else check_token(token, "token"),
        token_file=_path(token_file),
        ca_file=_ca(ca_file or os.environ.get(CA_FILE_VARIABLE)),
        cert_file=_path(cert_file),
        key_file=_path(key_file),
        server_name=server_name or os.environ.get(SERVER_NAME_VARIABLE) or None,
    )
    _check_whole(sources)
    return sources


def check_token(token: str, source: str) -> str:
    """The token, if it can be one.

    Raises:
        ValueError: it cannot. The message names the source and holds no part of the token.
    """
    if not _TOKEN.fullmatch(token):
        raise ValueError(f"{source} holds no token: it is one word of letters, digits and -._~+/ as it was handed out")
    return token


def check_token_stays_secret(address: str, sources: CredentialSources) -> None:
    """Lets a token go to this address.

    Raises:
        ValueError: it would go over a network unencrypted.
    """
    if sources.has_token and not sources.is_secure and not is_on_this_host(address):
        raise ValueError(
            f"a token would go to {address} unencrypted: give ca_file, the CA of the server's certificate "
            f"({SYSTEM_CAS!r} for those that this system trusts), so that the connection is TLS"
        )


class Place(NamedTuple):
    """Where something listens."""

    host: str
    """A name or an IP address; "" for a socket of the file system."""
    port: int
    path: str = ""
    """Of a socket of the file system; one that begins with NUL has a name of its own there."""


def places(address: str) -> list[Place]:
    """Where an address leads, before names are resolved; empty for one that only gRPC understands."""
    scheme, _, rest = address.partition(":") if _TARGET.fullmatch(address) else ("dns", "", address)
    if scheme == "unix":
        return [Place("", 0, rest.removeprefix("//"))]
    if scheme == "unix-abstract":
        return [Place("", 0, "\0" + rest)]
    if scheme == "dns":
        authority, _, host = rest.removeprefix("//").partition("/") if rest.startswith("//") else ("", "", rest)
        return [] if authority else [_place(host)]
    return [_place(host) for host in rest.split(",")] if scheme in ("ipv4", "ipv6") else []


def is_on_this_host(address: str) -> bool:
    """Whether nothing that goes to an address leaves this host."""
    found = places(address)
    return bool(found) and all(place.path or _is_loopback(place.host) for place in found)


def _is_host_and_port(address: str) -> bool:
    host, _, port = address.rpartition(":")
    return bool(host) and "/" not in host and port.isdecimal() and 0 < int(port) <= _MAX_PORT


def _place(text: str) -> Place:
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdecimal():
        host, port = text, str(_DEFAULT_PORT)
    return Place(host.removeprefix("[").removesuffix("]"), int(port))


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower().rstrip(".") == "localhost"


def _check_whole(sources: CredentialSources) -> None:
    if sources.cert_file is not None and sources.key_file is None:
        raise ValueError(
            f"cert_file needs key_file, the certificate's private key: give it, or set {KEY_FILE_VARIABLE}"
        )
    if sources.key_file is not None and sources.cert_file is None:
        raise ValueError(f"key_file needs cert_file, the key's certificate: give it, or set {CERT_FILE_VARIABLE}")
    if sources.server_name is not None and not sources.is_secure:
        raise ValueError(
            f"server_name is for TLS: give ca_file too, or {SYSTEM_CAS!r} for it, or set {CA_FILE_VARIABLE}"
        )


def _path(given: FilePath | None) -> Path | None:
    return Path(given) if given else None


def _ca(given: FilePath | None) -> Path | str | None:
    return SYSTEM_CAS if given == SYSTEM_CAS else _path(given)
