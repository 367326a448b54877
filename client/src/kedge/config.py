"""Where the SDK's settings come from besides arguments."""

import os
import re

ADDRESS_VARIABLE = "KEDGE_ADDRESS"
_TARGET = re.compile(r"(dns|ipv4|ipv6|unix|unix-abstract|xds|fake):.+")
_MAX_PORT = 65535


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


def _is_host_and_port(address: str) -> bool:
    host, _, port = address.rpartition(":")
    return bool(host) and "/" not in host and port.isdecimal() and 0 < int(port) <= _MAX_PORT
