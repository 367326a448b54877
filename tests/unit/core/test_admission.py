"""What is refused before anything changes: errors of the protocol, and rejections that are answers."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kedge.policies import Admission, Asynchronous, BoundedStaleness, Policy, Synchronous
from kedge.wire.errors import CATALOGUE, KedgeError
from kedge_server.core.admission import Inspection, NormHistory, Rules, Standing, check_header, judge
from kedge_server.core.values import ContributionHeader

DIGEST = b"\x01\x02"
QUORUM = Synchronous(quorum=2)


def header(*, base_step: int = 7, digest: bytes = DIGEST, example_count: int = 32) -> ContributionHeader:
    return ContributionHeader(
        worker_id="ada",
        epoch=3,
        sequence=5,
        base_step=base_step,
        manifest_digest=digest,
        example_count=example_count,
        loss=None,
    )


@pytest.mark.parametrize("base_step", [0, 6, 7])
@pytest.mark.parametrize("example_count", [1, 2**31])
def test_a_header_in_order_passes(base_step: int, example_count: int) -> None:
    check_header(header(base_step=base_step, example_count=example_count), manifest_digest=DIGEST, step=7)


@pytest.mark.parametrize(
    ("bad", "reason", "metadata"),
    [
        (header(digest=b"\xff"), "MANIFEST_MISMATCH", {"expected": "0102", "got": "ff"}),
        (header(digest=b""), "MANIFEST_MISMATCH", {"expected": "0102", "got": ""}),
        (header(example_count=0), "INVALID_EXAMPLE_COUNT", {"example_count": "0"}),
        (header(example_count=-1), "INVALID_EXAMPLE_COUNT", {"example_count": "-1"}),
        (header(base_step=8), "BASE_STEP_AHEAD", {"base_step": "8", "step": "7"}),
    ],
    ids=["other digest", "no digest", "no examples", "negative examples", "base step ahead"],
)
def test_a_header_out_of_order_is_an_error_with_its_reason(
    bad: ContributionHeader, reason: str, metadata: dict[str, str]
) -> None:
    with pytest.raises(KedgeError) as caught:
        check_header(bad, manifest_digest=DIGEST, step=7)
    assert caught.value.reason == reason
    assert caught.value.metadata == metadata
    assert set(metadata) == set(CATALOGUE[reason].metadata)


def inspected(bad: int | None, *, piece: int = 50) -> Inspection:
    """What is learnt of 200 values that come in pieces, one of them a NaN."""
    values = np.ones(200, np.float32)
    if bad is not None:
        values[bad:] = [np.nan, *np.ones(199 - bad)]
    inspection = Inspection()
    for at in range(0, values.size, piece):
        inspection.add(values[at : at + piece])
    return inspection


def rules(policy: Policy, admission: Admission | None = None, norms: Sequence[float] = ()) -> Rules:
    history = NormHistory()
    for norm in norms:
        history.add(norm)
    return Rules(policy, admission or Admission(), history)


def judged(base_step: int, policy: Policy, *, has_contributed: bool = False, bad: int | None = None) -> str | None:
    """The reason of the rejection by a run at step 7, None where the contribution is taken."""
    standing = Standing(step=7, has_contributed=has_contributed)
    rejection = judge(header(base_step=base_step), inspected(bad), standing=standing, rules=rules(policy))
    return rejection.reason if rejection else None


@pytest.mark.parametrize(
    ("base_step", "policy", "want"),
    [
        # Synchronous: of this step or stale.
        (7, QUORUM, None),
        (6, QUORUM, "STALE_GRADIENT"),
        (0, QUORUM, "STALE_GRADIENT"),
        # Asynchronous: up to the bound, the bound included.
        (7, Asynchronous(), None),
        (0, Asynchronous(), None),
        (7, Asynchronous(max_staleness=0), None),
        (6, Asynchronous(max_staleness=0), "STALE_GRADIENT"),
        (5, Asynchronous(max_staleness=2), None),
        (4, Asynchronous(max_staleness=2), "STALE_GRADIENT"),
    ],
)
def test_staleness_is_held_to_the_policys_bound(base_step: int, policy: Policy, want: str | None) -> None:
    assert judged(base_step, policy) == want


def test_a_worker_contributes_once_to_a_synchronous_round() -> None:
    assert judged(7, QUORUM, has_contributed=True) == "ALREADY_CONTRIBUTED"
    assert judged(7, Asynchronous(), has_contributed=True) is None


def test_what_is_stale_is_called_stale_even_after_a_contribution() -> None:
    assert judged(6, QUORUM, has_contributed=True) == "STALE_GRADIENT"


@pytest.mark.parametrize("policy", [QUORUM, Asynchronous(), Asynchronous(max_staleness=0)], ids=str)
@pytest.mark.parametrize("element", [0, 123])
def test_a_non_finite_element_is_rejected_first_of_all_and_named(policy: Policy, element: int) -> None:
    standing = Standing(step=7, has_contributed=True)
    rejection = judge(header(base_step=0), inspected(element), standing=standing, rules=rules(policy))
    assert rejection is not None
    assert rejection.reason == "NON_FINITE_GRADIENT"
    assert f"element {element} " in rejection.message


@pytest.mark.parametrize(
    ("pieces", "reason"),
    [
        ([[np.inf, -np.inf]], "NON_FINITE_GRADIENT"),
        ([[1.0], [-np.inf]], "NON_FINITE_GRADIENT"),
        ([[3e38, 3e38], [np.nan]], "NON_FINITE_GRADIENT"),
        # 1.9e19 squared is 3.61e38; float32 ends at 3.40e38.
        ([[1.9e19]], "GRADIENT_TOO_LARGE"),
        ([[1.4e19], [1.4e19]], "GRADIENT_TOO_LARGE"),
        ([[1.2e19], [1.2e19]], None),
        ([[1.8e19]], None),
    ],
)
def test_values_that_no_moment_could_hold_are_rejected(pieces: list[list[float]], reason: str | None) -> None:
    inspection = Inspection()
    for piece in pieces:
        inspection.add(np.array(piece, np.float32))
    rejection = inspection.rejection()
    assert (rejection and rejection.reason) == reason


@given(st.lists(st.floats(-1e9, 1e9, width=32), max_size=50), st.integers(1, 50))
def test_sum_of_squares_does_not_depend_on_the_pieces(values: list[float], piece: int) -> None:
    inspection = Inspection()
    for at in range(0, len(values), piece):
        inspection.add(np.array(values[at : at + piece], np.float32))
    np.testing.assert_allclose(inspection.sum_of_squares, sum(value**2 for value in values), rtol=1e-5, atol=1e-30)


def test_a_stale_gradients_message_says_how_old_and_what_the_limit_is() -> None:
    standing = Standing(step=9, has_contributed=False)
    policy = Asynchronous(max_staleness=4)
    rejection = judge(header(base_step=0), Inspection(), standing=standing, rules=rules(policy))
    assert rejection is not None
    assert rejection.message == "gradient is 9 steps old, the limit is 4: pull and recompute"


@given(st.integers(0, 100), st.integers(0, 100), st.integers(0, 100) | st.none())
def test_an_asynchronous_contribution_is_taken_exactly_within_the_bound(step: int, lag: int, bound: int | None) -> None:
    standing = Standing(step=step + lag, has_contributed=False)
    policy = Asynchronous(max_staleness=bound)
    rejection = judge(header(base_step=step), Inspection(), standing=standing, rules=rules(policy))
    assert (rejection is None) == (bound is None or lag <= bound)


def judged_by_norm(norm: float, admission: Admission, norms: Sequence[float] = ()) -> str | None:
    inspection = Inspection()
    inspection.add(np.array([norm], np.float32))
    standing = Standing(step=0, has_contributed=False)
    rejection = judge(header(base_step=0), inspection, standing=standing, rules=rules(QUORUM, admission, norms))
    return rejection.reason if rejection else None


@pytest.mark.parametrize(("norm", "want"), [(2.0, None), (2.0001, "NORM_ABOVE_LIMIT")])
def test_a_norm_is_held_to_the_absolute_limit(norm: float, want: str | None) -> None:
    assert judged_by_norm(norm, Admission(max_norm=2)) == want


@pytest.mark.parametrize(
    ("norm", "norms", "want"),
    [
        # The median of 1..9 is 5, and of 1..8 it is 4.5.
        (15.0, range(1, 10), None),
        (15.1, range(1, 10), "NORM_OUTLIER"),
        (13.5, range(1, 9), None),
        (13.6, range(1, 9), "NORM_OUTLIER"),
        # Too few to judge by.
        (1e6, range(1, 8), None),
        # Of the last 64 alone: these have the median 100.
        (299.0, [1.0] * 100 + [100.0] * 64, None),
        # Beside zeros nothing stands out.
        (1e6, [0.0] * 20, None),
        # A few huge ones move a median but little.
        (31.0, [10.0] * 33 + [1e9] * 31, "NORM_OUTLIER"),
    ],
)
def test_an_outlier_is_far_above_the_median_of_the_last_norms(
    norm: float, norms: Sequence[float], want: str | None
) -> None:
    assert judged_by_norm(norm, Admission(outlier_factor=3), norms) == want


@pytest.mark.parametrize(("clock", "want"), [(0, None), (3, None), (4, "AHEAD_OF_BOUND")])
def test_a_worker_beyond_the_bound_has_to_pull_first(clock: int, want: str | None) -> None:
    standing = Standing(step=9, has_contributed=True, clock=clock, slowest_clock=1, bound=2)
    rejection = judge(header(base_step=0), Inspection(), standing=standing, rules=rules(BoundedStaleness(2)))
    assert (rejection.reason if rejection else None) == want


@pytest.mark.parametrize(
    "reason",
    [
        "STALE_GRADIENT",
        "ALREADY_CONTRIBUTED",
        "AHEAD_OF_BOUND",
        "COHORT_TOO_SMALL",
        "NON_FINITE_GRADIENT",
        "GRADIENT_TOO_LARGE",
        "NORM_ABOVE_LIMIT",
        "NORM_OUTLIER",
    ],
)
def test_every_reason_of_a_rejection_stands_in_the_catalogue(reason: str) -> None:
    assert reason in CATALOGUE
