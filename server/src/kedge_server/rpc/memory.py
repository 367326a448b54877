"""Memory that workers on the same host lend: how it comes here, and who may use it.

A worker is told a ticket and the name of a socket. There it says the ticket and hands over the descriptor of its own
memory, and the first message of its Exchange says the ticket again. Nothing has a name in a file system, so that
whoever dies, the kernel frees everything. See docs/protocol.md.

Invariants: a mapping never shrinks under a reader, since its memory is sealed against that; only processes of this
server's own user come as far as handing something over.
"""

import asyncio
import contextlib
import fcntl
import mmap
import os
import secrets
import socket
import struct
import sys
from typing import Final, NamedTuple

import numpy as np
import structlog

from kedge.wire.errors import KedgeError

CLAIM_SECONDS: Final = 10.0
"""How long a ticket is good for, and as long again for what was handed over with it."""

ALIGNMENT_BYTES: Final = 64
"""Where ranges begin: at multiples of this."""

_TAKEN = b"\x01"
_TICKET_BYTES = 16
_LEAST_BYTES = 64
_SLOTS = 3
_SLACK_BYTES = 8 << 20
"""For whoever rounds its slots up to huge pages."""
_MOST_OFFERS = 1024
_MOST_PEERS = 64
_REST_SECONDS = 0.5
"""Before more peers are accepted, when there are no descriptors left for them."""
_CREDENTIALS = struct.Struct("3i")

_log = structlog.get_logger("kedge.memory")


