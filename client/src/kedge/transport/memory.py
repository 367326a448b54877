"""Memory that this process lends to a server on the same host, so that no payload has to pass through gRPC.

It belongs to one Exchange: a slot for the gradient, and two for weights. It has no name in any file system, and is
sealed, so that neither side can take it away under the other. What is handed out of it is not written to again before
nobody refers to it any more.

Not for Windows and macOS, which have no such memory; whoever asks is told so.
"""

import mmap
import os
import socket
import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import numpy as np

from kedge.wire.errors import KedgeError
from kedge.wire.manifest import Manifest

HAND_OVER_SECONDS: Final = 5.0
"""How long the server may take to accept the memory."""

_TAKEN = b"\x01"


class Offer(NamedTuple):
    """Where a server takes memory."""

    socket_name: str
    """Of a Unix socket in Linux's abstract namespace, without the leading zero byte."""
    ticket: bytes
    """What to say there."""


class Range(NamedTuple):
    """A part of the memory, in bytes."""

    offset: int
    size_bytes: int


class WeightsSlot:
    """A place for weights. What was taken out of it keeps it in use as long as anything made of it without a copy.

    A process that is forked meanwhile has it, too, and nobody knows for how long: then it is in use for good.
    """

    def __init__(self, pages: mmap.mmap, place: Range) -> None:
        self._pages = pages
        self._is_touched = False
        self._taken: weakref.ref[np.ndarray] | None = None
        self._is_forked = False
        self.place = place
        _slots.add(self)

    @property
    def is_free(self) -> bool:
        """Whether nobody refers to what was taken out of it."""
        return not self._is_forked and (self._taken is None or self._taken() is None)

    def note_fork(self) -> None:
        """Takes note that another process is about to have what this one has."""
        self._is_forked = not self.is_free

    def touch(self) -> None:
        """Lets the system fill its pages in: the account is whose process comes first, and this one's it shall be."""
        if not self._is_touched:
            self._is_touched = True
            np.frombuffer(self._pages, np.uint8, self.place.size_bytes, self.place.offset)[:: mmap.PAGESIZE] = 0

    def take(self) -> np.ndarray:
        """The weights in it, float32, of shape [element_count], writable."""
        # Made of the mapping itself: a view of another array would be its views' base, and outlive this one unnoticed.
        flat = np.frombuffer(self._pages, np.float32, self.place.size_bytes // 4, self.place.offset)
        self._taken = weakref.ref(flat)
        return flat


_slots: weakref.WeakSet[WeightsSlot] = weakref.WeakSet()


def _note_fork() -> None:
    for slot in list(_slots):
        slot.note_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_note_fork)


class LentMemory:
    """The memory of one Exchange. Used from one thread.

    Args:
        manifest: of the run.
        offer: asks the server for its offer. Called once the memory is there.

    Raises:
        KedgeError: SHARED_MEMORY_UNAVAILABLE, or what `offer` raises.
    """

    def __init__(self, manifest: Manifest, offer: Callable[[], Offer]) -> None:
        size_bytes = 4 * manifest.element_count
        stride = -(-size_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        with _reported():
            descriptor = _make(3 * stride)
        try:
            with _reported():
                pages = mmap.mmap(descriptor, 3 * stride)
            self.ticket = _hand_over(descriptor, offer())
        finally:
            os.close(descriptor)
        self._weights = tuple(WeightsSlot(pages, Range(at, size_bytes)) for at in (stride, 2 * stride))
        self.gradient = Range(0, size_bytes)
        self._flat = np.frombuffer(pages, np.float32, manifest.element_count)
        self._tensors = [
            self._flat[spec.offset : spec.offset + spec.size].reshape(spec.shape) for spec in manifest.tensors
        ]

    def put(self, arrays: Sequence[np.ndarray]) -> None:
        """Writes a gradient, given in manifest order, of any of `DTYPES`, into its slot."""
        for tensor, array in zip(self._tensors, arrays, strict=True):
            np.copyto(tensor, array.reshape(tensor.shape), casting="unsafe")

    def room(self) -> Range:
        """Where the next weights may come to: a free slot, or else the gradient's, which is read before."""
        for slot in self._weights:
            if slot.is_free:
                slot.touch()
                return slot.place
        return self.gradient

    def take(self, place: Range) -> np.ndarray:
        """The weights that came to a place, float32, of shape [element_count], shared with nobody."""
        for slot in self._weights:
            if slot.place == place:
                return slot.take()
        return self._flat.copy()


class _reported:  # noqa: N801  a context manager, named as what it does
    """Turns what the system says into an error of the catalogue."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, _type: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, OSError | ValueError):
            raise unavailable(str(error)) from None


def unavailable(cause: str) -> KedgeError:
    """The error for memory that cannot be shared."""
    message = f'no memory can be shared with the server: {cause}; use transport="grpc", or "auto"'
    return KedgeError("SHARED_MEMORY_UNAVAILABLE", message, cause=cause)


def _make(size_bytes: int) -> int:
    """The descriptor of sealed memory."""
    if sys.platform != "linux":
        raise OSError(f"{sys.platform} has no memory without a name")
    import fcntl

    descriptor = os.memfd_create("kedge", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, size_bytes)
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _hand_over(descriptor: int, offer: Offer) -> bytes:
    """Gives the memory to the server; the ticket that it is known under there."""
    with _reported(), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as peer:
        peer.settimeout(HAND_OVER_SECONDS)
        peer.connect(f"\0{offer.socket_name}")
        socket.send_fds(peer, [offer.ticket], [descriptor])
        if peer.recv(1) != _TAKEN:
            raise OSError("the server did not take it: is it another user's?")
    return offer.ticket
