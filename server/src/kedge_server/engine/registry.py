"""The runs of a server, by name, and what they share."""

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import structlog

from kedge.optim import Group, Optimizer
from kedge.policies import Admission, Checkpoints, Durability, Policy, Synchronous
from kedge.wire.errors import KedgeError
from kedge.wire.manifest import Manifest
from kedge.wire.reflection import Refusing
from kedge_server.core.commits import ArraySpec, Created, Progress, RunConfig
from kedge_server.core.coordinator import Bounds
from kedge_server.core.image import HeldKey, RunImage
from kedge_server.core.placement import DeviceCount
from kedge_server.core.plan import Plan
from kedge_server.core.plan import plan as make_plan
from kedge_server.core.rounds import round_size
from kedge_server.core.rules import check_rule
from kedge_server.core.stored import Arrays
from kedge_server.engine.clock import Clock, LoopClock
from kedge_server.engine.device import DeviceThread, Writer, default_block_elements
from kedge_server.engine.durability import FoundRun, MemoryStore, RunStore, Storage
from kedge_server.engine.lasting import lasting
from kedge_server.engine.limits import Limits
from kedge_server.engine.recovery import plan_of, recover, writer_of
from kedge_server.engine.run import RunEngine
from kedge_server.engine.run_state import RunUpdate
from kedge_server.engine.snapshots import Snapshot
from kedge_server.engine.staging import StagingAccount, StagingBuffer, StagingPool

_RECOVERED_AT_ONCE = 4

_log = structlog.get_logger("kedge.registry")


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
    durability: Durability | None = None
    """None: journal where there is storage, else memory."""
    checkpoints: Checkpoints = field(default_factory=Checkpoints)


class RecoveryFailed(Exception):  # noqa: N818  it says what is the case
    """Runs cannot be recovered: why, and what to do."""


