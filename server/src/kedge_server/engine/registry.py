"""The runs of a server, by name, and what they share."""

import asyncio
import itertools
import time
from dataclasses import dataclass

import numpy as np

from kedge.optim import Group, Optimizer
from kedge.optim.controls import Controls
from kedge.policies import Admission, Policy, Synchronous
from kedge.wire.errors import KedgeError
from kedge.wire.manifest import Manifest
from kedge.wire.reflection import Refusing
from kedge_server.core.coordinator import Bounds
from kedge_server.core.plan import Plan
from kedge_server.core.plan import plan as make_plan
from kedge_server.core.rounds import round_size
from kedge_server.core.rules import check_rule
from kedge_server.engine.clock import Clock, LoopClock
from kedge_server.engine.device import DeviceThread, Writer, default_block_elements
from kedge_server.engine.limits import Limits
from kedge_server.engine.run import RunConfig, RunEngine, RunUpdate
from kedge_server.engine.snapshots import Snapshot
from kedge_server.engine.staging import StagingAccount, StagingBuffer, StagingPool


@dataclass(frozen=True, kw_only=True)
class NewRun:
    """What someone wants created."""

    name: str
    manifest: Manifest
    optimizer: Optimizer
    policy: Policy
    admission: Admission
    groups: tuple[Group, ...]
    request_id: str


