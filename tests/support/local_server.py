"""A real server on a loop in a thread of the test's process: what `kedge-server serve` runs, open to be looked into.

What can only be seen inside it is here: all that a run holds, its moments and the held contributions included.
"""

import asyncio
import functools
import hashlib
import threading
from collections import deque
from collections.abc import Coroutine, Iterator, Mapping
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Self
from unittest.mock import patch
from weakref import WeakValueDictionary

import jax
import numpy as np

from kedge_server import app
from kedge_server.config import ServerConfig
from kedge_server.core.update import Program
from kedge_server.engine.checkpointer import Checkpointer
from kedge_server.engine.clock import Alarm, LoopClock
from kedge_server.engine.device import DeviceThread
from kedge_server.engine.outcomes import Outcomes
from kedge_server.engine.registry import Registry
from kedge_server.engine.staging import StagingPool

State = dict[str, str]
"""Everything that runs hold: where it stands -> what it is."""

_PATIENCE_SECONDS = 60

# No state: who waits, what calls whom, what is compiled, what the whole server shares (`lent_buffer_count` has that).
_LEFT_OUT_TYPES = (
    Alarm,
    asyncio.Event,
    asyncio.Future,
    Checkpointer,
    DeviceThread,
    LoopClock,
    Outcomes,
    Program,
    StagingPool,
    WeakValueDictionary,
)
# An upload is a sign of life, whatever becomes of it: it moves the end of its lease, and the timer for that.
_LEFT_OUT_NAMES = {"expires_at_seconds", "due_at_seconds"}


class LocalServer:
    """Starts on a free port of loopback.

    Args:
        sections: of the server's configuration, as in `limits={"runs": 4}`.
    """

    def __init__(self, **sections: dict[str, Any]) -> None:
        self._config = ServerConfig.model_validate({"server": {"listen": "127.0.0.1:0"}} | sections)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="local-server", daemon=True)
        self._thread.start()
        self._stop = app.Stop()
        listening: Future[str] = Future()
        # While it starts: a thread has no signals, and its registry is what is to be looked into.
        with (
            patch.object(app, "Registry", self._keep_registry),
            patch.object(app, "_stop_on_signals", lambda: self._stop),
        ):
            serving = app.serve(self._config, on_listening=listening.set_result)
            self._served = asyncio.run_coroutine_threadsafe(serving, self._loop)
            self._served.add_done_callback(lambda end: listening.done() or listening.set_exception(end.exception()))
            self.address = listening.result(_PATIENCE_SECONDS)

    def call(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Runs a coroutine on the server's loop, and waits for it."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(_PATIENCE_SECONDS)

    def state(self) -> State:
        """Everything that all runs hold, once the rounds that are closed have been applied."""
        return self.call(self._state())

    def lent_buffer_count(self) -> int:
        """The staging buffers in use: those of held contributions, and of uploads on their way."""
        return self.call(self._lent_buffer_count())

    def _keep_registry(self, *arguments: Any, **options: Any) -> Registry:
        self.registry = Registry(*arguments, **options)
        return self.registry

    async def _state(self) -> State:
        state: State = {}
        for run in self.registry.list():
            await run.drain()
            state.update(_facts(run, run.config.name))
        return state

    async def _lent_buffer_count(self) -> int:
        return sum(self.registry.staging._lent_counts.values())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._stop.ask)
        self._served.result(_PATIENCE_SECONDS)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_PATIENCE_SECONDS)
        self._loop.close()


def fingerprint(state: State) -> str:
    """The hash of a state."""
    return hashlib.sha256(repr(sorted(state.items())).encode()).hexdigest()


def changes(before: State, after: State) -> dict[str, tuple[str | None, str | None]]:
    """What became another: where it stands -> (before, after); None where there was nothing, or is nothing left."""
    places = sorted(before.keys() | after.keys())
    return {p: (before.get(p), after.get(p)) for p in places if before.get(p) != after.get(p)}


def _facts(value: Any, at: str) -> Iterator[tuple[str, str]]:
    """All that can be reached from a value. What is of no known kind is an error, so that nothing is passed over."""
    if isinstance(value, _LEFT_OUT_TYPES) or callable(value):
        return
    parts = _parts(value)
    if parts is None:
        yield at, _leaf(value, at)
        return
    yield at, f"{type(value).__name__} of {len(parts)}"
    for name, part in parts.items():
        if name not in _LEFT_OUT_NAMES:
            yield from _facts(part, f"{at}.{name}")


def _parts(value: Any) -> dict[str, Any] | None:
    """The parts of what has parts, by name."""
    if isinstance(value, Mapping):
        return {str(key): part for key, part in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return value._asdict()
    if isinstance(value, tuple | list | deque):
        return {str(index): part for index, part in enumerate(value)}
    slots = [name for kind in type(value).__mro__ for name in kind.__dict__.get("__slots__", ())]
    if isinstance(value, np.ndarray | jax.Array | np.generic) or not (slots or hasattr(value, "__dict__")):
        return None
    parts = {name: getattr(value, name) for name in slots} | getattr(value, "__dict__", {})
    cached = {name for name in parts if isinstance(getattr(type(value), name, None), functools.cached_property)}
    return {name: part for name, part in parts.items() if name not in cached}


def _leaf(value: Any, at: str) -> str:
    if isinstance(value, np.ndarray | jax.Array):
        array = np.asarray(value)
        return f"{array.dtype}{array.shape} {hashlib.sha256(array.tobytes()).hexdigest()}"
    if isinstance(value, set | frozenset):
        return repr(sorted(value))
    assert value is None or isinstance(value, bool | int | float | str | bytes), (
        f"{at} is a {type(value)}: say here what it is"
    )
    return repr(value)
