"""A gradient in a buffer that is longer than the state: what lies beyond is not for use, whatever it is."""

import numpy as np
import pytest

from kedge import optim
from kedge.optim.controls import Controls
from kedge.wire.manifest import Manifest
from kedge_server.core.plan import plan
from kedge_server.core.values import MEAN, Combine
from kedge_server.engine.device import Writer

COUNT = 10_000
OPTIMIZERS = {
    "clipped": optim.Lookahead(optim.AdaBelief(1e-2, grad_clip_norm=0.5, weight_decay=0.1), sync_period=2),
    "by norm": optim.Lamb(1e-2),
}
COMBINES = {"mean": MEAN, "median": Combine("median")}


class Hand:
    """A writer, and the gradients of three workers."""

    def __init__(self, optimizer: optim.Optimizer) -> None:
        manifest = Manifest.from_specs([("a", (COUNT - 77,), "float32"), ("b", (7, 11), "float32")])
        self.plan = plan(optimizer.spec(), manifest, block_elements=4096)
        self.values = Controls.begin(optimizer.spec(), ()).values()
        random = np.random.default_rng(5)
        self.writer = Writer(self.plan, random.standard_normal(COUNT, np.float32), self.values)
        self.gradients = [random.standard_normal(COUNT, np.float32) for _ in range(3)]

    def lengthened(self) -> list[np.ndarray]:
        """The gradients, with what must have no effect behind them."""
        rest = np.resize(np.float32([np.nan, np.inf, 3e38]), self.plan.padded_count - COUNT)
        return [np.concatenate([gradient, rest]) for gradient in self.gradients]


@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weights_are_the_same_to_the_last_bit(name: str, combine: str) -> None:
    exact, longer = Hand(OPTIMIZERS[name]), Hand(OPTIMIZERS[name])
    factors = [1 / 3] * 3 if combine == "mean" else [1.0] * 3
    for _ in range(3):
        expected = exact.writer.apply(exact.gradients, factors, exact.values, COMBINES[combine])
        got = longer.writer.apply(longer.lengthened(), factors, longer.values, COMBINES[combine])
    assert np.concatenate(got.fast).tobytes() == np.concatenate(expected.fast).tobytes()
    assert np.isfinite(np.concatenate(got.fast)).all()


@pytest.mark.parametrize("count", [1, 3])
def test_what_is_written_to_a_journal_is_as_long_as_the_state(count: int) -> None:
    hand, written = Hand(OPTIMIZERS["clipped"]), []
    hand.writer.apply_combined(hand.lengthened()[:count], [1 / count] * count, hand.values, on_combined=written.extend)
    expected = np.mean(np.float64(hand.gradients[:count]), axis=0)
    np.testing.assert_allclose(np.concatenate(written), expected, rtol=1e-6, atol=1e-6)
