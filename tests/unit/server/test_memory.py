"""The desk where workers hand memory over, within one process: what is taken, what is not, and what stays behind."""

import asyncio
import fcntl
import gc
import mmap
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio

from kedge.wire.errors import KedgeError
from kedge_server.rpc import memory
from kedge_server.rpc.memory import MemoryDesk, Offer

SIZE = 4 * mmap.PAGESIZE
SHRINK = fcntl.F_SEAL_SHRINK


def memfd(size: int = SIZE, seals: int = SHRINK) -> int:
    descriptor = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, size)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    return descriptor


def of_file(folder: Path) -> int:
    path = folder / "file"
    path.write_bytes(bytes(SIZE))
    return os.open(path, os.O_RDWR)


def of_pipe(_: Path) -> int:
    reader, writer = os.pipe()
    os.close(writer)
    return reader


def read_only(_: Path) -> int:
    descriptor = memfd()
    try:
        return os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY)
    finally:
        os.close(descriptor)


UNFIT: dict[str, Callable[[Path], int]] = {
    "not sealed": lambda _: memfd(seals=0),
    "sealed against growing alone": lambda _: memfd(seals=fcntl.F_SEAL_GROW),
    "sealed against writing": lambda _: memfd(seals=SHRINK | fcntl.F_SEAL_WRITE),
    "read only": read_only,
    "too small": lambda _: memfd(63),
    "too large": lambda _: memfd(64 << 20),
    "a file": of_file,
    "a file in memory that has a name": lambda _: of_file(Path("/dev/shm")),
    "a pipe": of_pipe,
    "a device": lambda _: os.open("/dev/zero", os.O_RDWR),
    "a socket": lambda _: socket.socket().detach(),
}


@pytest_asyncio.fixture
async def desk() -> AsyncIterator[MemoryDesk]:
    desk = MemoryDesk(is_wanted=True)
    yield desk
    await desk.close()


