"""A development CA, and certificates of it for a server and for clients of each role."""

import contextlib
import ipaddress
import os
import re
import socket
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, NamedTuple, TypeAlias

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from kedge_server.security import files, pem
from kedge_server.security.roles import Role

LEAF_LIFE: Final = timedelta(days=90)
CA_LIFE: Final = timedelta(days=3650)
_CLOCK_SKEW = timedelta(minutes=5)
"""A certificate begins so long before it is made, for hosts whose clocks are behind."""

_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_DNS_NAME = re.compile(
    r"(\*\.)?([A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?)(\.[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?)*"
)
_MODE, _KEY_MODE = 0o644, 0o600

_Key: TypeAlias = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey


class Made(NamedTuple):
    """What was made."""

    ca_file: Path
    server: "PairFiles"
    clients: dict[Role, "PairFiles"]
    hosts: tuple[str, ...]
    """That the server's certificate is for."""
    ends_at: datetime
    """When the certificates that are not the CA's expire."""
    is_ca_new: bool


class PairFiles(NamedTuple):
    """The files of a certificate."""

    cert_file: Path
    key_file: Path


class _Authority(NamedTuple):
    certificate: x509.Certificate
    key: _Key
    is_new: bool

    def has_signed(self, certificate: x509.Certificate) -> bool:
        """Whether a certificate is one of its own."""
        try:
            certificate.verify_directly_issued_by(self.certificate)
        except (InvalidSignature, TypeError, UnsupportedAlgorithm, ValueError):
            return False
        return True


def make(folder: Path, hosts: Iterable[str] = ()) -> Made:
    """Makes what a server and its clients need for TLS, or renews it.

    A CA that is in the folder is used again; certificates of it are replaced, and nothing else is. Only their owner may
    read the keys.

    Args:
        folder: is made if it is not there.
        hosts: names and addresses of the server, beside those of loopback and this host's name; none: those that its
            certificate has had.

    Raises:
        OSError: a file cannot be read or written.
        ValueError: a host is none, or a file in the folder is in the way.
    """
    given = [_check_host(host) for host in hosts]
    folder.mkdir(parents=True, exist_ok=True)
    with files.alone_in(folder):
        return _make(folder, given)


def _make(folder: Path, given: list[str]) -> Made:
    now = datetime.now(UTC).replace(microsecond=0)
    pairs = {
        name: PairFiles(folder / f"{name}.pem", folder / f"{name}-key.pem") for name in ("server", *_client_names())
    }
    ca_pair = PairFiles(folder / "ca.pem", folder / "ca-key.pem")
    authority = _authority(ca_pair, now)
    known = {name: _own(pair, authority) for name, pair in pairs.items()}
    # So far nothing was written, so that what is in the way leaves nothing half made.
    if authority.is_new:
        _write(ca_pair, authority.certificate, authority.key)
    had = pem.hosts(known["server"]) if known["server"] else []
    all_hosts = tuple(dict.fromkeys([*_LOOPBACK, *_own_name(), *(given or had)]))
    ends_at = min(now + LEAF_LIFE, authority.certificate.not_valid_after_utc)
    for name, pair in pairs.items():
        names = list(map(_host, all_hosts)) if name == "server" else [_uri(name)]
        _issue(pair, authority, name, names, (now, ends_at))
    clients = {role: pairs[role.text] for role in Role}
    return Made(ca_pair.cert_file, pairs["server"], clients, all_hosts, ends_at, authority.is_new)


def _client_names() -> list[str]:
    return [role.text for role in Role]


def _uri(role: str) -> x509.GeneralName:
    return x509.UniformResourceIdentifier(f"kedge://{role}/{role}")