class SharedMemory:
    """What a worker lent. Its pages may change at any time: read them once, into memory of one's own.

    Args:
        pages: the mapping. It lasts as long as an array of it does.
    """

    def __init__(self, pages: mmap.mmap) -> None:
        self._pages = pages

    def floats(self, offset: int, size_bytes: int) -> np.ndarray:
        """A range as float32, of shape [size_bytes / 4].

        Raises:
            KedgeError: CHUNK_MISALIGNED or CHUNK_OUT_OF_RANGE.
        """
        if offset % ALIGNMENT_BYTES or size_bytes % 4 or not size_bytes:
            raise KedgeError(
                "CHUNK_MISALIGNED",
                f"a range of {size_bytes} bytes at offset {offset} of the shared memory: let it begin at a multiple of "
                f"{ALIGNMENT_BYTES}, and be a multiple of 4 long, and more than 0",
                offset=offset,
            )
        if offset + size_bytes > len(self._pages):
            raise KedgeError(
                "CHUNK_OUT_OF_RANGE",
                f"a range of {size_bytes} bytes at offset {offset} reaches beyond the {len(self._pages)} bytes of the "
                "shared memory",
                offset=offset,
                size_bytes=len(self._pages),
            )
        return np.frombuffer(self._pages, np.float32, size_bytes // 4, offset)


class Offer(NamedTuple):
    """What a worker is told."""

    socket_name: str
    ticket: bytes


class _Open:
    """An offer that nobody has claimed yet."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.memory: SharedMemory | None = None
        self.expiry: asyncio.TimerHandle | None = None


class MemoryDesk:
    """Where memory is handed over. Belongs to one loop, and begins to listen with the first offer.

    Args:
        is_wanted: whether this server takes any.
    """

    def __init__(self, *, is_wanted: bool) -> None:
        self._is_wanted = is_wanted and sys.platform == "linux"
        self._socket: socket.socket | None = None
        self._name = f"kedge-{secrets.token_hex(16)}"
        self._open: dict[bytes, _Open] = {}  # oldest first
        self._visits: set[asyncio.Task[None]] = set()

    def offer(self, parameter_count: int) -> Offer:
        """Lets somebody hand over memory for a run of so many parameters. Of too many offers the oldest ends.

        Raises:
            KedgeError: SHARED_MEMORY_UNAVAILABLE.
        """
        if not self._is_wanted:
            cause = "server.shared_memory is off" if sys.platform == "linux" else f"it runs on {sys.platform}"
            raise _unavailable(f"the server takes no memory: {cause}", cause)
        if self._socket is None:
            self._listen()
        if len(self._open) >= _MOST_OFFERS:
            self._end(next(iter(self._open)))
        ticket = secrets.token_bytes(_TICKET_BYTES)
        slot_bytes = -(-4 * parameter_count // mmap.PAGESIZE) * mmap.PAGESIZE
        offer = self._open[ticket] = _Open(_SLOTS * slot_bytes + _SLACK_BYTES)
        self._expire_later(ticket, offer)
        return Offer(self._name, ticket)

    def claim(self, ticket: bytes) -> SharedMemory:
        """What was handed over with a ticket; the caller's alone from now on.

        Raises:
            KedgeError: SHARED_MEMORY_UNAVAILABLE.
        """
        offer = self._open.get(ticket)
        if offer is None or offer.memory is None:
            cause = "no memory was handed over" if offer else "the ticket is unknown"
            raise _unavailable(f"{cause}, or it was used already, or too long ago: ask for another offer", cause)
        self._end(ticket)
        return offer.memory

    async def close(self) -> None:
        """Takes nothing more, and lets go of what nobody has claimed. Doing so again changes nothing."""
        self._is_wanted = False
        listener, self._socket = self._socket, None
        if listener is not None:
            asyncio.get_running_loop().remove_reader(listener)
            listener.close()
        visits = list(self._visits)
        for visit in visits:
            visit.cancel()
        await asyncio.gather(*visits, return_exceptions=True)
        for ticket in list(self._open):
            self._end(ticket)

    def _expire_later(self, ticket: bytes, offer: _Open) -> None:
        if offer.expiry is not None:
            offer.expiry.cancel()
        offer.expiry = asyncio.get_running_loop().call_later(CLAIM_SECONDS, self._end, ticket)

    def _end(self, ticket: bytes) -> None:
        offer = self._open.pop(ticket, None)
        if offer is not None and offer.expiry is not None:
            offer.expiry.cancel()

    # The socket

    def _listen(self) -> None:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind(f"\0{self._name}")
            listener.listen()
        except OSError as error:
            listener.close()
            raise _unavailable(f"the server cannot listen for workers: {error}", str(error)) from None
        listener.setblocking(False)
        self._socket = listener
        asyncio.get_running_loop().add_reader(listener, self._accept, listener)

    def _accept(self, listener: socket.socket) -> None:
        try:
            peer, _ = listener.accept()
        except BlockingIOError:
            return
        except OSError as error:  # out of descriptors: whoever waits would wake the loop without end
            _log.warning("no worker can hand memory over for now", cause=str(error))
            loop = asyncio.get_running_loop()
            loop.remove_reader(listener)
            loop.call_later(_REST_SECONDS, self._listen_again, listener)
            return
        if not _is_of_this_user(peer) or len(self._visits) >= _MOST_PEERS:
            peer.close()
            return
        peer.setblocking(False)
        visit = asyncio.get_running_loop().create_task(self._attend(peer))
        self._visits.add(visit)
        visit.add_done_callback(self._visits.discard)

    def _listen_again(self, listener: socket.socket) -> None:
        if listener.fileno() >= 0:
            asyncio.get_running_loop().add_reader(listener, self._accept, listener)

    async def _attend(self, peer: socket.socket) -> None:
        """Takes what a peer hands over, and says so; whoever brings anything else is only hung up on."""
        with peer, contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLAIM_SECONDS):
                await _readable(peer)
            try:
                self._take(peer)
                peer.send(_TAKEN)
            except (OSError, ValueError) as error:
                _log.warning("what a worker handed over was not taken", cause=str(error))

    def _take(self, peer: socket.socket) -> None:
        ticket, descriptors, _, _ = socket.recv_fds(peer, _TICKET_BYTES + 1, 1, socket.MSG_CMSG_CLOEXEC)
        try:
            offer = self._open.get(ticket)
            if offer is None or offer.memory is not None:
                raise ValueError("the ticket is unknown, or was used already")
            if not descriptors:
                raise ValueError("there was no descriptor")
            offer.memory = SharedMemory(_mapped(descriptors[0], offer.limit_bytes))
            self._expire_later(ticket, offer)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)


def _mapped(descriptor: int, limit_bytes: int) -> mmap.mmap:
    """Maps memory that can neither block nor be taken away under the reader.

    Raises:
        OSError: it is not memory, or cannot be written.
        ValueError: it could be made smaller, or is of another size than it should be.
    """
    # Only memory has seals: for a pipe, a device or a file on a disk asking is an error.
    if not fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
        raise ValueError("it is not sealed against shrinking")
    # Huge pages come out of a pool that may be empty when they are touched, which would be a signal and not an error.
    if os.fstatvfs(descriptor).f_bsize != mmap.PAGESIZE:
        raise ValueError("it is not made of ordinary pages")
    size_bytes = os.fstat(descriptor).st_size
    if not _LEAST_BYTES <= size_bytes <= limit_bytes:
        raise ValueError(f"it has {size_bytes} bytes, and may have {_LEAST_BYTES} to {limit_bytes}")
    return mmap.mmap(descriptor, size_bytes)


def _is_of_this_user(peer: socket.socket) -> bool:
    raw = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, user, _ = _CREDENTIALS.unpack(raw)
    return bool(user == os.geteuid())


async def _readable(peer: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    came = asyncio.Event()
    loop.add_reader(peer, came.set)
    try:
        await came.wait()
    finally:
        loop.remove_reader(peer)


def _unavailable(message: str, cause: str) -> KedgeError:
    return KedgeError("SHARED_MEMORY_UNAVAILABLE", message, cause=cause)
