"""Policies as values: what cannot be one is refused where it is made."""

import math

import pytest

import kedge

WITH_SECONDS = {
    "timeout_seconds": lambda seconds: kedge.Synchronous(2, timeout_seconds=seconds),
    "quarantine_seconds": lambda seconds: kedge.Admission(quarantine_seconds=seconds),
}


@pytest.mark.parametrize("field", WITH_SECONDS)
@pytest.mark.parametrize("seconds", [1e-10, 9.99e-10, 5e-324])
def test_time_below_a_nanosecond_is_refused_with_its_value(field, seconds):
    with pytest.raises(ValueError, match=f"^{field} is {seconds!r}: that is less than a nanosecond"):
        WITH_SECONDS[field](seconds)


@pytest.mark.parametrize("field", WITH_SECONDS)
@pytest.mark.parametrize("seconds", [0, -1.0, -1e-10, math.nan, math.inf, 4e11])
def test_time_that_is_none_is_refused(field, seconds):
    with pytest.raises(ValueError, match=f"^{field} is {seconds!r}: it must be (None, or )?above 0"):
        WITH_SECONDS[field](seconds)


@pytest.mark.parametrize("field", WITH_SECONDS)
@pytest.mark.parametrize("seconds", [1e-9, 1, 3600.5])
def test_time_that_the_wire_can_say_is_taken(field, seconds):
    assert getattr(WITH_SECONDS[field](seconds), field) == seconds
