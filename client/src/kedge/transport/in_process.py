"""Servers within this process, by address: how `kedge.connect` finds one without knowing what it is."""

import itertools
import threading

from kedge.transport import Transport
from kedge.wire.errors import KedgeError

_SCHEME = "fake://"

_lock = threading.Lock()
_numbers = itertools.count(1)
_transports: dict[str, Transport] = {}


def is_in_process(address: str) -> bool:
    """Whether an address is of this kind."""
    return address.startswith(_SCHEME)


def new_address() -> str:
    """An address that no server of this process has had."""
    return f"{_SCHEME}{next(_numbers)}"


def publish(address: str, transport: Transport) -> None:
    """Makes a server's transport known under its address."""
    with _lock:
        _transports[address] = transport


def withdraw(address: str) -> None:
    """Takes it back. Doing so again changes nothing."""
    with _lock:
        _transports.pop(address, None)


def transport_to(address: str) -> Transport:
    """The transport of the server at an address.

    Raises:
        KedgeError: SERVER_UNAVAILABLE.
    """
    with _lock:
        transport = _transports.get(address)
    if transport is None:
        message = f"no FakeServer has the address {address} in this process: it was closed, or never made"
        raise KedgeError("SERVER_UNAVAILABLE", message, address=address)
    return transport
