"""Puts a server together, runs it until a signal, and takes it apart."""

import asyncio
import contextlib
import ipaddress
import signal
from collections.abc import Callable

import grpc
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from kedge.wire.codec import MAX_MESSAGE_BYTES
from kedge_server.config import ConfigError, ServerConfig
from kedge_server.engine.limits import Limits
from kedge_server.engine.registry import Registry
from kedge_server.rpc import services
from kedge_server.rpc.calls import make_task
from kedge_server.rpc.idle import IdleStreams

_log = structlog.get_logger("kedge.app")

_HEALTH_SECONDS = 1.0


async def serve(config: ServerConfig, *, on_listening: Callable[[str], None]) -> None:
    """Serves until SIGTERM or SIGINT, then lets calls in flight end within the grace time.

    Args:
        config: the configuration.
        on_listening: called with HOST:PORT once calls are answered.

    Raises:
        ConfigError: the address cannot be listened on, or asks for TLS.
    """
    _require_safe(config)
    asyncio.get_running_loop().set_task_factory(make_task)
    registry = Registry(limits(config), block_elements=config.device.block_elements)
    server = grpc.aio.server(options=_options(config))
    address = _listen(server, config.server.listen)
    idle = IdleStreams()
    healthiness = await _add_services(server, registry, idle)
    await server.start()
    stop = _stop_on_signals()
    if config.server.data_dir is not None:
        _log.warning("runs are kept in memory only; data_dir is not used yet", data_dir=str(config.server.data_dir))
    _log.info("serving", address=address, durability="memory")
    on_listening(address)
    await stop.wait()
    _log.info("stopping", grace_seconds=config.server.grace_seconds)
    with contextlib.suppress(TimeoutError):  # a health watcher that does not read would keep it for ever
        async with asyncio.timeout(_HEALTH_SECONDS):
            await healthiness.enter_graceful_shutdown()
    await registry.end()
    idle.end()
    await server.stop(config.server.grace_seconds)
    registry.close()


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
    ]


async def _add_services(server: grpc.aio.Server, registry: Registry, idle: IdleStreams) -> health.aio.HealthServicer:
    server.add_generic_rpc_handlers(services.handlers(registry, idle))
    healthiness = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(healthiness, server)
    for name in ("", *services.NAMES):
        await healthiness.set(name, health_pb2.HealthCheckResponse.SERVING)
    return healthiness


def _listen(server: grpc.aio.Server, listen: str) -> str:
    host, _, _ = listen.rpartition(":")
    try:
        port = server.add_insecure_port(listen)
    except RuntimeError as error:
        raise ConfigError(
            f"server.listen = {listen!r}: cannot listen there; is the port in use, or the host not this machine's? "
            "Port 0 picks a free port"
        ) from error
    return f"{host}:{port}"


def _require_safe(config: ServerConfig) -> None:
    if config.server.insecure or _is_loopback(config.server.listen.rpartition(":")[0]):
        return
    raise ConfigError(
        f"server.listen = {config.server.listen!r} is reachable from other machines, and this version has no TLS: "
        "listen on 127.0.0.1, or say --insecure on a network where you trust everyone"
    )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _stop_on_signals() -> asyncio.Event:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signal_number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signal_number, stop.set)
    return stop
