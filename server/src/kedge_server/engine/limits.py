"""What bounds a server."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What bounds the server, whatever its peers send."""

    staging_bytes: int
    runs: int
    workers_per_run: int
    contributions_per_run: int
    """Contributions of a run that are taken and not applied yet."""
    events_per_run: int
    """Events of a run that are kept for those who watch it."""
    parameters_per_run: int
    streams: int
    """Streams open at once, of all runs and connections."""
    upload_idle_seconds: float
    """How long an upload may make no progress."""
    upload_min_bytes_per_second: int
    """How slow an upload may be on the whole."""
    read_idle_seconds: float
    """How long a message may wait for its reader."""
    reading_bytes: int
    """Weights that newer ones have superseded, but that someone reads still."""
    lease_seconds: float
    """The lease of a worker that asks for none."""
    min_lease_seconds: float
    max_lease_seconds: float
