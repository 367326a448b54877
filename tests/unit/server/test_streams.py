"""Deadlines of uploads, and of those who read: against peers that are a few lines of Python."""

import asyncio
import itertools
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import grpc
import numpy as np
import pytest

from kedge.wire.codec import Chunk
from kedge.wire.errors import KedgeError
from kedge_server.rpc.outlet import Answer, Outlet
from kedge_server.rpc.streams import Patience, Upload, beginning_within

FOREVER = 3600.0
SHORTLY = 0.02


async def nothing() -> AsyncIterator[Any]:
    await asyncio.Event().wait()
    yield None


async def trickle() -> AsyncIterator[Any]:
    for offset in itertools.count(0, 4):
        await asyncio.sleep(0)
        yield Chunk(offset, memoryview(bytes(4)))


async def reads(upload: Upload, element_count: int = 1 << 30) -> KedgeError:
    out = np.broadcast_to(np.float32(0), element_count).view()
    with pytest.raises(KedgeError) as caught:
        await upload.read(out, dtype="float32", size_bytes=4 * element_count)
    return caught.value


async def test_upload_without_a_message_is_refused_after_the_idle_time() -> None:
    error = await reads(Upload(nothing(), Patience(SHORTLY)))
    assert error.reason == "UPLOAD_STALLED"
    assert error.metadata == {"idle_seconds": str(SHORTLY)}


async def test_waiting_for_the_first_chunk_has_the_same_deadline() -> None:
    with pytest.raises(KedgeError) as caught:
        await Upload(nothing(), Patience(SHORTLY)).begin()
    assert caught.value.reason == "UPLOAD_STALLED"


async def test_upload_that_goes_on_for_ever_is_refused_when_its_time_is_up() -> None:
    progress = []
    upload = Upload(trickle(), Patience(FOREVER, lambda: progress.append(1), total_seconds=10 * SHORTLY))
    out = np.zeros(1 << 22, np.float32)
    with pytest.raises(KedgeError) as caught:
        await upload.read(out, dtype="float32", size_bytes=out.nbytes)
    assert caught.value.reason == "UPLOAD_STALLED"
    assert progress, "it did make progress"


async def test_first_message_that_was_waited_for_is_read_first() -> None:
    async def whole() -> AsyncIterator[Any]:
        yield Chunk(0, memoryview(np.float32([1, 2]).tobytes()))
        yield Chunk(8, memoryview(np.float32([3]).tobytes()))

    upload = Upload(whole(), Patience(FOREVER))
    await upload.begin()
    out = np.zeros(3, np.float32)
    with pytest.raises(KedgeError) as caught:
        await upload.read(out, dtype="float32", size_bytes=12)
    assert caught.value.reason == "UNEXPECTED_MESSAGE", "the trailer is missing"
    assert out.tolist() == [1, 2, 3]


async def test_stream_whose_first_message_does_not_come_is_refused() -> None:
    with pytest.raises(KedgeError) as caught:
        await anext(beginning_within(SHORTLY, nothing()))
    assert caught.value.reason == "UPLOAD_STALLED"


async def test_stream_that_has_begun_may_take_its_time_and_an_empty_one_just_ends() -> None:
    async def numbers(count: int) -> AsyncIterator[int]:
        for number in range(count):
            yield number

    assert [number async for number in beginning_within(FOREVER, numbers(3))] == [0, 1, 2]
    assert [number async for number in beginning_within(FOREVER, numbers(0))] == []


class Peer:
    """The context of a call whose peer takes so many messages, and then none."""

    def __init__(self, takes: int) -> None:
        self.taken: list[Answer] = []
        self.is_stuck = asyncio.Event()
        self._takes = takes

    async def send_initial_metadata(self, metadata: tuple[()]) -> None:
        assert not self.taken

    async def write(self, message: Answer) -> None:
        if len(self.taken) == self._takes:
            self.is_stuck.set()
            await asyncio.Event().wait()
        self.taken.append(message)


class Source:
    """A method's answers; tells whether it was closed."""

    is_closed = False

    async def messages(self) -> AsyncGenerator[Answer, None]:
        try:
            for number in range(5):
                yield bytes([number])
        finally:
            self.is_closed = True


async def test_reader_that_takes_everything_gets_everything() -> None:
    peer, source = Peer(takes=10), Source()
    await Outlet(peer, FOREVER).send_all(source.messages())
    assert peer.taken == [bytes([number]) for number in range(5)]


async def test_reader_that_takes_nothing_for_the_idle_time_is_dropped_and_what_it_read_is_closed() -> None:
    peer, source = Peer(takes=2), Source()
    with pytest.raises(KedgeError) as caught:
        await Outlet(peer, SHORTLY).send_all(source.messages())
    assert caught.value.reason == "READER_STALLED"
    assert caught.value.metadata == {"idle_seconds": str(SHORTLY)}
    assert caught.value.__context__ is None, "nothing that it has read is kept by the error"
    assert len(peer.taken) == 2
    assert source.is_closed


async def test_reader_can_be_dropped_at_once_while_a_message_waits_for_it() -> None:
    peer, source = Peer(takes=2), Source()
    outlet = Outlet(peer, FOREVER)
    sending = asyncio.create_task(outlet.send_all(source.messages()))
    await peer.is_stuck.wait()
    outlet.drop()
    with pytest.raises(KedgeError) as caught:
        await sending
    assert caught.value.reason == "READER_STALLED"
    assert "reading_bytes" in caught.value.message
    assert source.is_closed


async def test_method_whose_reader_has_gone_is_cancelled_and_no_defect() -> None:
    class Gone(Peer):
        async def write(self, message: Answer) -> None:
            raise grpc.aio.InternalError

    source = Source()
    with pytest.raises(asyncio.CancelledError):
        await Outlet(Gone(takes=0), FOREVER).send_all(source.messages())
    assert source.is_closed


async def test_reader_that_is_dropped_between_two_messages_gets_no_more() -> None:
    peer = Peer(takes=10)
    outlet = Outlet(peer, FOREVER)

    async def messages() -> AsyncGenerator[Answer, None]:
        yield b"first"
        Outlet.of_this_call().drop()
        yield b"second"

    with pytest.raises(KedgeError) as caught:
        await outlet.send_all(messages())
    assert caught.value.reason == "READER_STALLED"
    assert peer.taken == [b"first"]
