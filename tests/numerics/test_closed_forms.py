"""The update against what can be worked out on paper, or stands in one."""

from collections.abc import Callable

import numpy as np
import pytest

from kedge import optim
from kedge.policies import Synchronous
from kedge_server.core import rounds

from . import beale, cases, harness

ROUNDING = 2.0**-24

MAGNITUDES = np.array([1, -1, 0.5, 10, 1e-3, -1e-5, 3e4], np.float32)


def adabelief_constant_gradient(g: np.ndarray, t: int, *, b1: float, b2: float, eps: float) -> np.ndarray:
    """The step t of AdaBelief over the rate, where every gradient has been g: the geometric sums, summed."""
    decayed = b1**2 * (b2**t - b1 ** (2 * t)) / (b2 - b1**2)
    second = (1 - b2) * g**2 * decayed / (1 - b2**t) + eps / (1 - b2)
    return g / (np.sqrt(second) + eps)


def constant_gradient_steps(optimizer: optim.Optimizer, gradient: np.ndarray, count: int) -> list[np.ndarray]:
    """Steps 1 to `count`, each taken from weights of zero so that the difference is exact."""
    zeros = np.zeros_like(gradient)
    blocks = harness.state_of(optimizer, zeros)
    steps = []
    for step in range(1, count + 1):
        (block,) = harness.advance(optimizer, blocks, gradient, step)
        steps.append(-np.asarray(block.weights))
        blocks = (block._replace(weights=zeros),)
    return steps


class TestAdaBelief:
    @pytest.mark.parametrize("b1", [0.5, 0.9, 0.95])
    def test_first_step_is_the_rate_over_beta_1_whatever_the_gradient(self, b1: float) -> None:
        optimizer = optim.AdaBelief(lr=0.25, betas=(b1, 0.999))
        # eps / (1 - b2) is 1e-13 beside the deviation's square, which is 2.5e-5 or more here: below any rounding.
        gradient = np.array([1, -1, 0.01, -0.3, 10, 3e4, -1e12], np.float32)
        (first,) = constant_gradient_steps(optimizer, gradient, 1)
        np.testing.assert_allclose(first, 0.25 / b1 * np.sign(gradient), rtol=8 * ROUNDING)

    def test_constant_gradients_give_the_published_steps(self) -> None:
        steps = constant_gradient_steps(optim.AdaBelief(lr=1.0), MAGNITUDES, 5000)
        published = {1: 1.1111, 2: 1.1680, 10: 1.6354, 100: 4.955, 1000: 20.03, 5000: 185.7}
        half_units = {1: 5e-5, 2: 5e-5, 10: 5e-5, 100: 5e-4, 1000: 5e-3, 5000: 5e-2}
        for t, size in published.items():
            assert np.abs(steps[t - 1][0] - size) <= half_units[t] * 1.01

    @pytest.mark.parametrize("betas", [(0.9, 0.999), (0.8, 0.99)], ids=str)
    def test_constant_gradients_follow_the_closed_form(self, betas: tuple[float, float]) -> None:
        b1, b2 = betas
        steps = constant_gradient_steps(optim.AdaBelief(lr=1.0, betas=betas), MAGNITUDES, 1000)
        g = MAGNITUDES.astype(np.float64)
        for t, step in enumerate(steps, start=1):
            want = adabelief_constant_gradient(g, t, b1=b1, b2=b2, eps=1e-16)
            # Once the deviation has gone, s only shrinks by b2, and each of those products rounds: t roundings of s are
            # t/2 of its root. Found: 7e-6 at t = 1000, a quarter of it.
            np.testing.assert_allclose(step, want, rtol=(8 + t / 2) * ROUNDING)

    @pytest.mark.parametrize("greatest", [1.5, 10.0])
    def test_constant_gradients_go_no_farther_than_the_greatest_direction(self, greatest: float) -> None:
        steps = constant_gradient_steps(optim.AdaBelief(lr=0.5, max_direction=greatest), MAGNITUDES, 1000)
        g = MAGNITUDES.astype(np.float64)
        for t, step in enumerate(steps, start=1):
            free = adabelief_constant_gradient(g, t, b1=0.9, b2=0.999, eps=1e-16)
            want = 0.5 * np.minimum(np.maximum(free, -greatest), greatest)
            np.testing.assert_allclose(step, want, rtol=(8 + t / 2) * ROUNDING)
        assert np.abs(steps[0]).max() < 0.5 * greatest == np.abs(steps[-1]).min()

    # The rounding of the weights, at most 1.2e-7 a step, adds up to 1.3e-6, 1.3e-5 and 2.3e-5 at steps 2000, 5000 and
    # 10000; the published digits are good for 5e-6.
    @pytest.mark.parametrize(
        ("steps", "want", "atol"),
        [
            (2000, (-0.40362, -1.15996), 1e-5),
            (5000, (0.86699, -1.03216), 5e-5),
            (10000, (2.63682, 0.39015), 5e-5),
            (20000, (3.0, 0.5), 5e-5),
        ],
    )
    def test_beale_is_descended_as_published(self, steps: int, want: tuple[float, float], atol: float) -> None:
        np.testing.assert_allclose(descended(optim.AdaBelief(lr=1e-3), steps), want, rtol=0, atol=atol)


