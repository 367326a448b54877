"""Closed forms against a live server: what `kedge verify` runs.

It is a client like any other: it creates runs of its own, trains them through the SDK, and compares what comes back
with what a formula, a published trajectory or a sum on paper says. Nothing here computes an update.

docs/verification.md says of each check what it shows, where the expected value is from, and why its tolerance is what
it is.
"""

from collections.abc import Generator

from kedge.client import Client
from kedge.verify import adabelief, lookahead, noise, rounds
from kedge.verify.bench import Bench, Row

__all__ = ["Row", "verify"]

_CHECKS = (
    adabelief.first_step,
    adabelief.constant_gradient,
    adabelief.beale,
    lookahead.by_hand,
    lookahead.parting_and_meeting,
    lookahead.equivalences,
    noise.noisy_quadratic,
    noise.mean_of_workers,
    rounds.weighted_mean,
    rounds.repeated_push,
)


def verify(client: Client, *, full: bool = False) -> Generator[Row]:
    """Compares a server with closed forms; blocks from row to row.

    The runs that it creates are named `verify-...`. Each is deleted when its check is over, also when that fails, or
    when the iterator is closed.

    Args:
        client: of the server to be verified.
        full: longer trajectories too.

    Yields:
        A row for each comparison, as soon as it is made.

    Raises:
        KedgeError: what the server answers to a call, TOO_MANY_RUNS or SERVER_UNAVAILABLE for instance.

    Example:
        >>> all(row.passes for row in verify(kedge.connect("localhost:50051")))
        True
    """
    bench = Bench(client, full=full)
    for check in _CHECKS:
        yield from check(bench)
