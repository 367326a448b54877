"""Workers that come and go, late, twice, or poisoned, around the pure core: nothing is lost, doubled or out of order.

Each seed is a run of its own: policies, admission, workers and their vices, a bad network, and what befalls them. Every
answer and every round is compared with a plain model's, and the invariants are looked at after every event.
"""

import pytest

from .rerun import each_seed
from .world import World


def test_whatever_befalls_a_run_each_contribution_has_one_fate(seeds: range) -> None:
    each_seed(seeds, "chaos", lambda seed: World(seed).run())


@pytest.mark.soak
def test_many_more_seeds(soak_seeds: range) -> None:
    each_seed(soak_seeds, "chaos", lambda seed: World(seed).run())
