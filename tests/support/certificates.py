"""CAs and certificates for tests, good and bad, made with `cryptography` alone."""

import datetime
import ipaddress
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

LOOPBACK = ("localhost", "127.0.0.1", "::1")

VALID = (-1, 30)
EXPIRED = (-30, -1)
NOT_YET_VALID = (1, 30)
"""From and until when, in days from now."""


class Issued(NamedTuple):
    """The files of a certificate."""

    cert_file: Path
    key_file: Path

    @property
    def cert(self) -> bytes:
        """PEM."""
        return self.cert_file.read_bytes()

    @property
    def key(self) -> bytes:
        """PEM."""
        return self.key_file.read_bytes()

    def replace(self, other: "Issued") -> None:
        """Takes over another one's content: one file after the other, as a careless administrator does it."""
        self.key_file.write_bytes(other.key)
        self.cert_file.write_bytes(other.cert)


class Authority:
    """A CA, whose certificate lies in FOLDER/NAME.pem.

    Args:
        folder: where its certificate, and those that it issues, are written. It is there.
        name: of the file, and of the subject.
    """

    def __init__(self, folder: Path, name: str = "ca") -> None:
        self.folder = folder
        self.ca_file = folder / f"{name}.pem"
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        certificate = (
            _builder(self._name, self._name, self._key, VALID)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_key_usage(signs=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(self._key.public_key()), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        self.ca_file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))

    @property
    def ca(self) -> bytes:
        """Its certificate, PEM."""
        return self.ca_file.read_bytes()

    def issue(
        self,
        name: str,
        *,
        hosts: Sequence[str] = LOOPBACK,
        uris: Sequence[str] = (),
        days: tuple[float, float] = VALID,
        may_be_clients: bool = True,
        is_ca: bool = False,
        key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | None = None,
    ) -> Issued:
        """Issues a certificate, into NAME.pem and NAME-key.pem. It may be a server's.

        Args:
            name: of the files, and of the subject. Files of that name are replaced.
            hosts: DNS names and IP addresses among its subject's alternative names.
            uris: URIs among them, as `kedge://ID/ROLE`.
            days: VALID, EXPIRED, NOT_YET_VALID, or other days from now.
            may_be_clients: whether it may be a client's as well.
            is_ca: whether it says that it may issue others.
            key: its private key; None: a new one.
        """
        key = key or ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        usages = [ExtendedKeyUsageOID.SERVER_AUTH] + [ExtendedKeyUsageOID.CLIENT_AUTH] * may_be_clients
        authority_identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        builder = (
            _builder(subject, self._name, key, days)
            .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
            .add_extension(_key_usage(signs=is_ca), critical=True)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
            .add_extension(authority_identifier, critical=False)
        )
        names = [*map(_host, hosts), *map(x509.UniformResourceIdentifier, uris)]
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        certificate = builder.sign(self._key, hashes.SHA256())
        issued = Issued(self.folder / f"{name}.pem", self.folder / f"{name}-key.pem")
        issued.cert_file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        issued.key_file.touch(mode=0o600)
        issued.key_file.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return issued


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey,
    days: tuple[float, float],
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + datetime.timedelta(days=days[0]))
        .not_valid_after(now + datetime.timedelta(days=days[1]))
    )


def _key_usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs,
        crl_sign=signs,
        encipher_only=False,
        decipher_only=False,
    )


def _host(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)
