"""Every decoder, fed with bytes that nobody meant: it refuses them as documented, at once, and keeps nothing."""

import tracemalloc
import zlib
from pathlib import Path

import pytest

from .decoder import Decoder
from .decoders import DEEP, decoders
from .figures import INPUTS, MAX_GROWTH_BYTES, MAX_SECONDS, SEED, Figures, measured
from .mutations import Mutator

_TRACED_INPUTS = 200
_ALLOCATION_BYTES = 1 << 20
_ALLOCATION_FACTOR = 200

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(params=decoders(Path()))
def decoder(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Decoder]:
    return request.param, decoders(tmp_path)[request.param]


def feed(decoder: Decoder, raw: bytes, figures: Figures) -> None:
    """One input: it is accepted, or refused as is documented."""
    try:
        with figures.one(raw):
            decoder.read(raw)
            figures.accepted_count += 1
    except decoder.refusals:
        pass
    except Exception as error:
        raise AssertionError(f"{raw[:300]!r} was met with {error!r}") from error


def test_decoder_refuses_what_is_wrong_and_takes_what_is_right(decoder: tuple[str, Decoder]) -> None:
    name, reader = decoder
    mutator = Mutator(SEED ^ zlib.crc32(name.encode()), reader.corpus, reader.message_type)
    accepted = Figures(name)
    for raw in reader.corpus:
        feed(reader, raw, accepted)
    assert accepted.accepted_count or name in NEVER_ACCEPTED, "the corpus has nothing valid"
    for raw in DEEP:
        feed(reader, raw, accepted)
    for _ in range(min(INPUTS, _TRACED_INPUTS)):  # until caches are warm
        feed(reader, mutator.next(), accepted)
    with measured(name) as figures:
        for _ in range(INPUTS):
            feed(reader, mutator.next(), figures)
    assert figures.slowest_seconds < MAX_SECONDS, figures.slowest
    assert figures.growth_bytes < MAX_GROWTH_BYTES


NEVER_ACCEPTED = frozenset({"answer status", "flat range"})
"""The first is an error whatever it says; the other's trailer does not fit."""


def test_decoder_takes_no_memory_that_its_input_does_not_justify(decoder: tuple[str, Decoder]) -> None:
    name, reader = decoder
    mutator = Mutator(SEED ^ zlib.crc32(name.encode()) + 1, reader.corpus, reader.message_type)
    figures = Figures(name)
    tracemalloc.start()
    try:
        for _ in range(_TRACED_INPUTS):
            raw = mutator.next()
            tracemalloc.reset_peak()
            before, _ = tracemalloc.get_traced_memory()
            feed(reader, raw, figures)
            _, peak = tracemalloc.get_traced_memory()
            assert peak - before < _ALLOCATION_BYTES + _ALLOCATION_FACTOR * len(raw), raw
    finally:
        tracemalloc.stop()
