"""The handwritten digits that come with scikit-learn: 1797 images of 8 x 8, split once and for all."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

TEST_COUNT = 360
_SPLIT_SEED = 0


class Digits(NamedTuple):
    """Images and what they show."""

    images: np.ndarray
    """float32 of shape [count, 64], between 0 and 1."""
    labels: np.ndarray
    """int32 of shape [count], 0 to 9."""


def load() -> tuple[Digits, Digits]:
    """The images to train with and those to test with, the same ones in every process."""
    from sklearn.datasets import load_digits  # takes a second: only those who need the images wait for it

    raw = load_digits()
    digits = Digits((raw.data / 16).astype(np.float32), raw.target.astype(np.int32))
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(digits.labels))
    return _take(digits, order[TEST_COUNT:]), _take(digits, order[:TEST_COUNT])


def shard(digits: Digits, index: int, count: int) -> Digits:
    """The part of worker `index`, from 0, among `count` workers. The parts do not overlap."""
    return _take(digits, np.arange(index, len(digits.labels), count))


def batches(digits: Digits, *, size: int, seed: int) -> Iterator[Digits]:
    """Random minibatches without end."""
    generator = np.random.default_rng(seed)
    while True:
        yield _take(digits, generator.integers(len(digits.labels), size=size))


def _take(digits: Digits, rows: np.ndarray) -> Digits:
    return Digits(digits.images[rows], digits.labels[rows])
