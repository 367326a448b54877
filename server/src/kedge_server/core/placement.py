"""Where the blocks of a state live, and how their arrays come there and back.

A block belongs to one device whole, with its state and its update: nothing is exchanged between devices but the scalars
of a clip by norm. What is kept of a run does not say how many devices there were.
"""

from collections.abc import Sequence
from typing import Literal, Protocol

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from kedge_server.core.plan import BlockPlan

HostOrDevice = np.ndarray | jax.Array
DeviceCount = int | Literal["all"] | None


class Transfer(Protocol):
    """How arrays get to a device and back."""

    is_shared: bool
    """Whether what `to_host` gives is the array's own memory."""

    def gradient(self, view: np.ndarray, device: jax.Device) -> HostOrDevice:
        """A range of a gradient for an update on this device. Not to be overwritten before that is complete."""
        ...

    def begin_to_host(self, array: jax.Array) -> None:
        """Asks for a result before it is there: it will come as soon as it is."""
        ...

    def to_host(self, array: jax.Array) -> np.ndarray:
        """The array on the host, to be read only. Waits for it."""
        ...


class SharedMemory:
    """On the CPU a device's memory is the host's: nothing is copied."""

    is_shared = True

    def gradient(self, view: np.ndarray, device: jax.Device) -> HostOrDevice:  # noqa: ARG002 - of the protocol
        """The view itself."""
        return view

    def begin_to_host(self, array: jax.Array) -> None:
        """Nothing."""

    def to_host(self, array: jax.Array) -> np.ndarray:
        """The array's own memory, which XLA gives to no update for as long as anyone has it, or a view of it.

        Not `np.asarray`: JAX keeps that one beside the array, so that its memory could never be used anew.
        """
        return np.from_dlpack(array)  # type: ignore[arg-type]  # JAX leaves out the parameters that NumPy does not give


class Staged:
    """Elsewhere: by way of pinned host memory, which a device reads by itself while others of its blocks compute."""

    is_shared = False

    def gradient(self, view: np.ndarray, device: jax.Device) -> HostOrDevice:
        """A copy on the device. May still be on its way."""
        pinned = jax.device_put(view, SingleDeviceSharding(device, memory_kind="pinned_host"))
        on_device: jax.Array = jax.device_put(pinned, SingleDeviceSharding(device, memory_kind="device"))
        return on_device

    def begin_to_host(self, array: jax.Array) -> None:
        """Copies it out when it is computed, beside the blocks after it."""
        array.copy_to_host_async()

    def to_host(self, array: jax.Array) -> np.ndarray:
        """A copy, the one that was asked for if any was."""
        return np.asarray(array)


class Placement:
    """The devices of a state.

    Args:
        devices: which, in order; at least one.
        transfer: how arrays get there and back.
    """

    def __init__(self, devices: Sequence[jax.Device], transfer: Transfer) -> None:
        assert devices, "a state lives on one device at least"
        self.devices = tuple(devices)
        self.transfer = transfer

    @classmethod
    def of(cls, count: DeviceCount = None) -> "Placement":
        """The first devices of this host.

        Args:
            count: how many; "all"; or None for the default: one on a CPU, all elsewhere.

        Raises:
            ValueError: for more than there are.
        """
        devices = jax.local_devices()
        is_cpu = devices[0].platform == "cpu"
        if count is None:
            count = 1 if is_cpu else "all"
        wanted = len(devices) if count == "all" else count
        if not 1 <= wanted <= len(devices):
            raise ValueError(
                f"device.count is {wanted}, but the devices here are {len(devices)}: ask for 1 to that many"
            )
        return cls(devices[:wanted], SharedMemory() if is_cpu else Staged())

    def deal(self, blocks: Sequence[BlockPlan]) -> tuple[int, ...]:
        """The number of the device of each block: ranges in order, of about as many elements each."""
        total = max(1, sum(block.size for block in blocks))
        count = len(self.devices)
        return tuple(min(count - 1, (block.start + block.stop) * count // (2 * total)) for block in blocks)
