"""The client that knows only the .proto files, over TLS, and a server for it."""

from pathlib import Path

import grpc
from certificates import Authority, Issued
from server_process import ServerProcess
from wire_client import WireClient


class SecureWireClient(WireClient):
    """Like its base, with certificates.

    Args:
        address: the server's.
        trusted: whose CA it trusts.
        pair: its own certificate; None: it has none.
        token: goes along with each call; None: there is none.
        server_name: that the server's certificate must have; None: that of the address.
    """

    def __init__(
        self,
        address: str,
        trusted: Authority,
        pair: Issued | None = None,
        *,
        token: str | None = None,
        server_name: str | None = None,
    ) -> None:
        super().__init__(address)
        self.channel.close()
        own = (None, None) if pair is None else (pair.key, pair.cert)
        credentials = grpc.ssl_channel_credentials(trusted.ca, *own)
        if token is not None:
            credentials = grpc.composite_channel_credentials(credentials, grpc.access_token_call_credentials(token))
        options = [("grpc.use_local_subchannel_pool", 1)]
        if server_name is not None:
            options.append(("grpc.ssl_target_name_override", server_name))
        self.channel = grpc.secure_channel(address, credentials, options=options)


def secure_server(
    pair: Issued,
    client_cas: Path | None = None,
    *arguments: str,
    tokens_file: Path | None = None,
    others: dict[str, str] | None = None,
    **tls: float,
) -> ServerProcess:
    """A server with this certificate.

    Args:
        pair: the certificate.
        client_cas: the file of CAs whose certificates clients have to show; None: they show none.
        arguments: more of the command.
        tokens_file: if it asks for tokens.
        others: variables of other settings.
        tls: more keys of that section.
    """
    environment = {"KEDGE_TLS__CERT_FILE": str(pair.cert_file), "KEDGE_TLS__KEY_FILE": str(pair.key_file)}
    environment |= others or {}
    environment |= {f"KEDGE_TLS__{key.upper()}": str(value) for key, value in tls.items()}
    if client_cas is not None:
        environment["KEDGE_TLS__CLIENT_CA_FILE"] = str(client_cas)
    if tokens_file is not None:
        environment["KEDGE_ACCESS__TOKENS_FILE"] = str(tokens_file)
    return ServerProcess(*arguments, environment=environment)
