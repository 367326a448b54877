"""The memory that a worker lends, with a test in the server's place."""

import fcntl
import gc
import mmap
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from kedge.transport.memory import LentMemory, Offer
from kedge.wire.errors import KedgeError
from kedge.wire.manifest import Manifest

TICKET = bytes(range(16))
MANIFEST = Manifest.from_specs([("a", (3, 5), "float32"), ("b", (), "bfloat16"), ("c", (4,), "float16")])
NAME = f"kedge-test-{os.getpid()}"


class Taker:
    """Takes memory as a server does.

    Attributes:
        pages: what was handed over.
        words: what was said with it.
    """

    def __init__(self, answer: bytes = b"\x01") -> None:
        self._answer = answer
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(f"\0{NAME}")
        self._listener.listen()
        self._thread = threading.Thread(target=self._take)
        self._thread.start()

    def offer(self) -> Offer:
        return Offer(NAME, TICKET)

    def _take(self) -> None:
        peer, _ = self._listener.accept()
        with peer:
            self.words, (descriptor,), _, _ = socket.recv_fds(peer, 100, 1)
            self.seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
            size = os.fstat(descriptor).st_size
            with pytest.raises(OSError, match="not permitted"):
                os.ftruncate(descriptor, size - mmap.PAGESIZE)
            self.pages = mmap.mmap(descriptor, size)
            os.close(descriptor)
            peer.send(self._answer)

    def floats(self, place: tuple[int, int]) -> np.ndarray:
        return np.frombuffer(self.pages, np.float32, place[1] // 4, place[0])

    def end(self) -> None:
        self._thread.join(30)
        self._listener.close()


@pytest.fixture
def taker() -> Iterator[Taker]:
    taker = Taker()
    yield taker
    taker.end()


@pytest.fixture
def lent(taker: Taker) -> LentMemory:
    return LentMemory(MANIFEST, taker.offer)


def test_memory_is_sealed_and_holds_a_gradient_and_two_weights(lent: LentMemory, taker: Taker) -> None:
    assert taker.words == lent.ticket == TICKET
    assert taker.seals & fcntl.F_SEAL_SHRINK
    assert taker.seals & fcntl.F_SEAL_GROW
    places = [lent.gradient, *(slot.place for slot in lent._weights)]
    assert [place.size_bytes for place in places] == [80, 80, 80]
    assert all(place.offset % mmap.PAGESIZE == 0 for place in places)
    assert len(taker.pages) >= max(place.offset for place in places) + 80


def test_gradient_is_written_in_float32_whatever_its_leaves_are(lent: LentMemory, taker: Taker) -> None:
    a = np.arange(15, dtype=np.float32).reshape(5, 3).T  # not contiguous
    b = np.array(1.5, ml_dtypes.bfloat16)
    c = np.array([1, 2, 65504, -0.5], np.float16)
    lent.put([a, b, c])
    want = [0, 3, 6, 9, 12, 1, 4, 7, 10, 13, 2, 5, 8, 11, 14, 1.5, 1, 2, 65504, -0.5]
    assert taker.floats(lent.gradient).tolist() == want


def test_gradient_of_another_size_is_refused_and_never_stretched(lent: LentMemory) -> None:
    good = [np.zeros((3, 5), np.float32), np.zeros((), np.float32), np.zeros(4, np.float32)]
    with pytest.raises(ValueError, match="reshape"):
        lent.put([*good[:2], np.zeros(1, np.float32)])
    with pytest.raises(ValueError, match="zip"):
        lent.put(good[:2])


KEEPERS: dict[str, Callable[[np.ndarray], object]] = {
    "itself": lambda flat: flat,
    "a view": lambda flat: flat[3:5],
    "a view of a view": lambda flat: flat[:16].reshape(4, 4).T[1:],
    "a memoryview": lambda flat: memoryview(flat[1:]),
    "an array of a memoryview": lambda flat: np.frombuffer(memoryview(flat), np.uint8),
    "a tuple of rows": lambda flat: tuple(flat.reshape(4, 5)),
}


@pytest.mark.parametrize("kind", KEEPERS)
def test_weights_stay_as_long_as_anything_is_made_of_them(lent: LentMemory, taker: Taker, kind: str) -> None:
    first = lent.room()
    taker.floats(first)[:] = 1.0
    kept = KEEPERS[kind](lent.take(first))
    for step in range(2, 12):
        room = lent.room()
        assert room.offset != first.offset
        taker.floats(room)[:] = step
        weights = lent.take(room)
        assert weights.tolist() == [float(step)] * 20
        del weights
    assert (taker.floats(first) == 1.0).all()
    del kept
    gc.collect()
    assert lent.room() == first


def test_with_all_slots_in_use_weights_are_copied_out_of_the_gradients(lent: LentMemory, taker: Taker) -> None:
    held = []
    for step in range(6):
        room = lent.room()
        assert (room == lent.gradient) == (step >= 2)
        taker.floats(room)[:] = step
        held.append(lent.take(room))
    lent.put([np.full((3, 5), -1.0, np.float32), np.array(-1.0, np.float32), np.full(4, -1.0, np.float32)])
    assert [set(weights.tolist()) for weights in held] == [{0.0}, {1.0}, {2.0}, {3.0}, {4.0}, {5.0}]
    assert all(weights.flags.writeable for weights in held)


def test_weights_outlive_the_memory_they_came_in(lent: LentMemory, taker: Taker) -> None:
    room = lent.room()
    taker.floats(room)[:] = 3.0
    weights = lent.take(room)
    del lent
    gc.collect()
    assert weights.tolist() == [3.0] * 20


def own_memory() -> int:
    gc.collect()
    return Path("/proc/self/maps").read_text().count("memfd:kedge")


def test_memory_is_gone_with_whoever_used_it() -> None:
    taker = Taker()
    before, descriptors = own_memory(), len(list(Path("/proc/self/fd").iterdir()))
    memory = LentMemory(MANIFEST, taker.offer)
    taker.end()
    assert own_memory() > before
    del memory, taker
    assert own_memory() == before
    assert len(list(Path("/proc/self/fd").iterdir())) < descriptors  # less, since the listener is closed


def refused(offer: Callable[[], Offer]) -> str:
    with pytest.raises(KedgeError) as error:
        LentMemory(MANIFEST, offer)
    assert error.value.reason == "SHARED_MEMORY_UNAVAILABLE"
    return error.value.metadata["cause"]


def test_server_that_hangs_up_is_an_error_with_its_cause() -> None:
    taker = Taker(answer=b"")
    try:
        assert "did not take it" in refused(taker.offer)
    finally:
        taker.end()


def test_server_that_is_elsewhere_is_an_error_with_its_cause_and_leaves_nothing() -> None:
    before = own_memory()
    assert "refused" in refused(lambda: Offer("kedge-there-is-none", TICKET))
    assert own_memory() == before


def test_systems_without_such_memory_are_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert "darwin" in refused(lambda: Offer(NAME, TICKET))


FORKS = """
import os, socket, threading
from kedge.transport.memory import LentMemory, Offer
from kedge.wire.manifest import Manifest

name = f"kedge-test-fork-{os.getpid()}"
listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
listener.bind("\\0" + name)
listener.listen()

def take():
    peer, _ = listener.accept()
    _, descriptors, _, _ = socket.recv_fds(peer, 100, 1)
    os.close(descriptors[0])
    peer.send(bytes([1]))
    peer.close()

taking = threading.Thread(target=take)
taking.start()
memory = LentMemory(Manifest.from_specs([("w", (4,), "float32")]), lambda: Offer(name, bytes(16)))
taking.join()
place = memory.room()
held = memory.take(place)
if not (child := os.fork()):
    os._exit(0)  # what matters is that it could have kept the weights
os.waitpid(child, 0)
del held
assert place != memory.room(), "its weights would change under the child"
assert memory.room() != memory.gradient, "the other place was in nobody's hands"
"""


def test_weights_that_a_forked_process_has_are_never_written_to() -> None:
    # In a process of its own: one with JAX in it must not fork.
    done = subprocess.run([sys.executable, "-c", FORKS], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
