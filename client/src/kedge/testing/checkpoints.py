"""How the fake server, which has no data directory, refuses to keep anything on disk."""

from typing import NoReturn

from kedge.testing.run import FakeRun
from kedge.transport import NewRun
from kedge.wire.errors import KedgeError


def check_durability(new: NewRun) -> None:
    """Refuses a run that is to be kept on disk.

    Raises:
        KedgeError: DURABILITY_UNAVAILABLE.
    """
    if new.durability not in (None, "memory"):
        message = (
            f"durability is {new.durability}, and this server has no data directory: start it with --data-dir, "
            "or choose memory"
        )
        raise KedgeError("DURABILITY_UNAVAILABLE", message, durability=new.durability)


def refuse(run: FakeRun) -> NoReturn:
    """Refuses what needs checkpoints.

    Raises:
        KedgeError: DURABILITY_UNAVAILABLE.
    """
    message = f"{run.name} is kept in memory, and has no checkpoints: create it on a server with a data directory"
    raise KedgeError("DURABILITY_UNAVAILABLE", message, durability="memory")
