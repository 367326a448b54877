"""JAX's strict promotion for the tests that ask: an array of another dtype or rank is an error, not a conversion."""

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture
def strict_promotion() -> Iterator[None]:
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield
