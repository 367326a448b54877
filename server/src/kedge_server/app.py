"""Puts a server together, runs it until a signal, and takes it apart."""

import asyncio
import contextlib
import errno
import ipaddress
import math
import os
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TypeAlias

import grpc
import structlog

from kedge.wire.codec import MAX_MESSAGE_BYTES
from kedge_server.config import ConfigError, ServerConfig, TlsSection
from kedge_server.engine.durability import Storage
from kedge_server.engine.limits import Limits
from kedge_server.engine.registry import Registry
from kedge_server.rpc import services
from kedge_server.rpc.calls import make_task
from kedge_server.rpc.health import HealthServicer
from kedge_server.rpc.idle import IdleStreams
from kedge_server.rpc.memory import MemoryDesk
from kedge_server.rpc.methods import NoMethod
from kedge_server.security.access import Access
from kedge_server.security.tls import ServerCertificates
from kedge_server.telemetry import logging

_log = structlog.get_logger("kedge.app")

_Watch: TypeAlias = Callable[[], Awaitable[None]]
"""Looks at something again and again, until it is cancelled."""

_BOTH_ADDRESSES = {
    "localhost": ("127.0.0.1", "::1"),
    "0.0.0.0": ("0.0.0.0", "::"),
    "[::]": ("0.0.0.0", "::"),
}
"""What gRPC listens on for these: one of the two is enough for it."""

_MOST_MILLISECONDS = 2**31 - 1
"""What gRPC takes for "never"."""

_CHECKPOINTS_EVERY_SECONDS = 1.0
_WATCH_PAUSE_SECONDS = 1.0

_HURRY_SECONDS = 2.0
_LEAST_GRACE_SECONDS = 0.2
"""For calls that have just been answered to bring that to their callers, whatever storage took."""

_SYNC_FAILED = 74
"""The exit code of a server that could not bring data to its disk: EX_IOERR of sysexits.h."""


class Stop:
    """Whether the server is to end, and whether at once."""

    def __init__(self) -> None:
        self.wanted = asyncio.Event()
        self.hurried = asyncio.Event()

    def ask(self) -> None:
        """Asks it to end; asked again, to wait for nothing any more."""
        (self.hurried if self.wanted.is_set() else self.wanted).set()


async def serve(config: ServerConfig, *, on_listening: Callable[[str], None]) -> None:
    """Serves until SIGTERM or SIGINT, then lets storage finish and calls in flight end within the grace time.

    Args:
        config: the configuration.
        on_listening: called with HOST:PORT once calls are answered, and all runs are there.

    Raises:
        ConfigError: the address cannot be listened on, or asks for TLS; a file of certificates or tokens cannot be
            used; there are fewer devices than it says.
        StorageError: the data directory cannot be used.
        RecoveryFailed: a run in it cannot be recovered.
    """
    require_safe(config)
    asyncio.get_running_loop().set_task_factory(make_task)
    stop = _stop_on_signals()
    access = _access(config)
    certificates = None if config.tls.cert_file is None else ServerCertificates(config.tls)
    storage, generation = _storage(config)
    registry = Registry(
        limits(config),
        block_elements=config.device.block_elements,
        device_count=config.device.count,
        storage=storage,
        generation=generation,
    )
    if config.device.count is not None:
        await _require_devices(registry)
    await registry.recover()
    server = grpc.aio.server(options=_options(config))
    address = _listen(server, config.server.listen, certificates)
    idle, desk = IdleStreams(), MemoryDesk(is_wanted=config.server.shared_memory)
    handlers = services.handlers(registry, idle, desk, access, with_reflection=config.server.reflection)
    healthiness = HealthServicer(services.NAMES, services.stream_bounds(registry.limits))
    server.add_generic_rpc_handlers((*handlers, healthiness.handler, NoMethod()))
    await server.start()
    _say_serving(config, address, run_count=len(registry.list()))
    on_listening(address)
    watches: list[_Watch] = [
        partial(_take_due_checkpoints, registry),
        access.watch,
        *([certificates.watch] if certificates else []),
    ]
    watching = [asyncio.create_task(_keep(watch)) for watch in watches]
    await stop.wanted.wait()
    for task in watching:
        task.cancel()
    _log.info("stopping", grace_seconds=config.server.grace_seconds)
    healthiness.end()
    ends_at = time.monotonic() + config.server.grace_seconds
    registry.end()
    is_whole = await _store(registry, stop, config.server.grace_seconds)
    idle.end()
    await desk.close()
    await server.stop(max(_LEAST_GRACE_SECONDS, ends_at - time.monotonic()))
    registry.close()
    if not is_whole:
        _exit_at_once(0)  # a thread may still be writing a checkpoint that nobody waits for


