"""Which arrays of a state somebody has on the host just now."""

import weakref
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np


class _Known(NamedTuple):
    array: "weakref.ref[jax.Array]"
    view: "weakref.ref[np.ndarray]"


class Views:
    """Arrays as they are on the host, each made once for as long as anyone has it.

    Args:
        to_host: makes them; see `Transfer.to_host`.
    """

    def __init__(self, to_host: Callable[[jax.Array], np.ndarray]) -> None:
        self._to_host = to_host
        self._known: dict[int, _Known] = {}  # by the array's id, since arrays have no hash

    def of(self, array: jax.Array) -> np.ndarray:
        """The array on the host, to be read only."""
        view = self._living(array)
        if view is None:
            key, known = id(array), self._known
            view = self._to_host(array)
            # A view may outlive its array, whose id another one then has.
            known[key] = _Known(weakref.ref(array, lambda _: known.pop(key, None)), weakref.ref(view))
        return view

    def is_read(self, array: jax.Array) -> bool:
        """Whether anyone has this array's view, or something of it."""
        return self._living(array) is not None

    def _living(self, array: jax.Array) -> np.ndarray | None:
        known = self._known.get(id(array))
        return known.view() if known is not None and known.array() is array else None