def descended(optimizer: optim.Optimizer, step_count: int) -> np.ndarray:
    """Where the optimizer is on the Beale function after so many steps."""
    blocks = harness.state_of(optimizer, np.array(beale.START))
    for step in range(1, step_count + 1):
        blocks = harness.advance(optimizer, blocks, beale.gradient(np.asarray(blocks[0].weights)), step)
    return np.asarray(blocks[0].weights)


class TestAdam:
    def test_beale_is_descended_as_published(self) -> None:
        np.testing.assert_allclose(descended(optim.Adam(lr=1e-3), 10000), (0.96779, -0.91847), rtol=0, atol=5e-5)

    def test_constant_gradients_give_steps_of_the_rate(self) -> None:
        # mhat = g and vhat = g^2 at every t, so the step is lr |g| / (|g| + eps).
        steps = constant_gradient_steps(optim.Adam(lr=0.5), MAGNITUDES, 200)
        want = 0.5 * MAGNITUDES / (np.abs(MAGNITUDES).astype(np.float64) + 1e-8)
        for t, step in enumerate(steps, start=1):
            np.testing.assert_allclose(step, want, rtol=(8 + 2 * t) * ROUNDING)

    def test_decoupled_decay_shrinks_the_weights_by_itself(self) -> None:
        # With zero gradients, AdamW's weights are w (1 - lr wd)^t; a coupled decay would step by the rate.
        optimizer = optim.AdamW(lr=0.1, weight_decay=0.5)
        weights = np.array([1, -2, 3e-3], np.float32)
        *_, last = harness.trajectory(optimizer, weights, harness.single([np.zeros(3, np.float32)] * 20))
        np.testing.assert_allclose(last.fast, weights * 0.95**20, rtol=40 * ROUNDING)


class TestMomentum:
    def test_constant_gradients_give_the_geometric_sum(self) -> None:
        steps = constant_gradient_steps(optim.SGD(lr=0.5, momentum=0.9), np.array([2.0], np.float32), 100)
        want = [0.5 * 2 * (1 - 0.9**t) / 0.1 for t in range(1, 101)]
        np.testing.assert_allclose(np.concatenate(steps), want, rtol=16 * ROUNDING)

    def test_nesterov_is_one_term_ahead(self) -> None:
        optimizer = optim.SGD(lr=0.5, momentum=0.9, nesterov=True)
        steps = constant_gradient_steps(optimizer, np.array([2.0], np.float32), 100)
        want = [0.5 * 2 * (1 - 0.9 ** (t + 1)) / 0.1 for t in range(1, 101)]
        np.testing.assert_allclose(np.concatenate(steps), want, rtol=16 * ROUNDING)


