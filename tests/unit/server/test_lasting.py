"""What goes on to its end though whoever asked for it is gone."""

import asyncio

import pytest
from structlog.testing import capture_logs

from kedge.errors import KedgeError
from kedge_server.engine.lasting import lasting

GONE = KedgeError("RUN_NOT_FOUND", "there is none", run="runs/r")


class Work:
    """Waits until it may end, and then fails if it is to."""

    def __init__(self, error: Exception | None = None) -> None:
        self._error = error
        self.may_end = asyncio.Event()
        self.has_ended = False

    async def __call__(self) -> int:
        await self.may_end.wait()
        self.has_ended = True
        if self._error is not None:
            raise self._error
        return 7


async def abandoned(work: Work) -> None:
    caller = asyncio.ensure_future(lasting(work()))
    await asyncio.sleep(0)
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    work.may_end.set()
    while not work.has_ended:
        await asyncio.sleep(0)
    await asyncio.sleep(0)  # for what is called when it is done


async def test_who_waits_gets_what_comes_of_it() -> None:
    good, bad = Work(), Work(GONE)
    good.may_end.set()
    bad.may_end.set()
    assert await lasting(good()) == 7
    with pytest.raises(KedgeError, match="there is none"):
        await lasting(bad())


@pytest.mark.parametrize("error", [None, GONE])
async def test_what_concerns_nobody_is_not_said(error: Exception | None) -> None:
    work, said = Work(error), []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: said.append(context))
    with capture_logs() as logs:
        await abandoned(work)
        del work
    assert (logs, said) == ([], [])


async def test_a_defect_is_said_though_nobody_waits() -> None:
    with capture_logs() as logs:
        await abandoned(Work(ZeroDivisionError("a bug")))
    assert [(entry["event"], entry["error"]) for entry in logs] == [("defect", "ZeroDivisionError")]
