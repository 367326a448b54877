"""Compressed gradients: what is sent, what is kept, and that both together are the gradients.

The oracle is `plain_records`, which reads bytes by the .proto file alone, in fractions.
"""

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import plain_records
import pytest
from faulty_transport import FaultyTransport, gone
from hypothesis import given, settings
from hypothesis import strategies as st

import kedge
from kedge import compression, optim, testing
from kedge.client import Client
from kedge.compression import ErrorFeedback, TopK, encoding_of
from kedge.errors import KedgeError
from kedge.retry import Retrier
from kedge.transport import in_process

WIRE_DTYPES = ["int8", "sign", TopK(0.1)]
EXACT = ["int8", TopK(0.1)]
HALF_A_UNIT = Fraction(1, 1 << 24)

# Values of very different sizes side by side, zeros of both signs and subnormals; sums stay within float32.
values = st.one_of(
    st.floats(-(2.0**100), 2.0**100, width=32),
    st.floats(-1, 1, width=32),
    st.integers(-300, 300).map(float),
    st.sampled_from([0.0, -0.0, 2.0**-149, -(2.0**-126)]),
)


@st.composite
def gradients(draw: st.DrawFn, *, count: int = 1) -> list[list[np.ndarray]]:
    """Gradients of one set of shapes, whose records end anywhere in a tensor. Long ones repeat what was drawn."""
    sizes = draw(st.lists(st.sampled_from([0, 1, 7, 8, 9, 64, 1000, 1024, 1030]), min_size=1, max_size=4))
    sizes = sizes if sum(sizes) else [1]
    return [
        [np.resize(np.array(draw(st.lists(values, min_size=1, max_size=12)), np.float32), size) for size in sizes]
        for _ in range(count)
    ]


def encode(encoding: Any, gradient: Sequence[np.ndarray]) -> bytes:
    (records,) = encoding.encode(gradient)
    return bytes(records)


def read(encoding: Any, records: bytes) -> list[Fraction]:
    return plain_records.read(records, encoding.dtype, encoding.residual.size)


def fractions(array: np.ndarray) -> list[Fraction]:
    return [Fraction(float(value)) for value in array]


