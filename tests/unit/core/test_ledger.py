"""The ledger: what makes a repeated push harmless."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kedge.wire.errors import CATALOGUE, KedgeError
from kedge_server.core.ledger import WINDOW, Ledger


def filled(count: int, window: int = WINDOW) -> Ledger[str]:
    """A ledger of sequences 1 to count, each with an entry of its own."""
    ledger: Ledger[str] = Ledger(window)
    for sequence in range(1, count + 1):
        ledger.record(sequence, f"result {sequence}")
    return ledger


def reason_of(ledger: Ledger[str], sequence: int) -> tuple[str, dict[str, str]]:
    with pytest.raises(KedgeError) as caught:
        ledger.find(sequence)
    return caught.value.reason, caught.value.metadata


def test_an_empty_ledger_takes_sequence_1_only() -> None:
    ledger = filled(0)
    assert ledger.last_sequence == 0
    assert ledger.find(1) is None
    for sequence in (-1, 0, 2, 100):
        assert reason_of(ledger, sequence) == ("SEQUENCE_GAP", {"expected": "1", "got": str(sequence)})


def test_a_repeated_sequence_finds_the_entry_that_was_recorded() -> None:
    ledger = filled(3)
    assert [ledger.find(sequence) for sequence in (1, 2, 3)] == ["result 1", "result 2", "result 3"]


def test_looking_changes_nothing() -> None:
    ledger = filled(3)
    for _ in range(5):
        assert ledger.find(4) is None
    assert ledger.last_sequence == 3
    assert reason_of(ledger, 5)[0] == "SEQUENCE_GAP"


def test_what_fell_out_of_the_window_is_an_error_and_is_not_new() -> None:
    ledger = filled(5, window=2)
    assert ledger.find(4) == "result 4"
    assert reason_of(ledger, 3) == ("SEQUENCE_FORGOTTEN", {"got": "3", "oldest": "4"})
    assert reason_of(ledger, 1) == ("SEQUENCE_FORGOTTEN", {"got": "1", "oldest": "4"})


@pytest.mark.parametrize("sequence", [-3, 0, 7, 1000])
def test_a_sequence_that_is_neither_known_nor_next_is_a_gap(sequence: int) -> None:
    assert reason_of(filled(5, window=2), sequence) == ("SEQUENCE_GAP", {"expected": "6", "got": str(sequence)})


@pytest.mark.parametrize("sequence", [1, 2, 3])
def test_nothing_is_recorded_twice(sequence: int) -> None:
    ledger = filled(3)
    with pytest.raises(AssertionError):
        ledger.record(sequence, "again")
    assert ledger.find(sequence) == f"result {sequence}"


@pytest.mark.parametrize("sequence", [5, 0, -1])
def test_what_is_not_the_next_sequence_is_not_recorded(sequence: int) -> None:
    ledger = filled(3)
    with pytest.raises(KedgeError, match="4 is next"):
        ledger.record(sequence, "ahead")
    assert ledger.entries() == filled(3).entries()


@pytest.mark.parametrize("reason", ["SEQUENCE_GAP", "SEQUENCE_FORGOTTEN"])
def test_the_errors_metadata_is_that_of_the_catalogue(reason: str) -> None:
    sequence = {"SEQUENCE_GAP": 9, "SEQUENCE_FORGOTTEN": 1}[reason]
    found, metadata = reason_of(filled(5, window=2), sequence)
    assert found == reason
    assert set(metadata) == set(CATALOGUE[reason].metadata)


@given(
    st.integers(1, 8),
    st.lists(st.integers(-2, 4), max_size=80),
)
def test_within_the_window_nothing_is_forgotten_and_no_gap_is_ever_taken(window: int, jumps: list[int]) -> None:
    """A worker that sends any sequences around its next one: repeated, skipped, very old, from before the first."""
    ledger: Ledger[str] = Ledger(window)
    truth: dict[int, str] = {}
    for turn, jump in enumerate(jumps):
        sequence = len(truth) + jump
        answer = outcome(ledger, sequence)
        assert answer == expected_outcome(truth, window, sequence)
        if answer is None:
            truth[sequence] = f"turn {turn}"
            ledger.record(sequence, truth[sequence])
        assert ledger.last_sequence == len(truth)
        assert_window_is_kept(ledger, truth, window)


def outcome(ledger: Ledger[str], sequence: int) -> str | None:
    try:
        return ledger.find(sequence)
    except KedgeError as error:
        return error.reason


def expected_outcome(truth: dict[int, str], window: int, sequence: int) -> str | None:
    """What a ledger that forgets nothing would answer, where the window has not passed."""
    last = len(truth)
    if sequence == last + 1:
        return None
    if sequence in truth:
        return truth[sequence] if sequence > last - window else "SEQUENCE_FORGOTTEN"
    return "SEQUENCE_GAP"


def assert_window_is_kept(ledger: Ledger[str], truth: dict[int, str], window: int) -> None:
    for sequence in range(max(1, len(truth) - window + 1), len(truth) + 1):
        assert ledger.find(sequence) == truth[sequence]


# Read back


def test_what_is_passed_over_is_a_hole_and_may_still_come_but_once() -> None:
    ledger = filled(2)
    ledger.restore(5, "result 5")
    assert (ledger.holes, ledger.last_sequence) == ((3, 4), 5)
    assert [ledger.find(sequence) for sequence in (3, 4, 5, 6)] == [None, None, "result 5", None]
    ledger.record(3, "late")
    assert (ledger.holes, ledger.last_sequence, ledger.find(3)) == ((4,), 5, "late")
    with pytest.raises(AssertionError):
        ledger.record(3, "again")
    assert reason_of(ledger, 7)[0] == "SEQUENCE_GAP"


def test_what_was_written_late_fills_its_hole() -> None:
    ledger = filled(1)
    ledger.restore(3, "rejected at once")
    ledger.restore(2, "part of a later step")
    assert (ledger.holes, ledger.last_sequence) == ((), 3)
    assert ledger.entries() == ((1, "result 1"), (2, "part of a later step"), (3, "rejected at once"))


def test_what_is_written_again_replaces_what_was_there() -> None:
    ledger = filled(2)
    ledger.restore(2, "decided")
    assert ledger.entries() == ((1, "result 1"), (2, "decided"))


def test_hole_that_the_window_has_passed_is_forgotten_and_not_new() -> None:
    ledger = filled(1, window=3)
    ledger.restore(3, "result 3")
    assert ledger.holes == (2,)
    ledger.record(4, "result 4")
    assert ledger.holes == (2,)
    ledger.record(5, "result 5")
    assert ledger.holes == ()
    assert reason_of(ledger, 2) == ("SEQUENCE_FORGOTTEN", {"got": "2", "oldest": "3"})


def test_ledger_of_another_ones_state_answers_alike() -> None:
    ledger = filled(6, window=4)
    ledger.restore(9, "result 9")
    again: Ledger[str] = Ledger(4)
    for sequence, entry in ledger.entries():
        again.restore(sequence, entry)
    again.resume(ledger.last_sequence, ledger.holes)
    assert (again.entries(), again.holes, again.last_sequence) == (ledger.entries(), ledger.holes, 9)
    assert [outcome(again, n) for n in range(-1, 12)] == [outcome(ledger, n) for n in range(-1, 12)]


def test_entries_can_be_replaced_by_what_is_made_of_them() -> None:
    ledger = filled(3)
    ledger.replace_entries(str.upper)
    assert ledger.entries() == ((1, "RESULT 1"), (2, "RESULT 2"), (3, "RESULT 3"))


@given(st.integers(1, 6), st.lists(st.tuples(st.booleans(), st.integers(1, 4)), max_size=60))
def test_whatever_is_passed_over_nothing_beyond_the_window_is_kept(window: int, turns: list[tuple[bool, int]]) -> None:
    """Later ones are written first, and what they passed over comes afterwards, or never."""
    ledger: Ledger[str] = Ledger(window)
    truth: dict[int, str] = {}
    for is_late, jump in turns:
        last = max(truth, default=0)
        sequence = last - jump if is_late else last + jump
        if sequence < 1:
            continue
        truth[sequence] = f"of {sequence}"
        ledger.restore(sequence, truth[sequence])
        last = max(truth)
        kept = range(max(1, last - window + 1), last + 1)
        assert ledger.last_sequence == last
        assert dict(ledger.entries()) == {n: truth[n] for n in kept if n in truth}
        assert ledger.holes == tuple(n for n in kept if n not in truth)
