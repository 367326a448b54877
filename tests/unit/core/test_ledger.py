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


@pytest.mark.parametrize("sequence", [1, 3, 5, 0, -1])
def test_only_the_next_sequence_can_be_recorded(sequence: int) -> None:
    with pytest.raises(AssertionError):
        filled(3).record(sequence, "again")


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
