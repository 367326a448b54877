"""Takes a run's checkpoints: when asked, when one is due, and at the end."""

import asyncio
from collections.abc import Callable, Iterable, Mapping

import numpy as np
import structlog

from kedge.wire.errors import KedgeError
from kedge_server.core.image import HeldKey
from kedge_server.core.stored import Capture, CheckpointInfo
from kedge_server.engine.device import Writer
from kedge_server.engine.durability import RunStore
from kedge_server.engine.feed import Feed
from kedge_server.engine.pipeline import Pipeline

_log = structlog.get_logger("kedge.run")


class Checkpointer:
    """The checkpoints of one run. Belongs to one loop.

    Args:
        store: where they go.
        pipeline: where the state is.
        feed: hears of those that are complete.
        gradients: tells the gradients of contributions that are held.
    """

    def __init__(
        self,
        store: RunStore,
        pipeline: Pipeline,
        feed: Feed,
        *,
        gradients: Callable[[Iterable[HeldKey]], dict[HeldKey, np.ndarray]],
    ) -> None:
        self._store = store
        self._pipeline = pipeline
        self._feed = feed
        self._gradients = gradients
        self._taking: asyncio.Task[None] | None = None
        self._is_stopped = False

    async def take(self, metrics: Mapping[str, float]) -> CheckpointInfo:
        """Takes one, unless there is one of this step and none with metrics is asked for.

        Raises:
            KedgeError: DURABILITY_UNAVAILABLE, STORAGE_FULL or STORAGE_UNAVAILABLE.
        """
        of_now = self._store.checkpoint_of_now()
        if of_now is not None and not metrics:
            return of_now
        info = await self._store.save(self._capture, metrics)
        self._feed.tell("checkpoint", checkpoint=self._store.checkpoint_name(info.checkpoint_id))
        return info

    def stop(self) -> None:
        """Takes none any more by itself: the state is not what it should be."""
        self._is_stopped = True

    def take_if_due(self) -> None:
        """Begins to take one if it is time for it."""
        if self._is_stopped:
            return
        if self._taking is None and self._store.checkpoint_is_due():
            self._taking = asyncio.create_task(self._take_quietly())

    async def finish(self, *, hurry: bool) -> None:
        """Takes the last one, unless it hurries or nothing can be stored."""
        if self._taking is not None:
            self._taking.cancel()
            await asyncio.wait([self._taking])
        if not (hurry or self._is_stopped) and self._store.level != "memory" and self._store.problem is None:
            await self._take_quietly()

    async def _take_quietly(self) -> None:
        try:
            await self.take({})
        except KedgeError as error:
            _log.warning("checkpoint failed", run=self._store.run, cause=error.message)
        except Exception:
            _log.exception("checkpoint failed", run=self._store.run)
        finally:
            self._taking = None

    async def _capture(self) -> Capture:
        return await self._pipeline.do(self._begin_capture)

    def _begin_capture(self) -> Callable[[Writer], Capture]:
        image = self._store.image_state()
        gradients = self._gradients(image.held)
        return lambda writer: Capture(image, writer.capture(), {key: array.copy() for key, array in gradients.items()})