def _say_serving(config: ServerConfig, address: str, *, run_count: int) -> None:
    data_dir = config.server.data_dir
    if data_dir is None:
        _log.info("runs are kept in memory only, and end with this process: give it a data directory to keep them")
    _log.info(
        "serving",
        address=address,
        tls=config.tls.cert_file is not None,
        data_dir=str(data_dir.absolute() if data_dir else ""),
        runs=run_count,
    )


async def _keep(watch: _Watch) -> None:
    """Has a watch that a defect ends begin anew."""
    while True:
        try:
            await watch()
        except Exception as error:
            _log.exception("defect", error=type(error).__name__)
            await asyncio.sleep(_WATCH_PAUSE_SECONDS)


async def _take_due_checkpoints(registry: Registry) -> None:
    while True:
        await asyncio.sleep(_CHECKPOINTS_EVERY_SECONDS)
        registry.take_due_checkpoints()


async def _store(registry: Registry, stop: Stop, grace_seconds: float) -> bool:
    """Lets storage finish; after the grace time, or if it is asked to hurry, without the checkpoints.

    Returns:
        Whether the checkpoints are there, too. Without them nothing is lost: the journal has it.
    """
    storing = asyncio.create_task(registry.store_all(hurry=False))
    hurried = asyncio.create_task(stop.hurried.wait())
    await asyncio.wait([storing, hurried], timeout=grace_seconds, return_when=asyncio.FIRST_COMPLETED)
    hurried.cancel()
    if storing.done():
        storing.result()
        return True
    storing.cancel()
    await asyncio.wait([storing])
    _log.warning("ending without the last checkpoints; the next start takes longer")
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_HURRY_SECONDS):
            await registry.store_all(hurry=True)
    return False


def _access(config: ServerConfig) -> Access:
    tokens_file = config.access.tokens_file
    try:
        return Access(tokens_file, takes_certificates=config.tls.client_ca_file is not None)
    except (OSError, ValueError) as error:
        raise ConfigError(f"access.tokens_file = {str(tokens_file)!r}: {error}") from error


def _storage(config: ServerConfig) -> tuple[Storage | None, int | None]:
    """What keeps the runs, and the number of this server's start."""
    if config.server.data_dir is None:
        return None, None
    # Imported here because Orbax takes half a second, which a server without it need not wait for.
    from kedge_server.storage.data_dir import DataDir
    from kedge_server.storage.files import OsFiles
    from kedge_server.storage.runs import DiskStorage

    files = OsFiles()
    data_dir = DataDir.open(config.server.data_dir, files)
    storage = DiskStorage(
        data_dir,
        files,
        segment_bytes=config.storage.segment_bytes,
        journal_bytes=config.storage.journal_bytes,
        sync_seconds=config.storage.sync_seconds,
        on_sync_failed=_on_sync_failed,
    )
    return storage, data_dir.generation


def _on_sync_failed(error: Exception) -> None:
    """Nobody knows what is on the disk, and asking again may be answered wrongly: only a new start reads what is."""
    text = "data could not be brought to the disk: ending, since only a new start can tell what is there"
    _log.critical(text, cause=str(error))
    _exit_at_once(_SYNC_FAILED)


def _exit_at_once(code: int) -> None:
    sys.stdout.flush()
    logging.flush()
    os._exit(code)


def limits(config: ServerConfig) -> Limits:
    """The engine's limits, from the configuration."""
    return Limits(
        staging_bytes=config.limits.staging_bytes,
        streams=config.limits.streams,
        upload_idle_seconds=config.limits.upload_idle_seconds,
        upload_min_bytes_per_second=config.limits.upload_min_bytes_per_second,
        read_idle_seconds=config.limits.read_idle_seconds,
        reading_bytes=config.limits.reading_bytes,
        runs=config.limits.runs,
        workers_per_run=config.limits.workers_per_run,
        contributions_per_run=config.limits.contributions_per_run,
        events_per_run=config.limits.events_per_run,
        parameters_per_run=config.limits.parameters_per_run,
        lease_seconds=config.leases.default_seconds,
        min_lease_seconds=config.leases.min_seconds,
        max_lease_seconds=config.leases.max_seconds,
    )


