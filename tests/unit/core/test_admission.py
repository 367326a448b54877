"""What is refused before anything changes: errors of the protocol, and rejections that are answers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kedge.policies import Asynchronous, Policy, Synchronous
from kedge.wire.errors import CATALOGUE, KedgeError
from kedge_server.core.admission import Standing, check_header, judge
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


def judged(base_step: int, policy: Policy, *, has_contributed: bool = False, bad: int | None = None) -> str | None:
    """The reason of the rejection by a run at step 7, None where the contribution is taken."""
    standing = Standing(step=7, has_contributed=has_contributed)
    rejection = judge(header(base_step=base_step), standing=standing, policy=policy, non_finite_element=bad)
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
    rejection = judge(header(base_step=0), standing=standing, policy=policy, non_finite_element=element)
    assert rejection is not None
    assert rejection.reason == "NON_FINITE_GRADIENT"
    assert f"element {element} " in rejection.message


def test_a_stale_gradients_message_says_how_old_and_what_the_limit_is() -> None:
    standing = Standing(step=9, has_contributed=False)
    rejection = judge(
        header(base_step=0), standing=standing, policy=Asynchronous(max_staleness=4), non_finite_element=None
    )
    assert rejection is not None
    assert rejection.message == "gradient is 9 steps old, the limit is 4: pull and recompute"


@given(st.integers(0, 100), st.integers(0, 100), st.integers(0, 100) | st.none())
def test_an_asynchronous_contribution_is_taken_exactly_within_the_bound(step: int, lag: int, bound: int | None) -> None:
    standing = Standing(step=step + lag, has_contributed=False)
    rejection = judge(
        header(base_step=step), standing=standing, policy=Asynchronous(max_staleness=bound), non_finite_element=None
    )
    assert (rejection is None) == (bound is None or lag <= bound)


@pytest.mark.parametrize("reason", ["STALE_GRADIENT", "ALREADY_CONTRIBUTED", "NON_FINITE_GRADIENT"])
def test_every_reason_of_a_rejection_stands_in_the_catalogue(reason: str) -> None:
    assert reason in CATALOGUE
