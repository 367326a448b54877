"""Memory that is freed and soon needed again: glibc is told to keep some, instead of giving it back to the system.

A message of a megabyte is freed a moment before the next one is needed. By itself, glibc gives such memory back to the
system each time, and the system has to fill it with zeros each time: half of all time that a stream of messages takes.
Sizes up to 32 MiB are kept; larger ones always go back at once.

This is a setting of the whole process, and so a modest one: it is made once, only under glibc, and not where the user
has made any of his own.
"""

import contextlib
import ctypes
import os
import sys
from collections.abc import Callable, Iterator, Mapping

KEPT_BYTES = 64 << 20
"""What each of glibc's arenas may keep at its end. Measured on streams of 1 MiB messages: more brings nothing."""

_LARGE_BYTES = 32 << 20  # the most that glibc takes, and where it arrives by itself once such sizes are used
_LARGE_BYTES_APART = 2 << 20

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # malloc.h

_OFF = frozenset({"0", "false", "no", "off"})

_Mallopt = Callable[[int, int], int]

_made_with: _Mallopt | None = None


def keep_freed_memory(*, arena_count: int | None = None, environment: Mapping[str, str] = os.environ) -> bool:
    """Tells glibc to keep memory that is freed, up to a bound; once for each process.

    Does nothing where `KEDGE_KEEP_MEMORY` is 0, or where `MALLOC_*` or `GLIBC_TUNABLES` set anything of malloc's.

    Args:
        arena_count: how many arenas there may be from now on, for a process that is ours alone: what each keeps adds
            up. None leaves that to glibc.
        environment: of the process.

    Returns:
        Whether the setting is made, by this call or an earlier one.
    """
    global _made_with  # noqa: PLW0603  one setting of one process
    if _made_with is not None:
        return True
    mallopt = _mallopt() if _is_wanted(environment) else None
    # Both or neither: setting one ends what glibc does by itself about the other.
    if mallopt is None or not mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES):
        return False
    mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES)
    if arena_count is not None:
        mallopt(_M_ARENA_MAX, arena_count)
    _made_with = mallopt
    return True


@contextlib.contextmanager
def set_apart() -> Iterator[None]:
    """What is allocated within and is larger than 2 MiB gets memory of its own from the system, and goes back there.

    For what stays: among memory that comes and goes it leaves gaps, which glibc before 2.38 does not fill with aligned
    blocks even of the same size. What fits into memory that is kept already is taken from there all the same. Only one
    thread at a time may be within; what others allocate meanwhile is no more than slower. Does nothing unless
    `keep_freed_memory` has made its setting.
    """
    mallopt = _made_with
    if mallopt is None:
        yield
        return
    mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES_APART)
    try:
        yield
    finally:
        mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)


def _is_wanted(environment: Mapping[str, str]) -> bool:
    """Whether the environment leaves the setting to us."""
    if environment.get("KEDGE_KEEP_MEMORY", "").strip().lower() in _OFF:
        return False
    has_own = any(name.startswith("MALLOC_") for name in environment)
    return not has_own and "glibc.malloc." not in environment.get("GLIBC_TUNABLES", "")


def _mallopt() -> _Mallopt | None:
    """The function that sets it; None where the C library is not glibc."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    is_glibc = hasattr(libc, "gnu_get_libc_version") and hasattr(libc, "mallopt")
    return libc.mallopt if is_glibc else None
