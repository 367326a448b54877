"""Former weights' memory is written to again, but never while somebody reads it."""

import jax
import numpy as np
import pytest

from kedge import optim
from kedge.optim.controls import Controls
from kedge.wire.codec import FlatEncoder
from kedge.wire.manifest import Manifest
from kedge_server.core.placement import Placement, Staged
from kedge_server.core.plan import plan
from kedge_server.engine.device import Writer
from kedge_server.engine.snapshots import Snapshot

COUNT = 10_000
PLAIN = optim.SGD(1.0)
LOOKING = optim.Lookahead(optim.SGD(1.0), sync_period=3, alpha=1.0)


class Copying(Staged):
    """As on a GPU, where JAX keeps the copy on the host beside the array."""

    def __init__(self) -> None:
        self._kept: list[np.ndarray] = []

    def to_host(self, array: jax.Array) -> np.ndarray:
        self._kept.append(np.array(array))
        return self._kept[-1]


class Hand:
    """A writer whose weights are -1 after the first step, -2 after the second, and so on."""

    def __init__(self, optimizer: optim.Optimizer = PLAIN, placement: Placement | None = None) -> None:
        cut = plan(optimizer.spec(), Manifest.from_specs([("w", (COUNT,), "float32")]), block_elements=4096)
        self._values = Controls.begin(optimizer.spec(), ()).values()
        self.writer = Writer(cut, np.zeros(COUNT, np.float32), self._values, placement)

    def step(self) -> Snapshot:
        return self.writer.apply([np.ones(COUNT, np.float32)], [1.0], self._values)


def places(snapshot: Snapshot) -> tuple[int, ...]:
    """Where its weights lie."""
    return tuple(array.ctypes.data for array in snapshot.fast)


def all_places(optimizer: optim.Optimizer, step_count: int) -> list[set[int]]:
    """For each block the places that its weights were at over some steps, of which only the newest is ever read."""
    hand = Hand(optimizer)
    seen = [places(hand.step()) for _ in range(step_count)]
    return [set(of_block) for of_block in zip(*seen, strict=True)]


def test_weights_that_nobody_reads_take_turns_at_two_places() -> None:
    assert [len(of_block) for of_block in all_places(PLAIN, 10)] == [2, 2, 2]


def test_with_slow_weights_they_take_turns_at_three() -> None:
    assert [len(of_block) for of_block in all_places(LOOKING, 20)] == [3, 3, 3]


@pytest.mark.parametrize("optimizer", [PLAIN, LOOKING], ids=["plain", "lookahead"])
@pytest.mark.parametrize(
    "taken",
    [
        lambda snapshot: snapshot.fast,
        lambda snapshot: [array[7:] for array in snapshot.fast],
        lambda snapshot: [memoryview(array) for array in snapshot.fast],
        lambda snapshot: [array.view(np.uint8)[4:].view(np.float32) for array in snapshot.fast],
    ],
    ids=["arrays", "slices", "memoryviews", "bytes"],
)
def test_what_a_reader_has_in_whatever_form_stays_as_it_was(taken: object, optimizer: optim.Optimizer) -> None:
    assert callable(taken)
    hand = Hand(optimizer)
    held = [(number, taken(hand.step())) for number in range(1, 8)]
    for number, arrays in held:
        assert all((np.asarray(array) == -number).all() for array in arrays)


def test_weights_that_are_being_encoded_stay_as_they_were() -> None:
    hand = Hand()
    encoder = iter(FlatEncoder(hand.step().fast, "float32"))
    for _ in range(5):
        hand.step()
    data = b"".join(bytes(message) for message in encoder)
    assert data.count(np.float32(-1).tobytes()) == COUNT


def test_a_capture_stays_as_it_was() -> None:
    hand = Hand(optim.Momentum(1.0, momentum=0.5))
    hand.step()
    captured = hand.writer.capture()
    before = {name: array.copy() for name, array in captured.items()}
    for _ in range(5):
        hand.step()
    assert all((captured[name] == array).all() for name, array in before.items())


def test_memory_is_written_to_again_once_its_reader_has_let_go() -> None:
    hand = Hand()
    read = hand.step()
    freed = set(places(read))
    between = [set(places(hand.step())) for _ in range(2)]  # while it is read
    assert not any(freed & others for others in between)
    del read
    assert any(freed & set(places(hand.step())) for _ in range(2))


@pytest.mark.parametrize("optimizer", [PLAIN, LOOKING], ids=["plain", "lookahead"])
def test_weights_are_the_newest_whoever_holds_others_that_are_long_gone_from_the_state(
    optimizer: optim.Optimizer,
) -> None:
    hand = Hand(optimizer)
    held = []
    for number in range(1, 100):  # an array that the state has left has an id that a later one may be given
        newest = hand.step().fast
        assert all((array == -number).all() for array in newest), number
        held = [*held, newest][-8:] if number % 3 == 0 else held
        del newest


def test_what_is_copied_to_the_host_keeps_no_memory_of_a_device_from_being_written_to_again() -> None:
    hand = Hand(placement=Placement(jax.devices()[:1], Copying()))
    held = [hand.step() for _ in range(20)]
    assert [array[0] for snapshot in held for array in snapshot.fast] == [-n for n in range(1, 21) for _ in range(3)]
    assert [len(block.spares) for block in hand.writer._blocks] == [1, 1, 1]
