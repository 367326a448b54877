"""Durability, checkpoints and their names on the wire."""

import pytest
from google.protobuf.duration_pb2 import Duration

import kedge
from kedge.errors import KedgeError
from kedge.v1 import run_pb2
from kedge.wire.names import check_checkpoint_id, parse_checkpoint
from kedge.wire.policies import checkpoints_from_wire, checkpoints_to_wire, durability_from_wire, durability_to_wire

EVERYTHING = kedge.Checkpoints(
    every_steps=100,
    every_seconds=1.5,
    keep_latest=3,
    keep_every_steps=1000,
    max_age_seconds=3600.0,
    keep_best=2,
    metric="accuracy",
    is_greater_better=True,
)


@pytest.mark.parametrize(
    ("durability", "number"),
    [
        (None, run_pb2.DURABILITY_UNSPECIFIED),
        ("memory", run_pb2.DURABILITY_MEMORY),
        ("checkpoint", run_pb2.DURABILITY_CHECKPOINT),
        ("journal", run_pb2.DURABILITY_JOURNAL),
        ("journal-sync", run_pb2.DURABILITY_JOURNAL_SYNC),
    ],
)
def test_durability_has_a_number(durability, number):
    assert durability_to_wire(durability) == number
    assert durability_from_wire(number) == durability


def test_number_of_no_durability_is_refused():
    with pytest.raises(KedgeError) as error:
        durability_from_wire(99)
    assert (error.value.reason, error.value.metadata) == ("INVALID_CONFIGURATION", {"field": "durability"})


@pytest.mark.parametrize("checkpoints", [kedge.Checkpoints(), EVERYTHING])
def test_checkpoints_come_back_as_they_were_given(checkpoints):
    assert checkpoints_from_wire(checkpoints_to_wire(checkpoints)) == checkpoints


def test_checkpoints_are_written_field_by_field():
    assert checkpoints_to_wire(EVERYTHING) == run_pb2.Checkpointing(
        every_steps=100,
        every=Duration(seconds=1, nanos=500_000_000),
        keep_latest=3,
        keep_every_steps=1000,
        max_age=Duration(seconds=3600),
        keep_best=2,
        metric="accuracy",
        is_greater_better=True,
    )


def test_what_is_not_set_has_its_default():
    assert checkpoints_from_wire(run_pb2.Checkpointing()) == kedge.Checkpoints()


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (run_pb2.Checkpointing(every_steps=0), "checkpointing.every_steps"),
        (run_pb2.Checkpointing(every_steps=1 << 32), "checkpointing.every_steps"),
        (run_pb2.Checkpointing(keep_every_steps=0), "checkpointing.keep_every_steps"),
        (run_pb2.Checkpointing(keep_latest=1), "checkpointing.keep_latest"),
        (run_pb2.Checkpointing(metric="x" * 65), "checkpointing.metric"),
        (run_pb2.Checkpointing(every=Duration()), "checkpointing.every_seconds"),
        (run_pb2.Checkpointing(max_age=Duration()), "checkpointing.max_age_seconds"),
        (run_pb2.Checkpointing(every=Duration(seconds=-1)), "every"),
    ],
)
def test_checkpoints_out_of_range_are_refused_with_the_field(message, field):
    with pytest.raises(KedgeError) as error:
        checkpoints_from_wire(message)
    assert (error.value.reason, error.value.metadata) == ("INVALID_CONFIGURATION", {"field": field})


def test_name_of_a_checkpoint_is_parsed():
    name = parse_checkpoint("runs/a.b_c/checkpoints/5-9")
    assert (name.run_id, name.checkpoint_id, name.run) == ("a.b_c", "5-9", "runs/a.b_c")
    assert str(name) == "runs/a.b_c/checkpoints/5-9"
    assert check_checkpoint_id("x" * 63) == "x" * 63


@pytest.mark.parametrize(
    "name",
    [
        "",
        "5-9",
        "runs/a",
        "runs//checkpoints/5",
        "runs/a/workers/5-9",
        "runs/a/checkpoints/",
        "runs/a/checkpoints/../b",
        "runs/a/checkpoints/5.9",
        "runs/a/checkpoints/5_9",
        "runs/a/checkpoints/-5",
        "runs/a/checkpoints/5-9/",
        "runs/a/checkpoints/5-9\n",
        "runs/a/checkpoints/" + "x" * 64,
    ],
)
def test_what_is_no_name_of_a_checkpoint_is_refused(name):
    with pytest.raises(KedgeError) as error:
        parse_checkpoint(name)
    assert error.value.reason == "INVALID_NAME"