class Registry:
    """All runs of a server. Belongs to the loop that it is used on.

    Args:
        limits: what bounds it.
        block_elements: the length of a block of state; None for the platform's best.
        clock: the time.
    """

    def __init__(self, limits: Limits, *, block_elements: int | None = None, clock: Clock | None = None) -> None:
        self.limits = limits
        self.staging = StagingPool(limits.staging_bytes)
        self._block_elements = block_elements
        self._clock = clock or LoopClock()
        self._device = DeviceThread()
        self._runs: dict[str, RunEngine] = {}
        self._accounts: dict[RunEngine, StagingAccount] = {}
        self._creating: dict[str, asyncio.Future[None]] = {}
        self._is_ending = False
        # Microseconds since 1970 at the start: epochs grow from one server process to the next.
        self._epochs = itertools.count(int(time.time() * 1e6))

    def get(self, name: str) -> RunEngine:
        """A run.

        Raises:
            KedgeError: RUN_NOT_FOUND.
        """
        run = self._runs.get(name)
        if run is None:
            raise _not_found(name)
        return run

    def list(self) -> list[RunEngine]:
        """All runs, by name."""
        return [self._runs[name] for name in sorted(self._runs)]

    def lend(self, run: RunEngine) -> StagingBuffer:
        """A buffer for a gradient of a run.

        Raises:
            KedgeError: STAGING_FULL, or RUN_NOT_FOUND if it was deleted.
        """
        if run not in self._accounts:
            raise _not_found(run.config.name)
        return self._accounts[run].acquire()

    def update(self, run: RunEngine, update: RunUpdate, *, request_id: str) -> int:
        """Changes a live run; see `RunEngine.update`.

        Raises:
            KedgeError: RUN_TOO_LARGE or STAGING_FULL if the rounds of a new policy can never be held, or not now; what
                `RunEngine.update` raises.
        """
        account = self._accounts[run]
        if update.policy is not None:
            self.require_room(run.config.manifest.element_count, update.policy)
            account.set_claim(round_size(update.policy))
        try:
            return run.update(update, request_id=request_id)
        finally:
            account.set_claim(round_size(run.policy))

    def next_epoch(self) -> int:
        """A number greater than any before."""
        return next(self._epochs)

    def lease_seconds(self, wanted: float | None) -> float:
        """The lease that is granted to who wants this one."""
        if wanted is None:
            return self.limits.lease_seconds
        return min(max(wanted, self.limits.min_lease_seconds), self.limits.max_lease_seconds)

    async def find_created(self, new: NewRun) -> RunEngine | None:
        """The run that an earlier attempt of the same request made, or None if it may be created now.

        Where another call is creating a run of the name, it waits for what becomes of that.

        Raises:
            KedgeError: RUN_ALREADY_EXISTS, RUN_TOO_LARGE or TOO_MANY_RUNS.
        """
        while new.name in self._creating:
            await asyncio.wait([self._creating[new.name]])
        if self._is_ending:
            raise _draining()
        existing = self._runs.get(new.name)
        if existing is not None and new.request_id and existing.config.request_id == new.request_id:
            return existing
        if existing is not None:
            raise KedgeError(
                "RUN_ALREADY_EXISTS",
                f"{new.name} exists: choose another name, or get the run that is there",
                run=new.name,
            )
        self._require_room(new)
        return None

    async def plan(self, new: NewRun) -> Plan:
        """How its state will be cut. Refuses what can be judged before the weights are here.

        Raises:
            KedgeError: INVALID_CONFIGURATION.
        """
        with Refusing("optimizer.optax"):
            await self._device.run(check_rule, new.optimizer.spec().rule)
        if self._block_elements is None:
            self._block_elements = await self._device.run(default_block_elements)
        # Many patterns on many names take a while, which neither the loop nor the device is to wait for.
        with Refusing():
            return await asyncio.to_thread(
                make_plan, new.optimizer.spec(), new.manifest, groups=new.groups, block_elements=self._block_elements
            )

    async def create(self, new: NewRun, plan: Plan, weights: StagingBuffer) -> RunEngine:
        """Creates a run. Owns the buffer from now on.

        Raises:
            KedgeError: as `find_created`.
        """
        try:
            existing = await self.find_created(new)
            return existing or await self._create(new, plan, weights.array)
        finally:
            weights.release()

    async def _create(self, new: NewRun, plan: Plan, weights: np.ndarray) -> RunEngine:
        ended = self._creating[new.name] = asyncio.get_running_loop().create_future()
        try:
            writer, snapshot = await self._device.run(self._make_writer, new, plan, weights)
            run = self._runs[new.name] = self._make_engine(new, writer, snapshot)
            self._accounts[run] = self.staging.account(new.manifest.element_count, round_size(new.policy))
        finally:
            del self._creating[new.name]
            ended.set_result(None)
        return run

    def delete(self, name: str) -> None:
        """Deletes a run.

        Raises:
            KedgeError: RUN_NOT_FOUND.
        """
        run = self.get(name)
        del self._runs[name], self._accounts[run]
        run.end(_not_found(name))
        self.staging.drop_free(run.config.manifest.element_count)

    async def end(self) -> None:
        """Takes nothing more, applies the rounds that are closed, and ends every run. Snapshots can still be read."""
        self._is_ending = True
        if self._creating:
            await asyncio.wait(self._creating.values())
        runs = list(self._runs.values())
        for run in runs:
            run.end(_draining())
        for run in runs:
            await run.drain()

    def close(self) -> None:
        """Lets the device go. Only after `end`."""
        self._device.close()

    def _make_writer(self, new: NewRun, plan: Plan, weights: np.ndarray) -> tuple[Writer, Snapshot]:
        controls = Controls.begin(new.optimizer.spec(), new.groups)
        writer = Writer(plan, weights, controls.values())
        return writer, writer.snapshot()

    def _make_engine(self, new: NewRun, writer: Writer, snapshot: Snapshot) -> RunEngine:
        config = RunConfig(
            name=new.name,
            manifest=new.manifest,
            optimizer=new.optimizer,
            groups=new.groups,
            created_at_seconds=time.time(),
            request_id=new.request_id,
        )
        return RunEngine(
            config,
            writer,
            snapshot,
            policy=new.policy,
            admission=new.admission,
            device=self._device,
            clock=self._clock,
            bounds=Bounds(self.limits.workers_per_run, self.limits.contributions_per_run),
            kept_events=self.limits.events_per_run,
            first_epoch=self.next_epoch(),
        )

    def _require_room(self, new: NewRun) -> None:
        limit = self.limits.parameters_per_run
        if new.manifest.element_count > limit:
            raise _too_large(
                f"the model has {new.manifest.element_count} parameters, limits.parameters_per_run is {limit}",
                limit,
                new.manifest.element_count,
            )
        self.require_room(new.manifest.element_count, new.policy)
        if len(self._runs) + len(self._creating) >= self.limits.runs:
            raise KedgeError(
                "TOO_MANY_RUNS",
                f"the server holds {len(self._runs)} runs, limits.runs is {self.limits.runs}: delete one",
                limit=self.limits.runs,
            )

    def require_room(self, element_count: int, policy: Policy) -> None:
        """Refuses a policy whose rounds could never gather, or never be held.

        Raises:
            KedgeError: RUN_TOO_LARGE.
        """
        count = round_size(policy)
        limit = self.limits.workers_per_run
        if isinstance(policy, Synchronous) and count > limit:
            problem = f"a quorum of {count} workers can never gather, limits.workers_per_run is {limit}"
            raise _too_large(f"{problem}: raise it, or lower the quorum", limit, element_count)
        limit = self.limits.staging_bytes
        if 4 * element_count * count > limit:
            size = 4 * element_count
            problem = f"{count} gradients of {size} bytes have to be held at once, limits.staging_bytes is {limit}"
            raise _too_large(f"{problem}: raise it, or lower the quorum or size", limit, element_count)
        limit = self.limits.contributions_per_run
        if count > limit:
            problem = f"{count} contributions have to be held at once, limits.contributions_per_run is {limit}"
            raise _too_large(f"{problem}: raise it, or lower the quorum or size", limit, element_count)


def _too_large(message: str, limit: int, parameter_count: int) -> KedgeError:
    return KedgeError("RUN_TOO_LARGE", message, limit=limit, parameter_count=parameter_count)


def _draining() -> KedgeError:
    return KedgeError("SERVER_DRAINING", "the server is shutting down: call again when it is back")


def _not_found(name: str) -> KedgeError:
    return KedgeError(
        "RUN_NOT_FOUND",
        f"there is no {name}: create it, or look at the list of runs; "
        "a server that was started anew has none of before",
        run=name,
    )
