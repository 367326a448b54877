"""Certificates and keys as files hold them. Whatever is wrong with one is a ValueError, which repeats nothing of it."""

from datetime import UTC, datetime
from functools import lru_cache

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.serialization import load_pem_private_key

_WRONG = (
    UnsupportedAlgorithm,
    ValueError,
    x509.DuplicateExtension,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)


def certificates(pem: bytes) -> list[x509.Certificate]:
    """All certificates of a file, each of them whole: gRPC takes none of them where it cannot read one.

    Raises:
        ValueError: there is none, or something else.
    """
    try:
        found = x509.load_pem_x509_certificates(pem)
        for certificate in found:
            certificate.public_key()
            _ = certificate.subject, certificate.issuer, certificate.extensions  # read only now
    except _WRONG:
        raise ValueError("it holds no certificates in PEM, or half of one") from None
    return found


@lru_cache(maxsize=1024)
def ends_at(pem: bytes) -> datetime:
    """Until when one certificate holds. One that cannot be read has ended long ago."""
    try:
        return x509.load_pem_x509_certificate(pem).not_valid_after_utc
    except _WRONG:
        return datetime.min.replace(tzinfo=UTC)


def private_key(pem: bytes) -> PrivateKeyTypes:
    """The private key of a file.

    Raises:
        ValueError: there is none, or it is encrypted.
    """
    try:
        return load_pem_private_key(pem, None)
    except TypeError:
        raise ValueError("it is encrypted: give a key without a password") from None
    except _WRONG:
        raise ValueError("it holds no private key in PEM") from None


def hosts(certificate: x509.Certificate) -> list[str]:
    """The names and addresses that a server's certificate is for."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return [*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress))]