async def _require_devices(registry: Registry) -> None:
    try:
        await registry.require_devices()
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _options(config: ServerConfig) -> list[tuple[str, int | str]]:
    return [
        # Without this a second server would bind the same port and take half of the calls.
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_concurrent_streams", config.server.max_concurrent_streams),
        ("grpc.max_metadata_size", 16 << 10),
        ("grpc.server_handshake_timeout_ms", 10_000),
        ("grpc.keepalive_time_ms", 20_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
        ("grpc.http2.max_ping_strikes", 0),
        ("grpc.http2.max_frame_size", (16 << 20) - 1),
        ("grpc.http2.lookahead_bytes", 4 << 20),
        ("grpc.http2.write_buffer_size", 4 << 20),
        ("grpc.optimization_target", "throughput"),
        # Who breaks a rule of gRPC waits for the answer, up to a second by itself.
        ("grpc.http.tarpit_max_duration_ms", 500),
        ("grpc.max_allowed_incoming_connections", config.limits.connections),
        # Gradients do not get smaller by it, and a message that is inflated may be any size: only "identity" is known.
        ("grpc.compression_enabled_algorithms_bitset", 1),
        *(() if config.tls.cert_file is None else _ages(config.tls)),
    ]


def _ages(tls: TlsSection) -> list[tuple[str, int]]:
    """What makes a connection end that was made with certificates that hold no more."""
    return [
        ("grpc.max_connection_age_ms", _milliseconds(tls.max_connection_age_seconds)),
        ("grpc.max_connection_age_grace_ms", _milliseconds(tls.max_connection_age_grace_seconds)),
    ]


def _milliseconds(seconds: float) -> int:
    return min(math.ceil(seconds * 1000), _MOST_MILLISECONDS)


def _listen(server: grpc.aio.Server, listen: str, certificates: ServerCertificates | None) -> str:
    host, _, wanted = listen.rpartition(":")
    tls = ""
    try:
        _require_free(host, int(wanted))
        if certificates is None:
            port = server.add_insecure_port(listen)
        else:
            tls = " Else gRPC does not take one of the certificates: GRPC_VERBOSITY=ERROR in the environment tells why"
            port = server.add_secure_port(listen, certificates.credentials())
    except (OSError, RuntimeError) as error:
        raise ConfigError(
            f"server.listen = {listen!r}: cannot listen there; is the port in use, or the host not this machine's? "
            f"Port 0 picks a free port.{tls}"
        ) from error
    return f"{host}:{port}"


def _require_free(host: str, port: int) -> None:
    """Refuses a port that is another server's at one of two addresses: clients would reach the one or the other."""
    for address in _BOTH_ADDRESSES.get(host, ()):
        try:
            socket.create_server((address, port), family=socket.AF_INET6 if ":" in address else socket.AF_INET).close()
        except OSError as error:
            if error.errno == errno.EADDRINUSE:  # else there is no such address here
                raise


def require_safe(config: ServerConfig) -> None:
    """Refuses to serve other machines in the clear, or whoever calls, unless it is told to.

    Raises:
        ConfigError: with what is to be set.
    """
    has_tls = config.tls.cert_file is not None
    asks_who_calls = config.access.tokens_file is not None or config.tls.client_ca_file is not None
    if (has_tls and asks_who_calls) or _is_loopback(config.server.listen.rpartition(":")[0]):
        return
    if config.server.insecure:
        text = "insecure: other machines may connect" + ("" if asks_who_calls else ", and may do everything")
        _log.warning(text, tls=has_tls, asks_who_calls=asks_who_calls)
        return
    tls = "" if has_tls else "tls.cert_file and tls.key_file (`kedge-server certs dev DIR` makes some)"
    access = (
        "" if asks_who_calls else "access.tokens_file (`kedge-server token new` makes tokens) or tls.client_ca_file"
    )
    raise ConfigError(
        f"server.listen = {config.server.listen!r} is reachable from other machines: set "
        f"{', and '.join(filter(None, [tls, access]))}; or listen on 127.0.0.1, or say --insecure on a network where "
        "you trust everyone"
    )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _stop_on_signals() -> Stop:
    stop = Stop()
    loop = asyncio.get_running_loop()
    for signal_number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signal_number, stop.ask)
    return stop
