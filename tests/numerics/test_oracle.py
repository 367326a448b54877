"""The compiled float32 update against the naive float64 oracle, for a table of optimizers and cuts into blocks."""

from functools import cache

import numpy as np
import pytest

from kedge.policies import Synchronous
from kedge_server.core import rounds

from . import beale, cases, harness, oracle

ONE_BLOCK = (41,)
UNEVEN = (17, 1, 23)
SWAPPED = (23, 17, 1)

ROUNDING = 2.0**-24
"""Half a unit in the last place of float32, relative."""

# One step rounds each weight once, by at most ROUNDING * |weight|; what the step itself is off by is as much smaller as
# the step is smaller than the weight. So the sum over the steps bounds the error, and as roundings cancel it is found
# to be between 0.04 and 0.11 of that.
TOLERANCE = cases.STEP_COUNT * ROUNDING

by_name = pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)


@cache
def _found(case_index: int, sizes: tuple[int, ...]) -> list[harness.Weights]:
    no_staleness = [0] * len(cases.EXAMPLE_COUNTS)
    shares = rounds.factors(cases.EXAMPLE_COUNTS, no_staleness, Synchronous(quorum=3))
    return list(
        harness.trajectory(
            cases.CASES[case_index].optimizer,
            cases.make_weights(),
            cases.make_rounds(),
            factors=shares,
            sizes=sizes,
        )
    )


def found(case: cases.Case, sizes: tuple[int, ...]) -> list[harness.Weights]:
    return _found(cases.CASES.index(case), sizes)


def expected(case: cases.Case) -> list[oracle.State]:
    means = [oracle.weighted_mean(contributions, cases.EXAMPLE_COUNTS) for contributions in cases.make_rounds()]
    return list(oracle.trajectory(case.recipe, cases.make_weights(), means))


@pytest.mark.usefixtures("strict_promotion")
@pytest.mark.parametrize("sizes", [ONE_BLOCK, UNEVEN, SWAPPED], ids=str)
@by_name
def test_every_step_agrees_with_the_float64_oracle(case: cases.Case, sizes: tuple[int, ...]) -> None:
    want = expected(case)
    scale = max(np.abs(state.fast).max() for state in want)
    steps = list(zip(found(case, sizes), want, strict=True))
    assert len(steps) == cases.STEP_COUNT
    for got, state in steps:
        np.testing.assert_allclose(got.fast, state.fast, rtol=0, atol=TOLERANCE * scale)
        if got.slow is not None:
            np.testing.assert_allclose(got.slow, state.slow, rtol=0, atol=TOLERANCE * scale)


@by_name
def test_slow_weights_exist_exactly_with_lookahead(case: cases.Case) -> None:
    has_slow = case.recipe.sync_period is not None
    assert all((weights.slow is not None) == has_slow for weights in found(case, ONE_BLOCK))


@pytest.mark.parametrize("sizes", [UNEVEN, SWAPPED], ids=str)
@pytest.mark.parametrize("case", [c for c in cases.CASES if c.recipe.clip_norm is None], ids=lambda case: case.name)
def test_the_cut_into_blocks_changes_no_bit_where_no_norm_is_involved(case: cases.Case, sizes: tuple[int, ...]) -> None:
    for whole, in_blocks in zip(found(case, ONE_BLOCK), found(case, sizes), strict=True):
        assert harness.same_bits(whole.fast, in_blocks.fast)
        assert whole.slow is None or harness.same_bits(whole.slow, in_blocks.slow)


@pytest.mark.parametrize("sizes", [UNEVEN, SWAPPED], ids=str)
@pytest.mark.parametrize("case", [c for c in cases.CASES if c.recipe.clip_norm is not None], ids=lambda case: case.name)
def test_the_cut_into_blocks_changes_only_roundings_where_the_norm_is_summed_over_blocks(
    case: cases.Case, sizes: tuple[int, ...]
) -> None:
    # The norm's last bit depends on the order of its sum. Found: at most 2 units in the last place of a weight of 1.
    for whole, in_blocks in zip(found(case, ONE_BLOCK), found(case, sizes), strict=True):
        np.testing.assert_allclose(whole.fast, in_blocks.fast, rtol=0, atol=16 * ROUNDING)


def test_the_table_clips_some_rounds_and_leaves_others() -> None:
    norms = [
        np.linalg.norm(oracle.weighted_mean(contributions, cases.EXAMPLE_COUNTS))
        for contributions in cases.make_rounds()
    ]
    limits = {case.recipe.clip_norm for case in cases.CASES} - {None}
    for limit in limits:
        assert 10 <= sum(norm > limit for norm in norms) <= 50


def test_the_oracle_walks_three_two_one_and_back_to_two() -> None:
    recipe = oracle.Recipe(rule="sgd", lr=1, sync_period=2, alpha=0.5)
    states = list(oracle.trajectory(recipe, np.array([3.0]), [np.ones(1)] * 4))
    assert [float(state.fast[0]) for state in states] == [2, 2, 1, 1]
    assert [float(state.slow[0]) for state in states] == [3, 2, 2, 1]


@pytest.mark.parametrize(
    ("recipe", "expected_path"),
    [
        (oracle.adabelief(lr=1e-3), {2000: (-0.40362, -1.15996), 5000: (0.86699, -1.03216), 10000: (2.63682, 0.39015)}),
        (oracle.Recipe(rule="adam", lr=1e-3), {10000: (0.96779, -0.91847)}),
    ],
    ids=["adabelief", "adam"],
)
def test_the_oracle_finds_the_published_points_on_the_beale_function(
    recipe: oracle.Recipe, expected_path: dict[int, tuple[float, float]]
) -> None:
    point = np.array(beale.START)
    state = oracle.State(point, point, np.zeros(2), np.zeros(2))
    path = {}
    for step in range(1, 10001):
        state = oracle.advance(recipe, state, beale.gradient(state.fast), step)
        path[step] = state.fast
    for step, want in expected_path.items():
        np.testing.assert_allclose(path[step], want, rtol=0, atol=5.1e-6)