def say(name: str, words: bytes, *descriptors: int) -> bytes:
    """What the desk answers; nothing if it hangs up."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as peer:
        peer.settimeout(20)
        peer.connect(f"\0{name}")
        try:
            socket.send_fds(peer, [words], list(descriptors)) if descriptors else peer.send(words)
            return peer.recv(10)
        except (BrokenPipeError, ConnectionResetError):
            return b""


async def hand_over(offer: Offer, *descriptors: int) -> bytes:
    return await asyncio.to_thread(say, offer.socket_name, offer.ticket, *descriptors)


def reason(use: Callable[[], object]) -> str:
    with pytest.raises(KedgeError) as error:
        use()
    return error.value.reason


def own_descriptors() -> set[str]:
    """What this process holds of memory, files and sockets."""
    gc.collect()
    links = set()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            links.add(f"{entry.name} {entry.readlink()}")
        except FileNotFoundError:  # the one that lists them
            continue
    return links


async def test_both_sides_see_what_was_handed_over(desk: MemoryDesk) -> None:
    offer = desk.offer(1000)
    descriptor = memfd()
    assert await hand_over(offer, descriptor) == b"\x01"
    mine = mmap.mmap(descriptor, SIZE)
    os.close(descriptor)
    mine[128:136] = np.array([1.5, -2.0], np.float32).tobytes()

    lent = desk.claim(offer.ticket)
    assert lent.floats(128, 8).tolist() == [1.5, -2.0]
    lent.floats(64, 4)[:] = 7.25
    assert np.frombuffer(mine, np.float32, 1, 64) == 7.25


@pytest.mark.parametrize("kind", UNFIT)
async def test_what_could_block_or_go_away_is_not_taken(desk: MemoryDesk, kind: str, tmp_path: Path) -> None:
    offer = desk.offer(1000)
    descriptor = UNFIT[kind](tmp_path)
    try:
        assert await hand_over(offer, descriptor) == b""
    finally:
        os.close(descriptor)
        Path("/dev/shm/file").unlink(missing_ok=True)
    assert reason(lambda: desk.claim(offer.ticket)) == "SHARED_MEMORY_UNAVAILABLE"

    # The ticket is still good for the right thing.
    good = memfd()
    assert await hand_over(offer, good) == b"\x01"
    os.close(good)
    desk.claim(offer.ticket)


async def test_ticket_is_good_for_one_handover_and_one_claim(desk: MemoryDesk) -> None:
    offer, good = desk.offer(1000), memfd()
    assert await asyncio.to_thread(say, offer.socket_name, bytes(16), good) == b""
    assert await asyncio.to_thread(say, offer.socket_name, offer.ticket[:15], good) == b""
    assert await asyncio.to_thread(say, offer.socket_name, offer.ticket + b"x", good) == b""
    assert await hand_over(offer) == b""
    assert reason(lambda: desk.claim(offer.ticket)) == "SHARED_MEMORY_UNAVAILABLE"
    assert await hand_over(offer, good) == b"\x01"
    assert await hand_over(offer, good) == b""
    desk.claim(offer.ticket)
    assert reason(lambda: desk.claim(offer.ticket)) == "SHARED_MEMORY_UNAVAILABLE"
    assert await hand_over(offer, good) == b""
    os.close(good)


async def test_nothing_stays_behind(desk: MemoryDesk) -> None:
    desk.offer(1000)  # now it listens
    before = own_descriptors()
    good, bad = memfd(), memfd(seals=0)
    for descriptor in (good, bad):
        await hand_over(desk.offer(1000), descriptor)
    offer = desk.offer(1000)
    assert await hand_over(offer, good) == b"\x01"
    lent = desk.claim(offer.ticket)
    values = lent.floats(0, 64)
    os.close(good)
    os.close(bad)
    await desk.close()
    del lent
    assert values.tolist() == [0.0] * 16  # it lasts as long as an array of it
    del values
    assert {link.split()[1] for link in own_descriptors() - before} == set()


async def test_what_nobody_claims_goes_after_a_while(desk: MemoryDesk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "CLAIM_SECONDS", 0.3)
    offer, good = desk.offer(1000), memfd()
    assert await hand_over(offer, good) == b"\x01"
    os.close(good)
    async with asyncio.timeout(30):
        while any("memfd:test" in link for link in own_descriptors()):
            await asyncio.sleep(0.02)
    assert reason(lambda: desk.claim(offer.ticket)) == "SHARED_MEMORY_UNAVAILABLE"


async def test_who_says_nothing_is_hung_up_on(desk: MemoryDesk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "CLAIM_SECONDS", 0.1)
    offer = desk.offer(1000)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as silent:
        silent.settimeout(20)
        silent.connect(f"\0{offer.socket_name}")
        assert await asyncio.to_thread(silent.recv, 1) == b""


async def test_of_too_many_offers_the_oldest_ends(desk: MemoryDesk) -> None:
    good = memfd()
    first = desk.offer(1000)
    others = [desk.offer(1000) for _ in range(1024)]
    assert await hand_over(first, good) == b""
    assert await hand_over(others[0], good) == b"\x01"
    os.close(good)


@pytest.mark.parametrize(
    ("offset", "size", "want"),
    [
        (0, SIZE + 4, "CHUNK_OUT_OF_RANGE"),
        (SIZE, 4, "CHUNK_OUT_OF_RANGE"),
        (1 << 63, 4, "CHUNK_OUT_OF_RANGE"),
        (0, (1 << 64) - 4, "CHUNK_OUT_OF_RANGE"),
        (SIZE - 64, 68, "CHUNK_OUT_OF_RANGE"),
        (32, 4, "CHUNK_MISALIGNED"),
        (64, 6, "CHUNK_MISALIGNED"),
        (64, 0, "CHUNK_MISALIGNED"),
    ],
)
async def test_ranges_that_are_none_of_the_memory_are_refused(
    desk: MemoryDesk, offset: int, size: int, want: str
) -> None:
    offer, good = desk.offer(1000), memfd()
    await hand_over(offer, good)
    os.close(good)
    lent = desk.claim(offer.ticket)
    assert reason(lambda: lent.floats(offset, size)) == want
    assert lent.floats(SIZE - 64, 64).shape == (16,)


async def test_server_that_wants_none_says_so() -> None:
    desk = MemoryDesk(is_wanted=False)
    with pytest.raises(KedgeError, match="shared_memory is off") as error:
        desk.offer(1000)
    assert error.value.reason == "SHARED_MEMORY_UNAVAILABLE"


async def test_nobody_listens_once_it_is_closed() -> None:
    desk = MemoryDesk(is_wanted=True)
    offer, good = desk.offer(1000), memfd()
    await desk.close()
    with pytest.raises(ConnectionRefusedError):
        await hand_over(offer, good)
    os.close(good)
    assert reason(lambda: desk.offer(1000)) == "SHARED_MEMORY_UNAVAILABLE"


_OTHER_USER = """
import fcntl, os, socket, sys
os.setuid(65534)
descriptor = os.memfd_create("other", os.MFD_ALLOW_SEALING)
os.ftruncate(descriptor, 16384)
fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as peer:
    peer.connect("\\0" + sys.argv[1])
    try:
        socket.send_fds(peer, [bytes.fromhex(sys.argv[2])], [descriptor])
        print(peer.recv(1))
    except (BrokenPipeError, ConnectionResetError):
        print(b"")
"""


@pytest.mark.root
async def test_other_users_are_hung_up_on_even_with_a_good_ticket(desk: MemoryDesk) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root to become another user")
    offer, good = desk.offer(1000), memfd()
    command = [sys.executable, "-I", "-c", _OTHER_USER, offer.socket_name, offer.ticket.hex()]
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "b''"
    assert await hand_over(offer, good) == b"\x01"  # and the ticket was not used up
    os.close(good)
