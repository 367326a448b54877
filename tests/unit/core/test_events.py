"""The log of events: where a reader begins, and what it is told of what it cannot see any more."""

import pytest

from kedge_server.core.events import Event, EventKind, EventLog


def log_of(*kinds: EventKind, kept: int = 100, log: EventLog | None = None) -> EventLog:
    """Each "step" raises the step of its own event and of those that follow."""
    log = EventLog(kept) if log is None else log
    step = log.kept_from(log.last_number, 1)[0].step if log.last_number else 0
    for kind in kinds:
        step += kind == "step"
        log.record(Event(log.last_number + 1, float(log.last_number + 1), kind, step))
    return log


def numbers(events: list[Event]) -> list[int]:
    return [event.number for event in events]


def test_a_reader_gets_what_happens_from_now_on_in_order() -> None:
    log = log_of("joined", "step")
    reader = log.read_from_now()
    assert reader.take(10) == []
    log_of("step", "left", "joined", log=log)
    assert [event.kind for event in reader.take(2)] == ["step", "left"]
    assert [event.kind for event in reader.take(2)] == ["joined"]
    assert reader.take(2) == []


@pytest.mark.parametrize(
    ("after", "want"),
    [(0, [1, 2, 3, 4]), (1, [2, 3, 4]), (3, [4]), (4, [])],
)
def test_a_reader_after_a_number_gets_those_with_greater_ones(after: int, want: list[int]) -> None:
    assert numbers(log_of("joined", "step", "step", "left").read_after(after).take(10)) == want


@pytest.mark.parametrize(
    ("step", "want"),
    [
        (0, [1, 2, 3, 4, 5, 6]),
        (1, [2, 3, 4, 5, 6]),  # what happens at a step is of that step: 3, too
        (2, [4, 5, 6]),
        (3, [6]),
        (4, []),
        (99, []),
    ],
)
def test_a_reader_from_a_step_gets_the_events_of_that_step_and_later(step: int, want: list[int]) -> None:
    log = log_of("joined", "step", "rejected", "step", "lookahead_sync", "step")
    assert numbers(log.read_from_step(step).take(10)) == want


def test_a_reader_from_a_step_to_come_does_not_get_what_happens_before_it() -> None:
    """Only those that are told after its beginning: a run's step is known then, and may still be lower."""
    log = log_of("joined", "step")
    reader = log.read_from_step(2)
    log_of("step", log=log)
    assert [(event.kind, event.step) for event in reader.take(10)] == [("step", 2)]


def test_what_is_no_longer_kept_is_summed_up_by_kind_and_then_the_rest_follows() -> None:
    log = log_of("joined", "step", "step", "rejected", "step", "left", kept=2)
    summary, *rest = log.read_from_step(0).take(10)
    assert (summary.kind, summary.number) == ("summary", 4)
    assert dict(summary.skipped_counts) == {"joined": 1, "step": 2, "rejected": 1}
    assert summary.message == "4 events were left out"
    assert [(event.number, event.kind) for event in rest] == [(5, "step"), (6, "left")]
    assert [event.step for event in (summary, *rest)] == [3, 3, 3], "the step of an event never falls"


def test_a_reader_that_falls_behind_is_told_only_of_what_it_has_not_seen() -> None:
    log = log_of("joined", "step", "step", kept=3)
    reader = log.read_after(0)
    assert numbers(reader.take(2)) == [1, 2]
    log_of("rejected", "step", "step", "left", log=log)  # kept: 5, 6, 7
    summary, *rest = reader.take(10)
    assert summary.number == 4
    assert dict(summary.skipped_counts) == {"step": 1, "rejected": 1}
    assert numbers(rest) == [5, 6, 7]


def test_a_reader_can_fall_behind_again_and_again() -> None:
    log, seen = log_of("joined", kept=1), 0
    reader = log.read_after(0)
    for _ in range(4):
        log_of("step", "step", "rejected", log=log)
        summary, last = reader.take(10)
        assert sum(summary.skipped_counts.values()) == summary.number - seen
        assert (last.kind, last.number) == ("rejected", summary.number + 1)
        seen = last.number
    assert dict(summary.skipped_counts) == {"step": 2}, "the rejected one before it was seen"


def test_a_reader_that_falls_behind_after_its_beginning_in_the_middle_counts_from_there() -> None:
    log = log_of("joined", "joined", "step", kept=3)
    reader = log.read_after(2)
    log_of("step", "step", "step", "step", log=log)  # kept: 5, 6, 7
    assert dict(reader.take(10)[0].skipped_counts) == {"step": 2}


def test_after_a_number_that_is_no_longer_kept_the_count_is_known_but_not_the_kinds() -> None:
    log = log_of("joined", "step", "step", "rejected", "step", "left", kept=2)
    summary, *rest = log.read_after(1).take(10)
    assert (summary.number, dict(summary.skipped_counts)) == (4, {"unspecified": 3})
    assert numbers(rest) == [5, 6]


def test_from_a_step_that_is_no_longer_kept_the_summary_counts_all_that_are_gone() -> None:
    log = log_of("joined", "step", "step", "rejected", "step", "left", kept=2)
    summary, *rest = log.read_from_step(2).take(10)
    assert (summary.number, dict(summary.skipped_counts)) == (4, {"joined": 1, "step": 2, "rejected": 1})
    assert numbers(rest) == [5, 6]


def test_from_a_step_of_which_everything_is_kept_there_is_no_summary() -> None:
    log = log_of("joined", "step", "step", "rejected", "step", "left", kept=2)
    assert numbers(log.read_from_step(3).take(10)) == [5, 6]


def test_a_summary_counts_towards_what_is_taken_at_once() -> None:
    reader = log_of(*["step"] * 9, kept=4).read_after(0)
    assert [event.kind for event in reader.take(2)] == ["summary", "step"]
    assert numbers(reader.take(2)) == [7, 8]


def test_a_gap_in_the_numbers_is_a_defect() -> None:
    with pytest.raises(AssertionError, match="without a gap"):
        EventLog(4).record(Event(2, 0.0, "step", 1))


def test_nothing_grows_with_what_is_gone() -> None:
    log = log_of(*["step"] * 1000, kept=4)
    reader = log.read_after(0)
    assert len(log.kept_from(log.first_number, 10_000)) == 4
    assert [event.number for event in reader.take(10_000)] == [996, 997, 998, 999, 1000]
