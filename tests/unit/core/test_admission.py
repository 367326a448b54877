"""What is refused before anything changes: errors of the protocol, and rejections that are answers."""

import math
from collections.abc import Mapping, Sequence

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


Norms = Mapping[str, Sequence[float]]
"""What workers have sent."""


def sent(norms: Norms) -> NormHistory:
    history = NormHistory()
    for worker, of_worker in norms.items():
        for norm in of_worker:
            history.add(worker, norm, is_outlier=False)
    return history


def rules(policy: Policy, admission: Admission | None = None, norms: Norms | None = None) -> Rules:
    return Rules(policy, admission or Admission(), sent(norms or {}))


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


def judged_by_norm(norm: float, admission: Admission, norms: Norms | None = None) -> str | None:
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
        (15.0, {"a": range(1, 10)}, None),
        (15.1, {"a": range(1, 10)}, "NORM_OUTLIER"),
        (13.5, {"a": range(1, 9)}, None),
        (13.6, {"a": range(1, 9)}, "NORM_OUTLIER"),
        # Too few to judge by; the norms of all workers together are enough.
        (1e6, {"a": range(1, 8)}, None),
        (1e6, {"a": range(1, 5), "b": range(1, 5)}, "NORM_OUTLIER"),
        # Of the last 16 alone: these have the median 100.
        (299.0, {"a": [1.0] * 100 + [100.0] * 16}, None),
        (301.0, {"a": [1.0] * 100 + [100.0] * 16}, "NORM_OUTLIER"),
        # Zeros and infinities say nothing.
        (1e6, {"a": [0.0, math.inf, math.nan] * 20}, None),
        (3.1, {"a": [1.0] * 8 + [0.0, math.inf, math.nan] * 20}, "NORM_OUTLIER"),
        # A few huge ones move a median but little.
        (31.0, {"a": [10.0] * 9 + [1e9] * 7}, "NORM_OUTLIER"),
        # One vote a worker: the medians are 1, 1 and 1e9, or 2, 4 and 100, or 1 and 5.
        (3.1, {"a": [1.0], "b": [1.0], "c": [1e9] * 16}, "NORM_OUTLIER"),
        (12.0, {"a": [1.0, 2.0, 3.0], "b": [4.0] * 9, "c": [100.0]}, None),
        (12.1, {"a": [1.0, 2.0, 3.0], "b": [4.0] * 9, "c": [100.0]}, "NORM_OUTLIER"),
        (9.0, {"a": [1.0] * 4, "b": [5.0] * 4}, None),
        (9.1, {"a": [1.0] * 4, "b": [5.0] * 4}, "NORM_OUTLIER"),
        # Nothing is far above it if it is zero.
        (0.0, {"a": [1.0] * 16}, None),
    ],
)
def test_an_outlier_is_far_above_the_median_of_what_each_worker_sent_last(
    norm: float, norms: Norms, want: str | None
) -> None:
    assert judged_by_norm(norm, Admission(outlier_factor=3), norms) == want


def test_worker_that_has_gone_has_no_vote() -> None:
    history = sent({"a": [1.0] * 8, "b": [10.0] * 8})
    assert history.limit(2.0) == 2 * 5.5
    history.forget("a")
    history.forget("nobody")
    assert history.limit(2.0) == 2 * 10
    history.forget("b")
    assert history.limit(2.0) == math.inf


@pytest.mark.parametrize(
    ("last", "want"),
    [("", False), ("-", False), ("o", True), ("o-", False), ("oo-", True), ("oo--", False), ("ooo--", True)],
)
def test_run_has_changed_where_most_workers_sent_an_outlier_last(last: str, want: bool) -> None:
    history = NormHistory()
    for number, sign in enumerate(last):
        history.add(f"w{number}", 1.0, is_outlier=sign != "o")
        history.add(f"w{number}", 1.0, is_outlier=sign == "o")
    assert history.most_are_outliers == want


def test_worker_that_has_gone_is_none_of_the_most() -> None:
    history = NormHistory()
    for worker, is_outlier in (("a", True), ("b", True), ("c", False)):
        history.add(worker, 1.0, is_outlier=is_outlier)
    history.forget("a")
    assert not history.most_are_outliers
    history.forget("c")
    assert history.most_are_outliers


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
