"""Which seeds the simulation runs: all of a group, or the one that `--seed` names."""

import pytest

GROUP_SIZE = 50
SOAK_GROUP_SIZE = 1000
SEED_COUNT = 2000
SOAK_SEED_COUNT = 100_000
QUIET_SEED_COUNT = 100


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=None, help="the one seed that tests/simulation is to run")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for name, groups in (
        ("seeds", _groups(0, SEED_COUNT, GROUP_SIZE)),
        ("soak_seeds", _groups(SEED_COUNT, SOAK_SEED_COUNT, SOAK_GROUP_SIZE)),
        ("quiet_seeds", _groups(0, QUIET_SEED_COUNT, GROUP_SIZE)),
    ):
        if name in metafunc.fixturenames:
            only = metafunc.config.getoption("seed", default=None)  # unknown if this file was found late
            chosen = groups if only is None else [range(only, only + 1)]
            metafunc.parametrize(name, chosen, ids=[f"{group.start}-{group.stop - 1}" for group in chosen])


def _groups(start: int, stop: int, size: int) -> list[range]:
    return [range(first, min(first + size, stop)) for first in range(start, stop, size)]