class Registry:
    """All runs of a server. Belongs to the loop that it is used on.

    Args:
        limits: what bounds it.
        block_elements: the length of a block of state; None for the platform's best.
        device_count: how many devices a run's state is dealt to; "all"; None for the platform's default.
        clock: the time.
        storage: keeps the runs; None: they are kept in memory only.
        generation: greater than that of every server before on the same storage; None for one that grows with time.

    Attributes:
        generation: the same.
    """

    def __init__(
        self,
        limits: Limits,
        *,
        block_elements: int | None = None,
        device_count: DeviceCount = None,
        clock: Clock | None = None,
        storage: Storage | None = None,
        generation: int | None = None,
    ) -> None:
        self.limits = limits
        self.staging = StagingPool(limits.staging_bytes)
        self._block_elements = block_elements
        self._clock = clock or LoopClock()
        self._storage = storage
        self._device = DeviceThread(device_count)
        self._runs: dict[str, RunEngine] = {}
        self._accounts: dict[RunEngine, StagingAccount] = {}
        self._creating: dict[str, asyncio.Future[None]] = {}
        self._is_ending = False
        # Microseconds since 1970 at the start: epochs grow from one server process to the next.
        started_at = int(time.time() * 1e6)
        self._epochs = itertools.count(started_at)
        self.generation = started_at if generation is None else generation

    async def require_devices(self) -> None:
        """Looks whether there are as many devices as it was told of.

        Raises:
            ValueError: for fewer.
        """
        await self._device.placement()

    async def recover(self) -> None:
        """Brings the runs in storage back to where they stood, side by side. Before anything else.

        Raises:
            RecoveryFailed: naming every run that cannot be recovered, and why. Nothing of theirs was changed.
        """
        found = [] if self._storage is None else list(self._storage.found())
        several = asyncio.Semaphore(_RECOVERED_AT_ONCE)

        async def one(run: FoundRun) -> str:
            async with several:
                try:
                    await self._recover(run)
                except Exception as error:
                    is_defect = not hasattr(error, "message")  # storage's own errors, and the catalogue's, say it all
                    _log.error("run cannot be recovered", run=run.name, cause=str(error), exc_info=is_defect)
                    return f"{run.name}: {error}"
            return ""

        problems = [problem for problem in await asyncio.gather(*map(one, found)) if problem]
        if problems:
            raise RecoveryFailed("\n".join(problems))

    async def _recover(self, found: FoundRun) -> None:
        recovered = await recover(found, self._device)
        if recovered is None:
            return
        image, writer = recovered.image, recovered.writer
        if image.config.durability == "checkpoint":
            # What the workers have sent since the checkpoint is lost: they begin new epochs.
            image.leases.end_all()
        account = self._account(image.config, image.policy)
        held = {key: _lent(account, gradient) for key, gradient in recovered.held.items()}
        snapshot = await self._device.run(writer.snapshot)
        run = self._make_engine(image, writer, snapshot, store=found.resume(image), held=held)
        self._runs[found.name], self._accounts[run] = run, account
        self._epochs = itertools.count(max(next(self._epochs), image.last_epoch + 1))
        count = recovered.replayed_count
        run.feed.tell("recovered", message=f"{count} steps were applied again")

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

    def _account(self, config: RunConfig, policy: Policy) -> StagingAccount:
        padded_count = plan_of(config).padded_count
        return self.staging.account(config.manifest.element_count, round_size(policy), padded_count=padded_count)

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
        self._durability(new.durability)
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
        return await lasting(self._create(new, plan, weights))

    async def _create(self, new: NewRun, plan: Plan, weights: StagingBuffer) -> RunEngine:
        try:
            existing = await self.find_created(new)
            if existing is not None:
                return existing
            flat = ArraySpec("weights", "float32", weights.array.shape)
            created = Created(self._config(new, plan), new.policy, new.admission, (flat,))
            return await self._alone(new.name, lambda: self._begin(created, {"weights": weights.array}))
        finally:
            weights.release()

    async def fork(self, run: RunEngine, checkpoint_id: str, name: str, *, request_id: str) -> RunEngine:
        """Creates a run that begins where a checkpoint of another is.

        Raises:
            KedgeError: as `find_created` and `RunEngine.restore`.
        """
        return await lasting(self._fork(run, checkpoint_id, name, request_id))

    async def _fork(self, run: RunEngine, checkpoint_id: str, name: str, request_id: str) -> RunEngine:
        new = _like(run, name, request_id)
        existing = await self.find_created(new)
        if existing is not None:
            return existing
        checkpoint = await run.store.load(checkpoint_id)
        image, arrays = checkpoint.image, checkpoint.arrays
        config = replace(image.config, name=name, request_id=request_id, created_at_seconds=time.time())
        config = replace(config, first_epoch=self.next_epoch())
        specs = tuple(ArraySpec(key, str(array.dtype), array.shape) for key, array in arrays.items())
        progress = Progress(image.step, image.applied_count, image.loss, image.controls)
        created = Created(config, image.policy, image.admission, specs, progress)
        existing = await self.find_created(new)
        return existing or await self._alone(name, lambda: self._begin(created, arrays))

    def _config(self, new: NewRun, plan: Plan) -> RunConfig:
        return RunConfig(
            name=new.name,
            manifest=new.manifest,
            optimizer=new.optimizer,
            groups=new.groups,
            created_at_seconds=time.time(),
            request_id=new.request_id,
            durability=self._durability(new.durability),
            checkpoints=new.checkpoints,
            block_elements=plan.block_elements,
            first_epoch=self.next_epoch(),
        )

    async def _alone(self, name: str, begin: Callable[[], Awaitable[RunEngine]]) -> RunEngine:
        """Creates a run while nobody else creates or deletes one of its name."""
        ended = self._creating[name] = asyncio.get_running_loop().create_future()
        try:
            run = await begin()
        finally:
            del self._creating[name]
            ended.set_result(None)
        return run

    async def _begin(self, created: Created, arrays: Arrays) -> RunEngine:
        config = created.config
        image = RunImage.create(created)
        writer = await self._device.run(writer_of, image, arrays, await self._device.placement())
        snapshot = await self._device.run(writer.snapshot)
        store: RunStore = MemoryStore(config.name)
        if config.durability != "memory":
            assert self._storage is not None, "it was asked for before"
            store = await self._storage.create(created, [arrays[spec.name] for spec in created.arrays])
        run = self._runs[config.name] = self._make_engine(image, writer, snapshot, store=store, held={})
        self._accounts[run] = self._account(config, created.policy)
        return run

    def _durability(self, wanted: Durability | None) -> Durability:
        if wanted is None:
            return "memory" if self._storage is None else "journal"
        if wanted != "memory" and self._storage is None:
            raise KedgeError(
                "DURABILITY_UNAVAILABLE",
                f"durability {wanted!r} needs a data directory, and the server has none: start it with --data-dir, or "
                "create the run with durability 'memory'",
                durability=wanted,
            )
        return wanted

    async def delete(self, name: str) -> None:
        """Deletes a run.

        Raises:
            KedgeError: RUN_NOT_FOUND; STORAGE_UNAVAILABLE: it has ended, but what is stored of it could not be deleted.
        """
        await lasting(self._delete(name))

    async def _delete(self, name: str) -> None:
        run = self.get(name)
        del self._runs[name]
        account = self._accounts.pop(run)
        run.end(_not_found(name))
        ended = self._creating[name] = asyncio.get_running_loop().create_future()
        try:
            await run.delete()
        finally:
            del self._creating[name]
            ended.set_result(None)
        self.staging.drop_free(account.padded_count)

    def take_due_checkpoints(self) -> None:
        """Begins the checkpoints that time has made due. To be called now and then."""
        for run in self._runs.values():
            run.checkpoint_if_due()

    def end(self) -> None:
        """Takes nothing more, and ends every run. Snapshots can still be read."""
        self._is_ending = True
        for run in self._runs.values():
            run.end(_draining())

    async def store_all(self, *, hurry: bool) -> None:
        """Applies the rounds that are closed and lets storage finish, with a last checkpoint of each run. After `end`.

        In a hurry it does neither: what was acknowledged is stored in any case.
        """
        if self._creating and not hurry:
            await asyncio.wait(self._creating.values())
            self.end()
        runs = list(self._runs.values())
        for run, outcome in zip(
            runs, await asyncio.gather(*(run.close(hurry=hurry) for run in runs), return_exceptions=True), strict=True
        ):
            if isinstance(outcome, Exception):
                _log.error("run was not closed well", run=run.config.name, exc_info=outcome)
        if self._storage is not None:
            await self._storage.close()

    def close(self) -> None:
        """Lets the device go. Only after `end`."""
        self._device.close()

    def _make_engine(
        self,
        image: RunImage,
        writer: Writer,
        snapshot: Snapshot,
        *,
        store: RunStore,
        held: Mapping[HeldKey, StagingBuffer],
    ) -> RunEngine:
        return RunEngine(
            image,
            writer,
            snapshot,
            store=store,
            held=held,
            device=self._device,
            clock=self._clock,
            bounds=Bounds(self.limits.workers_per_run, self.limits.contributions_per_run),
            kept_events=self.limits.events_per_run,
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


def _lent(account: StagingAccount, gradient: np.ndarray) -> StagingBuffer:
    buffer = account.acquire()
    buffer.array[:] = gradient
    return buffer


def _like(run: RunEngine, name: str, request_id: str) -> NewRun:
    return NewRun(
        name=name,
        manifest=run.config.manifest,
        optimizer=run.config.optimizer,
        policy=run.policy,
        admission=run.admission,
        groups=run.config.groups,
        request_id=request_id,
        durability=run.config.durability,
        checkpoints=run.config.checkpoints,
    )


def _too_large(message: str, limit: int, parameter_count: int) -> KedgeError:
    return KedgeError("RUN_TOO_LARGE", message, limit=limit, parameter_count=parameter_count)


def _draining() -> KedgeError:
    return KedgeError("SERVER_DRAINING", "the server is shutting down: call again when it is back")


def _not_found(name: str) -> KedgeError:
    return KedgeError(
        "RUN_NOT_FOUND",
        f"there is no {name}: create it, or look at the list of runs; "
        "without a data directory a server that is started anew has none of before",
        run=name,
    )
