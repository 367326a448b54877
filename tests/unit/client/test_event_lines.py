"""Events as lines, as `kedge watch` prints them."""

import json
import math
from datetime import UTC, datetime

import pytest

import kedge
from kedge.cli.plain import event_fields
from kedge.cli.watch import event_line

ALICE = "runs/r/workers/alice"


def event(kind, **fields):
    return kedge.Event(number=7, time=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC), kind=kind, step=9, **fields)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (event("step", contribution_count=1), "made of 1 contribution"),
        (
            event("step", contribution_count=4, loss=1 / 3, reason="QUORUM_REACHED"),
            "made of 4 contributions, loss 0.333333 [QUORUM_REACHED]",
        ),
        (event("lookahead_sync"), "lookahead sync"),
        (event("joined", worker=ALICE, epoch=3), "alice joined"),
        (event("left", worker=ALICE, epoch=3), "alice left"),
        (event("evicted", worker=ALICE, reason="LEASE_EXPIRED"), "alice evicted [LEASE_EXPIRED]"),
        (
            event("rejected", worker=ALICE, reason="NORM_OUTLIER", message="too\nlarge"),
            "alice: a gradient was rejected: too large [NORM_OUTLIER]",
        ),
        (event("aggregation_changed", aggregation=kedge.Buffered(3)), "aggregation is now Buffered(size=3)"),
        (event("waiting", message="2 more workers to join"), "waiting: 2 more workers to join"),
        (event("checkpoint", checkpoint="runs/r/checkpoints/9-12"), "checkpoint 9-12"),
        (event("recovered", message="from the journal"), "recovered: from the journal"),
        (event("restored", checkpoint="runs/r/checkpoints/9-12"), "restored from checkpoint 9-12"),
        (event("summary", skipped_counts={"step": 5, "joined": 1}), "6 events left out: 1 joined, 5 step"),
    ],
    ids=lambda value: getattr(value, "kind", None),
)
def test_event_is_one_line(given, expected):
    assert event_line(given).split("  ", 1)[1] == f"step 9  {expected}"


def test_fields_of_an_event_are_json():
    given = event("aggregation_changed", loss=math.nan, aggregation=kedge.BoundedStaleness(2))
    assert json.loads(json.dumps(event_fields(given), allow_nan=False)) == {
        "number": 7,
        "time": "2026-01-02T03:04:05+00:00",
        "kind": "aggregation_changed",
        "step": 9,
        "worker": "",
        "epoch": 0,
        "reason": "",
        "message": "",
        "contribution_count": 0,
        "loss": None,
        "aggregation": {"type": "BoundedStaleness", "bound": 2},
        "skipped_counts": {},
        "checkpoint": "",
    }
