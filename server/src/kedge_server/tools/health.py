"""Asks a server whether it serves. Whoever looks after a container asks every few seconds, so this imports little."""

from pathlib import Path
from typing import Any

import grpc
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kedge_server.config import ServerConfig, TlsSection
from kedge_server.security import pem

_HINT = (
    ". It wants to see certificates: its own is shown, which has to be of a CA in tls.client_ca_file, and for clients, "
    "too (extended key usage clientAuth)"
)


class UnhealthyError(Exception):
    """It does not serve; the message says why."""


def require_serving(config: ServerConfig, address: str | None, *, timeout_seconds: float) -> None:
    """Asks the server of a configuration.

    Args:
        config: the server's own.
        address: HOST:PORT; None: where it listens.
        timeout_seconds: how long it has for its answer.

    Raises:
        UnhealthyError: it does not serve.
    """
    address = address or _address(config.server.listen)
    with _channel(config.tls, address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        try:
            answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=timeout_seconds)
        except grpc.RpcError as error:
            hint = _HINT if _is_unavailable(error) and config.tls.client_ca_file is not None else ""
            raise UnhealthyError(_reason(address, error, timeout_seconds) + hint) from None
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        status = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
        raise UnhealthyError(f"the server at {address} answers {status}: it is shutting down")


def _address(listen: str) -> str:
    if int(listen.rpartition(":")[2]) == 0:
        raise UnhealthyError(f"server.listen = {listen!r} picks a port: say with --address which it was")
    return listen  # "everywhere" is an address of this host, too


def _is_unavailable(error: grpc.RpcError) -> bool:
    return bool(error.code() is grpc.StatusCode.UNAVAILABLE)


def _reason(address: str, error: grpc.RpcError, timeout_seconds: float) -> str:
    match error.code():
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return f"the server at {address} did not answer within {timeout_seconds:g} s"
        case grpc.StatusCode.UNAVAILABLE:
            return f"no server answers at {address}: {error.details()}"
        case code:
            return f"what is at {address} is no kedge-server: {code.name} {error.details()}"


def _channel(tls: TlsSection, address: str) -> grpc.Channel:
    options: list[tuple[str, int | str]] = [("grpc.enable_http_proxy", 0)]
    if tls.cert_file is None or tls.key_file is None:
        return grpc.insecure_channel(address, options=options)
    chain, key = _read("cert_file", tls.cert_file), _read("key_file", tls.key_file)
    client_cas = b"" if tls.client_ca_file is None else _read("client_ca_file", tls.client_ca_file)
    try:
        certificate = pem.certificates(chain)[0]
    except ValueError as error:
        raise UnhealthyError(f"tls.cert_file = {str(tls.cert_file)!r}: {error}") from None
    # The CA of the server's own certificate is in no file that a server has to know: the certificate itself is trusted,
    # and where the clients are of the same CA, any of that CA.
    trusted = chain + b"\n" + client_cas
    own = (key, chain) if client_cas and _may_be_clients(certificate) else (None, None)
    options.append(("grpc.ssl_target_name_override", _name(certificate)))
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(trusted, *own), options=options)


def _read(key: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UnhealthyError(f"tls.{key} = {str(path)!r}: it cannot be read: {error.strerror}") from error


def _may_be_clients(certificate: x509.Certificate) -> bool:
    try:
        usages = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except x509.ExtensionNotFound:
        return True
    return ExtendedKeyUsageOID.CLIENT_AUTH in usages


def _name(certificate: x509.Certificate) -> str:
    """A name that the certificate has, by whatever name the server was reached."""
    common = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    names = [*pem.hosts(certificate), *(str(attribute.value) for attribute in common), "localhost"]
    return names[0].replace("*", "any", 1)
