"""Where the SDK's settings come from besides arguments."""

import os

ADDRESS_VARIABLE = "KEDGE_ADDRESS"


def resolve_address(address: str | None) -> str:
    """The address given, else that of the environment.

    Raises:
        ValueError: if there is neither.
    """
    resolved = address or os.environ.get(ADDRESS_VARIABLE, "")
    if not resolved:
        raise ValueError(f'no address: give one, as in kedge.connect("localhost:50051"), or set {ADDRESS_VARIABLE}')
    return resolved
