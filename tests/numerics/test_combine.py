"""Trimmed means and medians against NumPy and SciPy in float64, by themselves and as what an update is made of."""

import itertools
import logging

import jax
import numpy as np
import pytest
from scipy.stats import trim_mean

from kedge import optim
from kedge.optim.controls import Controls
from kedge.wire.manifest import Manifest
from kedge_server.core import update
from kedge_server.core.combine import combined
from kedge_server.core.plan import Plan, plan
from kedge_server.core.values import MEAN, Combine
from kedge_server.engine.device import Writer
from kedge_server.engine.staging import StagingPool

from . import cases, harness, oracle

MEDIAN = Combine("median")
COUNTS = (*range(1, 10), 16, 33, 64, 65, 100)
"""Of contributions. More than 64 are sorted another way, in pieces."""
LENGTH = 5000
"""More than a piece of 65 and of 100 contributions, and no multiple of it."""


def trimmed(trim_count: int) -> Combine:
    return Combine("trimmed_mean", trim_count)


def combinations_of(count: int) -> list[Combine]:
    """The medians and trimmed means that are defined; of many contributions some."""
    trims = range((count + 1) // 2) if count < 10 else (0, 1, (count - 1) // 4, (count - 1) // 2)
    return [trimmed(trim) for trim in trims] + [MEDIAN] * (count >= 3)


def exact(products: np.ndarray, combine: Combine) -> np.ndarray:
    """In float64. SciPy takes the share that is cut, and rounds its count down."""
    rows = products.astype(np.float64)
    if combine.kind == "median":
        return np.median(rows, axis=0)
    return trim_mean(rows, (combine.trim_count + 0.5) / len(rows), axis=0)


def drawn(count: int, length: int = LENGTH, seed: int = 0) -> np.ndarray:
    """Contributions of several decades."""
    rng = np.random.default_rng([seed, count])
    return (rng.normal(size=(count, length)) * 10.0 ** rng.uniform(-3, 1, length)).astype(np.float32)


def found(contributions: np.ndarray, combine: Combine, factors: np.ndarray | None = None) -> np.ndarray:
    factors = np.ones(len(contributions), np.float32) if factors is None else factors
    return np.array(combined(list(contributions), list(factors), combine))


class TestCombined:
    @pytest.mark.usefixtures("strict_promotion")
    @pytest.mark.parametrize("count", COUNTS)
    def test_agrees_with_numpy_and_scipy_in_float64(self, count: int) -> None:
        contributions = drawn(count)
        factors = (1 / (1 + np.arange(count) % 3)).astype(np.float32)
        products = contributions * factors[:, None]
        # Each of the sum's roundings is at most half a unit in the last place of the sum of the absolute values.
        bound = count * 2.0**-24 * np.abs(products.astype(np.float64)).mean(axis=0) * 2
        for combine in combinations_of(count):
            error = np.abs(found(contributions, combine, factors) - exact(products, combine))
            assert (error <= bound).all(), combine

    @pytest.mark.parametrize("count", [3, 5, 9, 33, 65])
    def test_the_median_of_an_odd_count_is_one_of_its_values_bit_for_bit(self, count: int) -> None:
        contributions = drawn(count)
        assert harness.same_bits(found(contributions, MEDIAN), np.median(contributions, axis=0))

    @pytest.mark.parametrize("count", range(1, 11))
    def test_every_pattern_of_zeros_and_ones_is_sorted(self, count: int) -> None:
        # By the 0-1 principle (Knuth, volume 3, 5.3.4, theorem Z) a network that sorts these sorts everything.
        patterns = np.array(list(itertools.product([0, 1], repeat=count)), np.float32).T
        for trim in range((count + 1) // 2):
            kept = count - 2 * trim
            ones = np.clip(patterns.sum(axis=0) - trim, 0, kept)
            np.testing.assert_allclose(found(patterns, trimmed(trim)), ones / kept, rtol=2.0**-22)

    @pytest.mark.parametrize("count", [65, 100, 128, 129])
    def test_many_zeros_and_ones_are_sorted_with_any_number_left_out(self, count: int) -> None:
        rng = np.random.default_rng(count)
        patterns = (rng.random((count, 600)) < rng.random(600)).astype(np.float32)
        for trim in range((count + 1) // 2):
            kept = count - 2 * trim
            ones = np.clip(patterns.sum(axis=0) - trim, 0, kept)
            np.testing.assert_allclose(found(patterns, trimmed(trim)), ones / kept, rtol=2.0**-22)

    @pytest.mark.parametrize("count", [3, 4, 5, 8, 16, 33, 65, 100])
    def test_the_order_of_the_contributions_changes_no_bit(self, count: int) -> None:
        rng = np.random.default_rng(count)
        contributions = drawn(count)
        # Ties, zeros of both signs and numbers below the least normal one: what comparisons may not tell apart.
        contributions[:, 1000:2000] = rng.choice(np.array([0.0, -0.0, 1e-40, -1e-40, 3e-39], np.float32), (count, 1000))
        contributions[:, 2000:3000] = rng.integers(-2, 3, (count, 1000))
        factors = rng.choice(np.array([1, 0.5, 0.25], np.float32), count)
        for combine in combinations_of(count):
            want = found(contributions, combine, factors)
            orders = itertools.permutations(range(count)) if count < 5 else [rng.permutation(count) for _ in range(8)]
            for order in map(list, orders):
                assert harness.same_bits(found(contributions[order], combine, factors[order]), want), combine

    @pytest.mark.parametrize("count", [3, 5, 8, 16, 65])
    @pytest.mark.parametrize("sign", [1, -1])
    def test_an_outlier_changes_no_bit_however_large(self, count: int, sign: int) -> None:
        contributions = drawn(count)
        for combine in combinations_of(count):
            if combine == trimmed(0):
                continue
            results = []
            for size in (1e3, 1e30, 3e38):
                contributions[count // 2] = sign * size
                results.append(found(contributions, combine))
            assert harness.same_bits(results[0], results[1])
            assert harness.same_bits(results[0], results[2])

    @pytest.mark.parametrize(("count", "liars"), [(3, 1), (5, 2), (7, 2), (8, 3), (101, 50)])
    def test_fewer_than_half_cannot_move_it_beyond_what_the_others_say(self, count: int, liars: int) -> None:
        contributions = drawn(count)
        contributions[:liars] = 1e30 * np.sign(contributions[:liars])
        contributions[0] = -1e30
        honest = contributions[liars:]
        slack = count * 2.0**-24 * np.abs(honest).max(axis=0)
        for combine in (MEDIAN, trimmed(liars)):
            result = found(contributions, combine)
            assert (result >= honest.min(axis=0) - slack).all()
            assert (result <= honest.max(axis=0) + slack).all()

    def test_the_fewest_contributions_are_one_more_than_are_left_out(self) -> None:
        assert (MEAN.required_count, MEDIAN.required_count) == (1, 1)
        assert [trimmed(trim).required_count for trim in (0, 1, 4)] == [1, 3, 9]

    @pytest.mark.parametrize("combine", [trimmed(1), trimmed(3)])
    def test_fewer_are_not_combined(self, combine: Combine) -> None:
        with pytest.raises(AssertionError):
            found(drawn(combine.required_count - 1), combine)

    def test_a_new_count_beyond_64_compiles_nothing(self, caplog: pytest.LogCaptureFixture) -> None:
        jax.clear_caches()  # whatever other tests have compiled
        found(drawn(70), MEDIAN)
        with jax.log_compiles(), caplog.at_level(logging.WARNING):
            found(drawn(71), MEDIAN)
            found(drawn(128), trimmed(5))
            assert "Finished XLA compilation" not in caplog.text
            found(drawn(129), MEDIAN)
        assert "Finished XLA compilation of jit(_mean_of_middle_rows)" in caplog.text


MANIFEST = Manifest.from_specs([("a.w", (40, 30), "float32"), ("b.w", (50,), "float32"), ("a.b", (30, 200), "float32")])
COUNT = MANIFEST.element_count
A_W, B_W = slice(0, 1200), slice(1200, 1250)
"""Where these tensors are in the flat state."""
LOOKING = optim.Lookahead(optim.AdaBelief(lr=0.01), sync_period=3, alpha=0.5)
GROUPS = {
    "no groups": [],
    "a clip of its own": [optim.Group("b.*", grad_clip_norm=0.5, lr=0.02)],
    "frozen": [optim.Group("b.*", frozen=True)],
}


def start() -> np.ndarray:
    return np.random.default_rng(3).normal(size=COUNT).astype(np.float32)


def cut(optimizer: optim.Optimizer, groups: list[optim.Group], block_elements: int) -> Plan:
    return plan(optimizer.spec(), MANIFEST, groups=groups, block_elements=block_elements)


class TestUpdate:
    @pytest.mark.usefixtures("strict_promotion")
    @pytest.mark.parametrize("sizes", [(41,), (17, 1, 23)], ids=str)
    @pytest.mark.parametrize("combine", [MEDIAN, trimmed(1)], ids=str)
    @pytest.mark.parametrize("count", [3, 4])
    @pytest.mark.parametrize("case", [c for c in cases.CASES if c.name.startswith("lookahead")], ids=lambda c: c.name)
    def test_every_step_agrees_with_the_float64_oracle(
        self, case: cases.Case, count: int, combine: Combine, sizes: tuple[int, ...]
    ) -> None:
        rounds = [
            [*contributions, drawn(1, 41, seed)[0]][:count] for seed, contributions in enumerate(cases.make_rounds())
        ]
        gradients = [exact(np.stack(contributions), combine) for contributions in rounds]
        want = list(oracle.trajectory(case.recipe, cases.make_weights(), gradients))
        path = harness.trajectory(
            case.optimizer, cases.make_weights(), rounds, factors=[1.0] * count, sizes=sizes, combine=combine
        )
        bound = cases.STEP_COUNT * 2.0**-24 * max(np.abs(state.fast).max() for state in want)
        for got, state in zip(path, want, strict=True):
            np.testing.assert_allclose(got.fast, state.fast, rtol=0, atol=bound)
            np.testing.assert_allclose(got.slow, state.slow, rtol=0, atol=bound)

    @pytest.mark.parametrize("block_elements", [500, 4096, 10**6])
    @pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS.keys())
    @pytest.mark.parametrize(
        "optimizer",
        [LOOKING, optim.SGD(0.1, grad_clip_norm=2.0, grad_clip_value=0.1), optim.Lookahead(optim.Lamb(0.01))],
        ids=["lookahead_adabelief", "sgd_clips", "lookahead_lamb"],
    )
    @pytest.mark.parametrize("count", [5, 65])
    def test_a_median_is_applied_as_if_it_were_the_only_contribution(
        self, optimizer: optim.Optimizer, groups: list[optim.Group], block_elements: int, count: int
    ) -> None:
        rounds = [list(drawn(count, COUNT, seed)) for seed in range(6)]
        medians = [[np.median(np.stack(contributions), axis=0)] for contributions in rounds]
        by = cut(optimizer, groups, block_elements)
        ones = [1.0] * count
        alone = harness.trajectory(optimizer, start(), medians, plan=by, groups=groups)
        together = harness.trajectory(optimizer, start(), rounds, plan=by, groups=groups, factors=ones, combine=MEDIAN)
        for want, got in zip(alone, together, strict=True):
            assert harness.same_bits(got.fast, want.fast)
            assert want.slow is None or harness.same_bits(got.slow, want.slow)

    def test_the_norm_is_that_of_the_combination(self) -> None:
        # The medians are (3, 4); every contribution has a norm above 50.
        rounds = [[np.array(pair, np.float32) for pair in ((3, 90), (-70, 4), (60, -50))]]
        optimizer = optim.SGD(lr=1.0, grad_clip_norm=1.0)
        (weights,) = harness.trajectory(optimizer, np.zeros(2, np.float32), rounds, factors=[1.0] * 3, combine=MEDIAN)
        np.testing.assert_allclose(weights.fast, [-0.6, -0.8], rtol=1e-6)

    def test_a_factor_scales_its_contribution_and_not_the_result(self) -> None:
        rounds = [[np.full(2, value, np.float32) for value in (8, 3, 2)]]
        (weights,) = harness.trajectory(
            optim.SGD(lr=1.0), np.zeros(2, np.float32), rounds, factors=[0.25, 1.0, 0.5], combine=MEDIAN
        )
        np.testing.assert_array_equal(weights.fast, [-2, -2])  # the middle one of 2, 3 and 1

    @pytest.mark.parametrize("count", [3, 65])
    @pytest.mark.parametrize("beyond", [np.nan, np.inf, 3e38])
    def test_what_lies_beyond_a_block_reaches_no_weight_and_no_norm(self, beyond: float, count: int) -> None:
        # Where the block of a.w ends, its view of a flat gradient goes on into b.w, which is frozen.
        groups = [optim.Group("b.*", frozen=True)]
        optimizer = optim.Lookahead(optim.AdaBelief(0.01, grad_clip_norm=1.0), sync_period=2)
        by = cut(optimizer, groups, 10**6)
        assert by.blocks[0].is_padded
        clean = [list(drawn(count, COUNT, seed)) for seed in range(4)]
        soiled = [[gradient.copy() for gradient in contributions] for contributions in clean]
        for gradient in itertools.chain.from_iterable(soiled):
            gradient[B_W] = beyond
        options = {"plan": by, "groups": groups, "factors": [1.0] * count, "combine": trimmed(1)}
        left, right = (harness.trajectory(optimizer, start(), rounds, **options) for rounds in (clean, soiled))
        for want, got in zip(left, right, strict=True):
            assert harness.same_bits(got.fast, want.fast)
            assert harness.same_bits(got.slow, want.slow)
            assert harness.same_bits(got.fast[B_W], start()[B_W])
            assert not np.array_equal(got.fast[A_W], start()[A_W])

    def test_a_second_round_compiles_nothing(self, caplog: pytest.LogCaptureFixture) -> None:
        jax.clear_caches()  # whatever other tests have compiled
        program = update.Program(cut(LOOKING, [], 10**6))
        values = Controls.begin(program.plan.spec, ()).values()
        blocks = program.init(start(), values)
        with jax.log_compiles(), caplog.at_level(logging.WARNING):
            for step in range(1, 9):
                if step == 4:
                    assert "jit(_mean_of_middle)" in caplog.text
                    caplog.clear()
                contributions = list(drawn(5, COUNT, step))
                factors = [1.0, 0.5, 1.0, 1.0, 1 / step]
                blocks = program.apply(
                    blocks, contributions, factors=factors, step=step, values=values, combine=trimmed(1)
                )
        assert "Finished XLA compilation" not in caplog.text

    def test_too_few_contributions_are_not_applied(self) -> None:
        rounds = [[np.ones(2, np.float32)] * 2]
        with pytest.raises(AssertionError):
            list(harness.trajectory(optim.SGD(), np.zeros(2), rounds, factors=[1.0] * 2, combine=trimmed(1)))


@pytest.mark.parametrize("count", [3, 65])
@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS.keys())
def test_the_buffers_of_a_round_may_be_overwritten_once_it_is_applied(count: int, groups: list[optim.Group]) -> None:
    pool = StagingPool(1 << 30)
    buffers = [pool.acquire(COUNT).array for _ in range(count)]  # aligned: JAX reads them without a copy
    rounds = [drawn(count, COUNT, seed) for seed in range(5)]
    want = harness.trajectory(
        LOOKING,
        start(),
        [list(contributions) for contributions in rounds],
        plan=cut(LOOKING, groups, 4096),
        groups=groups,
        factors=[1.0] * count,
        combine=MEDIAN,
    )
    values = Controls.begin(LOOKING.spec(), groups).values()
    writer = Writer(cut(LOOKING, groups, 4096), start(), values)
    for contributions, state in zip(rounds, want, strict=True):
        for buffer, gradient in zip(buffers, contributions, strict=True):
            buffer[:] = gradient
        snapshot = writer.apply(buffers, [1.0] * count, values, MEDIAN)
        for buffer in buffers:
            buffer[:] = np.nan
        assert harness.same_bits(np.concatenate(snapshot.fast), state.fast)