def _authority(pair: PairFiles, now: datetime) -> _Authority:
    if pair.cert_file.exists() or pair.key_file.exists():
        return _existing_authority(pair, now)
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"Kedge development CA {os.urandom(4).hex()}")])
    certificate = (
        _builder(name, name, key, (now, now + CA_LIFE))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(is_ca=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return _Authority(certificate, key, is_new=True)


def _existing_authority(pair: PairFiles, now: datetime) -> _Authority:
    for path in pair:
        if not path.exists():
            raise ValueError(f"{path} is missing beside the other half of a CA: give another folder, or bring it back")
    certificate, key = _load_certificate(pair.cert_file), _load_key(pair.key_file)
    if certificate.public_key() != key.public_key():
        raise ValueError(f"{pair.key_file} is not the key of {pair.cert_file}: give another folder")
    if not _is_ca(certificate):
        raise ValueError(f"{pair.cert_file} is no CA's certificate: give another folder")
    if not certificate.not_valid_before_utc <= now < certificate.not_valid_after_utc:
        raise ValueError(f"{pair.cert_file} is not valid now: move it and {pair.key_file.name} away, for a new CA")
    return _Authority(certificate, key, is_new=False)


def _is_ca(certificate: x509.Certificate) -> bool:
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        return False


def _own(pair: PairFiles, authority: _Authority) -> x509.Certificate | None:
    """The certificate that is to be replaced, if there is one.

    Raises:
        ValueError: what is there is not this CA's.
    """
    if not pair.cert_file.exists():
        if pair.key_file.exists():
            raise ValueError(
                f"{pair.key_file} is in the way, without its certificate: move it away, or give another folder"
            )
        return None
    certificate = _load_certificate(pair.cert_file)
    if not authority.has_signed(certificate):
        raise ValueError(
            f"{pair.cert_file} is of another CA, and is not replaced: move it away, or give another folder"
        )
    return certificate


def _load_certificate(path: Path) -> x509.Certificate:
    try:
        return pem.certificates(path.read_bytes())[0]
    except ValueError:
        raise ValueError(f"{path} is in the way, and no certificate: move it away, or give another folder") from None


def _load_key(path: Path) -> _Key:
    with contextlib.suppress(ValueError):
        key = pem.private_key(path.read_bytes())
        if isinstance(key, _Key):
            return key
    raise ValueError(f"{path} is no key that could be used here, of RSA or ECDSA: give another folder")


def _issue(
    pair: PairFiles,
    authority: _Authority,
    name: str,
    names: list[x509.GeneralName],
    valid: tuple[datetime, datetime],
) -> None:
    """Issues a certificate for a server, or a client. The server's may be a client's as well, for health checks."""
    key = ec.generate_private_key(ec.SECP256R1())
    usages = [ExtendedKeyUsageOID.CLIENT_AUTH]
    if name == "server":
        usages.append(ExtendedKeyUsageOID.SERVER_AUTH)
    issuer = authority.certificate
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"kedge {name}")])
    certificate = (
        _builder(subject, issuer.subject, key, valid)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(is_ca=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(_issuer_identifier(issuer), critical=False)
        .sign(authority.key, hashes.SHA256())
    )
    _write(pair, certificate, key)


def _issuer_identifier(issuer: x509.Certificate) -> x509.AuthorityKeyIdentifier:
    try:
        identifier = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    except x509.ExtensionNotFound:
        return x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.public_key())  # type: ignore[arg-type]
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, valid: tuple[datetime, datetime]
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(valid[0] - _CLOCK_SKEW)
        .not_valid_after(valid[1])
    )


def _key_usage(*, is_ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not is_ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=is_ca,
        crl_sign=is_ca,
        encipher_only=False,
        decipher_only=False,
    )


def _write(pair: PairFiles, certificate: x509.Certificate, key: _Key) -> None:
    """The certificate comes first: without its key it is replaced the next time, a key alone would be in the way."""
    files.replace(pair.cert_file, certificate.public_bytes(Encoding.PEM), mode=_MODE)
    secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    files.replace(pair.key_file, secret, mode=_KEY_MODE)


def _check_host(host: str) -> str:
    _host(host)
    return host


def _host(host: str) -> x509.GeneralName:
    with contextlib.suppress(ValueError):
        return x509.IPAddress(ipaddress.ip_address(host))
    if not _DNS_NAME.fullmatch(host):
        raise ValueError(f"{host!r} is no host: give a name, as kedge.example.org, or an IP address, without a port")
    return x509.DNSName(host)


def _own_name() -> list[str]:
    name = socket.gethostname()
    return [name] if _DNS_NAME.fullmatch(name) else []
