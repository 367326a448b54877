"""What the commands share: their options, the connection, and finding a run."""

from typing import Annotated

import typer

from kedge.client import Client, connect
from kedge.config import ADDRESS_VARIABLE
from kedge.errors import KedgeError

DEFAULT_ADDRESS = "localhost:50051"
DEFAULT_TIMEOUT_SECONDS = 10.0

RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="digits or runs/digits.", show_default=False)]
AddressOption = Annotated[
    str, typer.Option("--address", envvar=ADDRESS_VARIABLE, metavar="HOST:PORT", help="Where the server listens.")
]
TimeoutOption = Annotated[
    float, typer.Option("--timeout-seconds", min=0.1, max=86_400, help="How long to go on trying to reach the server.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


class CommandError(Exception):
    """What goes wrong on this side; the message is for people."""


def open_client(address: str, timeout_seconds: float, *, retry_seconds: float | None = None) -> Client:
    """A client that tries for `timeout_seconds` to connect, and as long in each call unless told otherwise.

    Raises:
        CommandError: for what is no address.
        KedgeError: SERVER_UNAVAILABLE.
    """
    retry_seconds = timeout_seconds if retry_seconds is None else retry_seconds
    try:
        return connect(address or DEFAULT_ADDRESS, timeout_seconds=timeout_seconds, retry_seconds=retry_seconds)
    except KedgeError:
        raise  # some are ValueErrors too
    except ValueError as error:
        raise CommandError(str(error)) from error
