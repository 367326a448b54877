"""A run's state as flat weights, and as digests of its bytes. The arrays are those that `Writer.capture` gives."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal, NamedTuple

import numpy as np

from kedge_server.core.image import HeldKey, RunImage
from kedge_server.core.plan import Plan
from kedge_server.core.stored import Arrays
from kedge_server.engine.recovery import plan_of
from kedge_server.storage.plain import encode

Weights = Literal["fast", "slow"]


class Digests(NamedTuple):
    """SHA-256 of a state, in hexadecimal digits. Two runs with equal ones hold the same bits."""

    fast: str
    """Of the fast weights, flat, float32, little-endian."""
    slow: str | None
    """Of the slow weights; None without Lookahead."""
    state: str
    """Of the rule's state: the name and the bytes of each array."""


class Fingerprint(NamedTuple):
    """Digests of all that a checkpoint holds."""

    fast: str
    slow: str | None
    state: str
    image: str
    """Of what the run is apart from its arrays: schedules, leases, ledgers, counts."""
    held: str
    """Of the gradients that are held."""


def has_slow(image: RunImage) -> bool:
    """Whether the run has slow weights."""
    return image.config.optimizer.spec().sync_period is not None


def flat(image: RunImage, arrays: Arrays, weights: Weights) -> np.ndarray:
    """The weights of all tensors one after the other, float32."""
    return np.concatenate([np.empty(0, np.float32), *_pieces(plan_of(image.config), arrays, weights)])


def digests(image: RunImage, arrays: Arrays) -> Digests:
    """The digests of a state."""
    plan = plan_of(image.config)
    slow = _digest_of(_pieces(plan, arrays, "slow")) if has_slow(image) else None
    return Digests(_digest_of(_pieces(plan, arrays, "fast")), slow, _digest_of(_named_state(arrays)))


def fingerprint(image: RunImage, arrays: Arrays, held: Mapping[HeldKey, np.ndarray]) -> Fingerprint:
    """The digests of a state with all that belongs to it."""
    gradients = [held[key] for key in sorted(held)]
    return Fingerprint(*digests(image, arrays), _digest_of([encode(image.state())]), _digest_of(gradients))


def digest(array: np.ndarray) -> str:
    """That of an array's bytes."""
    return _digest_of([array])


def _pieces(plan: Plan, arrays: Arrays, weights: Weights) -> Iterator[np.ndarray]:
    """The weights of each block. Slow ones that are the fast ones are not there twice."""
    for number, block in enumerate(plan.blocks):
        fast = arrays[f"fast.{number:05}"]
        array = arrays.get(f"slow.{number:05}", fast) if weights == "slow" else fast
        yield array[: block.size]


def _named_state(arrays: Arrays) -> Iterator[bytes | np.ndarray]:
    for name, array in arrays.items():
        if name.startswith("state."):
            yield name.encode()
            yield array


def _digest_of(parts: Iterable[bytes | np.ndarray]) -> str:
    total = hashlib.sha256()
    for part in parts:
        raw = part if isinstance(part, bytes) else np.ascontiguousarray(part).reshape(-1).view(np.uint8).data
        total.update(raw)
    return total.hexdigest()
