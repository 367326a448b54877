"""What a person is told of new certificates: what to set on both sides."""

from pathlib import Path

from kedge_server.security.certificates import Made
from kedge_server.security.roles import Role


def lines(made: Made) -> list[str]:
    """The lines to print."""
    ca, worker = _path(made.ca_file), made.clients[Role.WORKER]
    return [
        f"{'made' if made.is_ca_new else 'used again'}: the CA {ca}; whoever has its key can be anybody here",
        f"made: a certificate for a server that is {', '.join(made.hosts)}",
        f"made: certificates for clients that are {', '.join(role.text for role in made.clients)}",
        f"They expire at {made.ends_at.isoformat()}: the same command renews them, and a server takes them up.",
        "",
        "The server's configuration:",
        "",
        "[tls]",
        f'cert_file = "{_path(made.server.cert_file)}"',
        f'key_file = "{_path(made.server.key_file)}"',
        f'client_ca_file = "{ca}"  # leave it out where clients come with tokens',
        "",
        "Its clients, here a worker:",
        "",
        f"export KEDGE_CA_FILE={ca}",
        f"export KEDGE_CERT_FILE={_path(worker.cert_file)}  # leave these out where clients come with tokens",
        f"export KEDGE_KEY_FILE={_path(worker.key_file)}",
    ]


def _path(path: Path) -> str:
    return str(path.absolute())