def joined(gradient: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(gradient)


def feedback(wire_dtype: str | TopK) -> ErrorFeedback:
    encoding = encoding_of(wire_dtype, None)
    assert isinstance(encoding, ErrorFeedback)
    return encoding


def send(encoding: ErrorFeedback, gradient: Sequence[np.ndarray], *, is_taken: bool = True) -> list[Fraction]:
    sent = read(encoding, encode(encoding, gradient))
    encoding.settle(is_taken=is_taken)
    return sent


@given(gradients(count=2))
@pytest.mark.parametrize("wire_dtype", EXACT, ids=str)
@settings(deadline=None, max_examples=40)
def test_what_is_sent_and_what_is_kept_are_the_gradient_and_what_was_kept_to_the_bit(wire_dtype, pushed):
    encoding = feedback(wire_dtype)
    before = np.zeros(joined(pushed[0]).size, np.float32)
    for gradient in pushed:
        sent = send(encoding, gradient)
        total = fractions(joined(gradient) + before)
        assert [s + r for s, r in zip(sent, fractions(encoding.residual), strict=True)] == total
        before = encoding.residual.copy()


@given(gradients(count=4))
@pytest.mark.parametrize("wire_dtype", WIRE_DTYPES, ids=str)
@settings(deadline=None, max_examples=10)
def test_what_was_sent_adds_up_to_the_gradients_but_for_what_is_kept_and_roundings(wire_dtype, pushed):
    encoding = feedback(wire_dtype)
    size = joined(pushed[0]).size
    raw, sent, slack = ([Fraction(0)] * size for _ in range(3))
    before = np.zeros(size, np.float32)
    for gradient in pushed:
        sums = [abs(g) + abs(e) for g, e in zip(fractions(joined(gradient)), fractions(before), strict=True)]
        sent = [a + b for a, b in zip(sent, send(encoding, gradient), strict=True)]
        raw = [a + b for a, b in zip(raw, fractions(joined(gradient)), strict=True)]
        kept = fractions(abs(encoding.residual))
        rounded = [s + (k if wire_dtype == "sign" else 0) for s, k in zip(sums, kept, strict=True)]
        slack = [a + HALF_A_UNIT * b + Fraction(1, 1 << 149) for a, b in zip(slack, rounded, strict=True)]
        before = encoding.residual.copy()
    for r, s, e, bound in zip(raw, sent, fractions(encoding.residual), slack, strict=True):
        assert abs(s + e - r) <= bound


@given(st.lists(st.lists(st.integers(-2000, 2000), min_size=40, max_size=40), min_size=1, max_size=12))
@settings(deadline=None, max_examples=30)
def test_top_k_of_whole_numbers_adds_up_exactly_over_many_steps(pushed):
    encoding = feedback(TopK(0.1))
    sent = np.zeros(40, np.int64)
    for gradient in pushed:
        sent += np.array(send(encoding, [np.array(gradient, np.float32)])).astype(np.int64)
    assert (sent + encoding.residual.astype(np.int64)).tolist() == np.sum(pushed, axis=0).tolist()


@given(gradients())
@settings(deadline=None, max_examples=40)
def test_int8_is_off_by_half_a_step_of_its_record_at_most(pushed):
    (gradient,) = pushed
    flat = joined(gradient)
    encoding = feedback("int8")
    send(encoding, gradient)
    for begin in range(0, flat.size, 1024):
        record = slice(begin, begin + 1024)
        step = np.abs(flat[record]).max() / 127.0
        assert np.abs(encoding.residual[record]).max() <= step * (0.5 + 2.0**-15) + 128 * 2.0**-149


@given(gradients())
@settings(deadline=None, max_examples=20)
def test_sign_sends_the_mean_magnitude_of_its_record(pushed):
    (gradient,) = pushed
    flat = joined(gradient).astype(np.float64)
    encoding = feedback("sign")
    sent = send(encoding, gradient)
    for begin in range(0, flat.size, 1024):
        mean = np.abs(flat[begin : begin + 1024]).mean()
        for value, got in zip(flat[begin : begin + 1024], sent[begin : begin + 1024], strict=True):
            assert float(got) == pytest.approx(-mean if value < 0 else mean, rel=2.0**-20, abs=2.0**-148)


@pytest.mark.parametrize(("size", "fraction", "count"), [(1000, 0.1, 100), (1000, 1e-6, 1), (7, 0.5, 4), (9, 1.0, 9)])
def test_top_k_sends_as_many_as_it_is_told_and_none_that_is_greater_is_left(size, fraction, count):
    gradient = np.random.default_rng(size).permutation(np.arange(1, size + 1)).astype(np.float32)
    gradient[::2] *= -1
    encoding = feedback(TopK(fraction))
    sent = np.array(send(encoding, [gradient]), float)
    assert np.count_nonzero(sent) == count
    assert set(np.flatnonzero(sent)) == set(np.argsort(-np.abs(gradient))[:count])


def test_top_k_takes_the_first_of_those_that_are_equally_great():
    encoding = feedback(TopK(0.5))
    assert send(encoding, [np.array([1, -2, 2, 2, -2, 0.5], np.float32)]) == [0, -2, 2, 2, 0, 0]


def test_top_k_sends_no_zeros():
    encoding = feedback(TopK(1.0))
    assert encode(encoding, [np.array([0, 3, -0.0, 0], np.float32)]) == bytes([1, 0, 0, 0, 0, 0, 0x40, 0x40])
    assert encode(encoding, [np.zeros(4, np.float32)]) == b""


@pytest.mark.parametrize("make", ["ascending", "blocks", "few"])
@pytest.mark.parametrize("fraction", [0.001, 0.01, 0.3])
def test_top_k_of_a_large_gradient_is_that_of_sorting_it_whatever_a_sample_says(make, fraction):
    size = 300_000  # of which a sample is looked at first
    random = np.random.default_rng(3)
    gradient = np.abs(random.normal(size=size)).astype(np.float32)
    if make == "ascending":
        gradient.sort()
    elif make == "blocks":
        gradient[::5] *= 1e6  # a sample by the stride for this size sees nothing else
    else:
        gradient[random.random(size) < 0.9995] = 0
    encoding = feedback(TopK(fraction))
    (records,) = encoding.encode([gradient])
    sent = records.view([("index", "<u4"), ("value", "<f4")])
    want = np.sort(np.argsort(-gradient, kind="stable")[: round(fraction * size)])
    want = want[gradient[want] > 0]
    assert sent["index"].tolist() == want.tolist()
    assert sent["value"].tolist() == gradient[want].tolist()


@pytest.mark.parametrize("wire_dtype", WIRE_DTYPES, ids=str)
def test_what_is_left_out_keeps_growing_until_it_is_sent(wire_dtype):
    gradient = np.full(100, 0.001, np.float32)
    gradient[0] = 1.0
    encoding = feedback(wire_dtype)
    totals = sum(np.array(send(encoding, [gradient]), float) for _ in range(1000))
    np.testing.assert_allclose(totals / 1000, gradient, atol=0.1 if wire_dtype == "sign" else 0.002)


@pytest.mark.parametrize("wire_dtype", WIRE_DTYPES, ids=str)
def test_gradient_that_is_left_out_leaves_what_was_kept_as_it_was(wire_dtype):
    random = np.random.default_rng(0)
    first, second = random.normal(size=(2, 3000)).astype(np.float32)
    encoding = feedback(wire_dtype)
    send(encoding, [first])
    kept = encoding.residual.copy()
    records = encode(encoding, [second])
    encoding.settle(is_taken=False)
    assert encoding.residual.tobytes() == kept.tobytes()
    assert encode(encoding, [second]) == records
    assert encode(encoding, [second]) == records, "what is never settled counts as left out"


@pytest.mark.parametrize("is_taken", [True, False])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("size", [5, 5000])
@pytest.mark.parametrize("wire_dtype", WIRE_DTYPES, ids=str)
def test_gradient_that_is_not_finite_says_so_and_leaves_what_was_kept_as_it_was(wire_dtype, size, value, is_taken):
    gradient = np.random.default_rng(0).normal(size=size).astype(np.float32)
    encoding = feedback(wire_dtype)
    send(encoding, [gradient])
    kept = encoding.residual.copy()
    gradient[-2] = value
    records = encode(encoding, [gradient])
    encoding.settle(is_taken=is_taken)
    assert encoding.residual.tobytes() == kept.tobytes()
    # A scale of the last record, or the value of the last element sent: infinite or NaN, whose exponent is all ones.
    if encoding.dtype == "top_k":
        last = records[-4:]
    else:
        rest = (size - 1) % 1024 + 1
        last = records[-(4 + (rest if encoding.dtype == "int8" else -(-rest // 8))) :][:4]
    assert not np.isfinite(np.frombuffer(last, "<f4")[0])


def test_values_too_great_for_int8_are_sent_as_they_are_not():
    encoding = feedback("int8")
    encode(encoding, [np.array([np.finfo(np.float32).max], np.float32)])
    encoding.settle(is_taken=True)
    assert encoding.residual.tolist() == [0]


def test_signs_of_great_values_are_sent_once():
    encoding = feedback("sign")
    send(encoding, [np.array([1.0, 3.0], np.float32)])
    assert encoding.residual.tolist() == [-1, 1]
    assert send(encoding, [np.full(2, 2.0**125, np.float32)]) == [2**125] * 2
    assert encoding.residual.tolist() == [0, 0]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("wire_dtype", WIRE_DTYPES, ids=str)
def test_gradients_of_16_bits_are_taken_as_float32(wire_dtype, dtype):
    rounded = np.random.default_rng(0).normal(size=(5, 7)).astype(compression.DTYPES[dtype])
    want, got = (encode(feedback(wire_dtype), [array]) for array in (rounded.astype(np.float32), rounded))
    assert got == want


@pytest.mark.parametrize("wire_dtype", WIRE_DTYPES, ids=str)
def test_gradient_is_left_as_it_is(wire_dtype):
    gradient = np.random.default_rng(0).normal(size=2000).astype(np.float32)
    before = gradient.copy()
    send(feedback(wire_dtype), [gradient])
    assert gradient.tobytes() == before.tobytes()


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("float64", None), "wire_dtype is 'float64'"),
        (("top_k", None), "kedge.TopK"),
        ((0.5, None), "wire_dtype is 0.5"),
        (("int8", "int8"), "weights_dtype is 'int8'"),
        (("float32", "float64"), "weights_dtype is 'float64'"),
    ],
)
def test_what_is_no_wire_dtype_is_refused(arguments, problem):
    with pytest.raises(ValueError, match=problem):
        encoding_of(*arguments)


@pytest.mark.parametrize("fraction", [0, -0.1, 1.1, float("nan")])
def test_fraction_out_of_range_is_refused(fraction):
    with pytest.raises(ValueError, match=r"^fraction is "):
        TopK(fraction)


@pytest.mark.parametrize("fraction", ["0.1", None, True])
def test_fraction_that_is_no_number_is_refused(fraction):
    with pytest.raises(TypeError, match=r"^fraction is "):
        TopK(fraction)


def test_weights_come_in_16_bits_where_gradients_are_compressed_and_as_gradients_elsewhere():
    assert [encoding_of(dtype, None).weights_dtype for dtype in WIRE_DTYPES] == ["bfloat16"] * 3
    assert [encoding_of(dtype, None).weights_dtype for dtype in ("float32", "float16")] == ["float32", "float16"]
    assert encoding_of("int8", "float32").weights_dtype == encoding_of("float16", "float32").weights_dtype == "float32"


# Workers


class RecordingTransport(FaultyTransport):
    """Keeps what is sent."""

    def __init__(self, transport: Any) -> None:
        super().__init__(transport)
        self.sent: list[bytes] = []

    def open_exchange(self, *arguments: Any) -> Any:
        exchange = super().open_exchange(*arguments)
        push = exchange.push

        def recording(pushed: Any) -> Any:
            self.sent.append(bytes(pushed.arrays[0]))
            return push(pushed)

        exchange.push = recording
        return exchange


@pytest.fixture
def fake():
    with testing.FakeServer() as server:
        transport = RecordingTransport(in_process.transport_to(server.address))
        client = Client(transport, Retrier(10.0, wait=lambda _: None))
        run = client.create_run(
            "r", params={"w": np.zeros(50, np.float32)}, optimizer=optim.SGD(lr=1.0), aggregation=kedge.Synchronous(1)
        )
        yield transport, run


def grads(seed: int) -> dict[str, np.ndarray]:
    return {"w": np.random.default_rng(seed).normal(size=50).astype(np.float32)}


def expected_bytes(wire_dtype: str | TopK, *taken: int) -> list[bytes]:
    """What is sent for these gradients if all are taken."""
    encoding, out = feedback(wire_dtype), []
    for seed in taken:
        out.append(encode(encoding, [grads(seed)["w"]]))
        encoding.settle(is_taken=True)
    return out


@pytest.mark.parametrize("fault", ["lost", "unanswered"])
@pytest.mark.parametrize("wire_dtype", WIRE_DTYPES, ids=str)
def test_repeated_push_sends_the_same_bytes_and_counts_once(fake, wire_dtype, fault):
    transport, run = fake
    first, second = expected_bytes(wire_dtype, 1, 2)
    with run.join(wire_dtype=wire_dtype) as worker:
        worker.pull()
        transport.faults = iter([(fault, gone())] * 3)
        worker.step(grads(1))
        worker.step(grads(2))
    assert transport.sent == [first] * 4 + [second]


@pytest.mark.parametrize("wire_dtype", WIRE_DTYPES, ids=str)
def test_what_is_kept_survives_joining_again(fake, wire_dtype):
    transport, run = fake
    with run.join("w", wire_dtype=wire_dtype) as worker:
        worker.pull()
        worker.step(grads(1))
        epoch = worker.epoch
        transport.leave(worker._session.lease)
        worker.step(grads(2))
        assert worker.epoch > epoch
    assert transport.sent == [*expected_bytes(wire_dtype, 1, 2)[:1], *[expected_bytes(wire_dtype, 1, 2)[1]] * 2]


@pytest.mark.parametrize("wire_dtype", WIRE_DTYPES, ids=str)
def test_rejected_gradient_is_left_out_of_what_is_kept(fake, wire_dtype):
    transport, run = fake
    bad = {"w": np.full(50, np.nan, np.float32)}
    with run.join(wire_dtype=wire_dtype) as worker:
        worker.pull()
        worker.step(grads(1))
        worker.step(bad)
        assert worker.last_result.reason == "NON_FINITE_GRADIENT"
        assert worker.push(grads(3), base_step=0).outcome == "rejected"
        worker.step(grads(2))
    assert [transport.sent[0], transport.sent[3]] == expected_bytes(wire_dtype, 1, 2)


@pytest.mark.parametrize("wire_dtype", WIRE_DTYPES, ids=str)
def test_gradient_whose_fate_nobody_knows_is_not_sent_twice(fake, wire_dtype):
    transport, run = fake
    transport.faults = iter([("unanswered", KedgeError("RUN_FAILED", "as the test wants it", run="r"))])
    with run.join(wire_dtype=wire_dtype) as worker:
        with pytest.raises(KedgeError):
            worker.push(grads(1), base_step=0)
        worker.pull()
        worker.step(grads(2))
    assert transport.sent == expected_bytes(wire_dtype, 1, 2)


@pytest.mark.parametrize("wire_dtype", WIRE_DTYPES, ids=str)
def test_gradient_that_was_not_recorded_is_left_out_of_what_is_kept(fake, wire_dtype):
    transport, run = fake
    with run.join(wire_dtype=wire_dtype) as worker:
        worker.pull()
        worker.step(grads(1))
        with pytest.raises(KedgeError, match="base_step"):
            worker.push(grads(3), base_step=100)
        worker.step(grads(2))
    assert [transport.sent[0], transport.sent[2]] == expected_bytes(wire_dtype, 1, 2)
