"""Answers to requests that may be repeated."""

import pytest

from kedge_server.core.answers import Answers


def test_repeated_request_gets_its_first_answer_and_is_done_once() -> None:
    answers: Answers[int] = Answers()
    made = iter([1, 2, 3])
    assert [answers.answer(request, lambda: next(made)) for request in ("x", "y", "x", "y")] == [1, 2, 1, 2]


def test_request_without_an_id_is_never_a_repetition() -> None:
    answers: Answers[int] = Answers()
    made = iter([1, 2])
    assert [answers.answer("", lambda: next(made)) for _ in range(2)] == [1, 2]
    assert answers.state() == ()


def test_what_fails_is_not_answered() -> None:
    answers: Answers[int] = Answers()
    with pytest.raises(ZeroDivisionError):
        answers.answer("x", lambda: 1 // 0)
    assert answers.answer("x", lambda: 7) == 7


def test_last_64_are_remembered_and_taken_up_again_oldest_first() -> None:
    answers: Answers[int] = Answers()
    for number in range(70):
        answers.remember(f"request {number}", number)
    again = Answers(answers.state())
    assert [again.find(f"request {number}") for number in (5, 6, 69)] == [None, 6, 69]
    again.remember("one more", 70)
    assert [again.find(f"request {number}") for number in (6, 7)] == [None, 7]
