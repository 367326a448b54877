"""How a seed that failed is run again."""

from collections.abc import Callable, Iterable


def each_seed(seeds: Iterable[int], test: str, simulate: Callable[[int], None]) -> None:
    """Simulates each seed; the error of one that fails says how to run it alone."""
    for seed in seeds:
        try:
            simulate(seed)
        except Exception as error:
            line = f".venv/bin/pytest tests/simulation/test_{test}.py --seed {seed}"
            raise AssertionError(f"seed {seed} failed ({error}); run it alone: {line}") from error