CHAINS = 200_000

# The variance of N independent normal values is found with a relative standard error of sqrt(2 / N), here 0.32 %. The
# seeds are fixed, so nothing flickers; five standard errors leave room for another generator.
STANDARD_ERRORS = 5 * np.sqrt(2 / CHAINS)

QUADRATICS = [
    # curvature a, noise sigma, rate gamma, period k, alpha, variance of the slow weights
    ((1.0, 1.0, 0.5, 5, 0.5), 0.11340),
    ((1.0, 1.0, 0.1, 5, 0.5), 0.02331),
    ((2.0, 1.0, 0.3, 10, 0.5), 0.14287),
]


def sgd_variance(a: float, sigma: float, gamma: float) -> float:
    """The stationary variance of SGD on a/2 (x - c)^2 with c normal."""
    r = 1 - gamma * a
    return gamma**2 * a**2 * sigma**2 / (1 - r**2)


def lookahead_variance(setting: tuple[float, ...]) -> float:
    """The stationary variance of the slow weights at the lookahead sync; arXiv:1907.08610, its noisy quadratic."""
    a, sigma, gamma, k, alpha = setting
    r_k = (1 - gamma * a) ** k
    return alpha * (1 + r_k) / (2 - alpha * (1 - r_k)) * sgd_variance(a, sigma, gamma)


def final_variances(
    optimizer: optim.Optimizer, step_count: int, draw: Callable[[np.random.Generator], np.ndarray], a: float
) -> tuple[float, float]:
    """Of fast and slow weights over independent chains, one an element, all from 0."""
    rng = np.random.default_rng(20261122)
    blocks = harness.state_of(optimizer, np.zeros(CHAINS))
    for step in range(1, step_count + 1):
        blocks = harness.advance(optimizer, blocks, a * (np.asarray(blocks[0].weights) - draw(rng)), step)
    fast, slow = harness.joined(blocks)
    return float(fast.var()), float(fast.var() if slow is None else slow.var())


class TestNoisyQuadratic:
    @pytest.mark.parametrize(("setting", "_slow_variance"), QUADRATICS, ids=str)
    def test_sgd_settles_at_its_variance(self, setting: tuple[float, ...], _slow_variance: float) -> None:
        a, sigma, gamma, *_ = setting
        steps = 20 if gamma * a >= 0.5 else 80  # r^(2 steps) of the start's distance is left, at most 5e-8
        fast, _ = final_variances(optim.SGD(lr=gamma), steps, normal(sigma), a)
        assert fast == pytest.approx(sgd_variance(a, sigma, gamma), rel=STANDARD_ERRORS)

    @pytest.mark.parametrize(("setting", "slow_variance"), QUADRATICS, ids=str)
    def test_lookahead_settles_at_its_share_of_it(self, setting: tuple[float, ...], slow_variance: float) -> None:
        a, sigma, gamma, k, alpha = setting
        optimizer = optim.Lookahead(optim.SGD(lr=gamma), sync_period=int(k), alpha=alpha)
        # Each period leaves (1 - alpha (1 - r^k))^2 of the distance: at most 0.64 of it at gamma = 0.1.
        periods = 25 if gamma * a < 0.5 else 10
        _, slow = final_variances(optimizer, periods * int(k), normal(sigma), a)
        assert lookahead_variance(setting) == pytest.approx(slow_variance, rel=3e-4)
        assert slow == pytest.approx(slow_variance, rel=STANDARD_ERRORS)

    @pytest.mark.parametrize("example_counts", [(1, 1, 1, 1), (1, 3, 2)], ids=str)
    def test_averaged_workers_divide_the_variance(self, example_counts: tuple[int, ...]) -> None:
        # A worker with n examples has noise of variance sigma^2 / n; weighted by n, all together sigma^2 / sum(n).
        rng = np.random.default_rng(7)
        shares = rounds.factors(example_counts, [0] * len(example_counts), Synchronous(quorum=1))
        optimizer = optim.SGD(lr=0.5)
        blocks = harness.state_of(optimizer, np.zeros(CHAINS))
        for step in range(1, 21):
            x = np.asarray(blocks[0].weights)
            gradients = [x - normal(1 / np.sqrt(n))(rng) for n in example_counts]
            blocks = harness.advance_round(optimizer, blocks, gradients, step, factors=shares)
        want = sgd_variance(1, 1, 0.5) / sum(example_counts)
        assert float(harness.joined(blocks).fast.var()) == pytest.approx(want, rel=STANDARD_ERRORS)


def normal(sigma: float) -> Callable[[np.random.Generator], np.ndarray]:
    """Draws for all chains, in float32."""
    return lambda rng: np.float32(sigma) * rng.standard_normal(CHAINS, np.float32)


BASES = [optim.SGD(0.05), optim.SGD(0.05, 0.9), optim.Adam(0.01), optim.AdamW(0.01), optim.AdaBelief(0.01)]
each_base = pytest.mark.parametrize("base", BASES, ids=["sgd", "momentum", "adam", "adamw", "adabelief"])


def averaged_gradients() -> list[np.ndarray]:
    return [contributions[0] for contributions in cases.make_rounds()]


class TestLookahead:
    @each_base
    @pytest.mark.parametrize("period", [1, 4])
    def test_alpha_1_is_the_base_optimizer_bit_for_bit(self, base: optim.Rule, period: int) -> None:
        gradients = harness.single(averaged_gradients())
        ahead = optim.Lookahead(base, sync_period=period, alpha=1.0)
        plain = harness.trajectory(base, cases.make_weights(), gradients)
        looking = harness.trajectory(ahead, cases.make_weights(), gradients)
        for step, (want, got) in enumerate(zip(plain, looking, strict=True), start=1):
            assert harness.same_bits(want.fast, got.fast)
            assert step % period or harness.same_bits(want.fast, got.slow)

    @each_base
    def test_alpha_0_leaves_slow_where_it_was_and_brings_fast_back(self, base: optim.Rule) -> None:
        start = cases.make_weights()
        ahead = optim.Lookahead(base, sync_period=4, alpha=0.0)
        path = harness.trajectory(ahead, start, harness.single(averaged_gradients()))
        for step, got in enumerate(path, start=1):
            assert harness.same_bits(got.slow, start)
            assert harness.same_bits(got.fast, start) == (step % 4 == 0)

    @pytest.mark.parametrize("alpha", [0.3, 0.5, 0.9])
    def test_period_1_with_sgd_is_sgd_with_the_scaled_rate(self, alpha: float) -> None:
        gradients = harness.single(averaged_gradients())
        start = cases.make_weights()
        ahead = optim.Lookahead(optim.SGD(lr=0.05), sync_period=1, alpha=alpha)
        scaled = harness.trajectory(optim.SGD(lr=0.05 * alpha), start, gradients)
        for want, got in zip(scaled, harness.trajectory(ahead, start, gradients), strict=True):
            assert harness.same_bits(got.fast, got.slow)
            np.testing.assert_allclose(got.fast, want.fast, rtol=0, atol=2 * cases.STEP_COUNT * ROUNDING * 4)

    def test_three_two_one_and_back_to_two(self) -> None:
        ahead = optim.Lookahead(optim.SGD(lr=1.0), sync_period=2, alpha=0.5)
        ones = harness.single([np.ones(1, np.float32)] * 4)
        path = list(harness.trajectory(ahead, np.array([3.0], np.float32), ones))
        assert [float(weights.fast[0]) for weights in path] == [2, 2, 1, 1]
        assert [float(weights.slow[0]) for weights in path] == [3, 2, 2, 1]
