"""The server's configuration: one TOML file, and KEDGE_SECTION__FIELD variables over it. Unknown keys are errors.

What belongs to a run (its optimizer, its aggregation) is not here: a run's creator chooses that.
"""

import os
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

_ENVIRONMENT_NAME = re.compile(r"KEDGE_([A-Z]+)__([A-Z_]+)")
_MIB = 1 << 20


class ConfigError(Exception):
    """A configuration that cannot be used. The message names the key and says what to do."""


def _check_listen(listen: str) -> str:
    host, _, port = listen.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise ValueError("write HOST:PORT, as in 127.0.0.1:50051 or [::1]:50051; port 0 picks a free one")
    return listen


def _check_data_dir(path: object) -> object:
    if path == "" or (isinstance(path, Path) and path == Path()):
        raise ValueError("give a directory, ./ for the one that you are in")
    return path


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class ServerSection(_Section):
    """Where it listens, and how it ends."""

    listen: Annotated[str, AfterValidator(_check_listen)] = "127.0.0.1:50051"
    """HOST:PORT; port 0 picks a free one."""
    insecure: bool = False
    """Serve beyond loopback without TLS and authentication."""
    reflection: bool = False
    """Tell callers about the services, for tools that ask for that."""
    data_dir: Annotated[Path | None, BeforeValidator(_check_data_dir)] = None
    """Where runs are kept; unset: in memory only, and they end with the server. One server at a time may have it."""
    grace_seconds: float = Field(default=10.0, ge=0)
    """How long a stopping server has for its last checkpoints, and then for calls in flight."""
    max_concurrent_streams: int = Field(default=4096, ge=1)
    """Streams that one connection may hold open. Workers of one client share its connection, and wait beyond this."""
    shared_memory: bool = True
    """Let workers of the same host and user hand gradients and weights over in memory that they share. Linux only."""


class TlsSection(_Section):
    """Encryption. The files are read again when they change, for the connections that are made from then on."""

    cert_file: Path | None = None
    """The server's certificate and those that link it to its CA, PEM. With it, the server speaks TLS only."""
    key_file: Path | None = None
    """The certificate's private key, PEM."""
    client_ca_file: Path | None = None
    """The CAs whose certificates clients have to show, PEM; unset: clients show none."""
    max_connection_age_seconds: float = Field(default=600.0, gt=0)
    """How long a connection may last before its client is asked to make another one: with what it was made with then
    counts no longer. Clients of this project do so without a word."""
    max_connection_age_grace_seconds: float = Field(default=60.0, gt=0)
    """How long calls may go on after that."""

    @model_validator(mode="after")
    def _check_pair(self) -> Self:
        if (self.cert_file is None) != (self.key_file is None):
            raise ValueError("cert_file and key_file belong together: give both, or none")
        if self.client_ca_file is not None and self.cert_file is None:
            raise ValueError("client_ca_file needs cert_file and key_file")
        return self


class AccessSection(_Section):
    """Who may do what."""

    tokens_file: Path | None = None
    """A file of `id:role:sha256` or `id:role:runs:sha256` lines, which `kedge-server token new` makes; read again when
    it changes. With it, every call needs a token, or a client certificate that says who it is."""


class LeasesSection(_Section):
    """How long a silent worker keeps its place."""

    default_seconds: float = Field(default=10.0, gt=0)
    """The lease of a worker that asks for none."""
    min_seconds: float = Field(default=0.5, gt=0)
    """The shortest lease granted."""
    max_seconds: float = Field(default=3600.0, gt=0)
    """The longest lease granted."""

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if not self.min_seconds <= self.default_seconds <= self.max_seconds:
            raise ValueError("min_seconds, default_seconds and max_seconds must not decrease in this order")
        return self


class LimitsSection(_Section):
    """What bounds the server, whatever its peers send."""

    staging_bytes: int = Field(default=8192 * _MIB, ge=_MIB)
    """Gradients and initial weights on their way in, all runs together."""
    upload_idle_seconds: float = Field(default=30.0, gt=0)
    """How long an upload may make no progress before it is refused and its buffer given back."""
    upload_min_bytes_per_second: int = Field(default=64 << 10, ge=1)
    """How slow an upload may be on the whole: it has upload_idle_seconds, and its size over this."""
    connections: int = Field(default=4096, ge=1)
    """Connections open at once, also those that have said nothing yet. One more is closed at once; its client tries
    again. Each takes a file descriptor of the process."""
    streams: int = Field(default=4096, ge=1)
    """Streams open at once: uploads, pulls, exchanges and watches. Small calls, as heartbeats, do not count."""
    read_idle_seconds: float = Field(default=30.0, gt=0)
    """How long a message may wait for its reader to take it before the reader is dropped."""
    reading_bytes: int = Field(default=4096 * _MIB, ge=_MIB)
    """Weights that newer ones have superseded but that someone reads still, all runs together. Beyond it the reader is
    dropped that made no progress for longest."""
    runs: int = Field(default=1000, ge=1)
    """Runs held at once."""
    workers_per_run: int = Field(default=1024, ge=1)
    """Leases held at once in a run."""
    contributions_per_run: int = Field(default=4096, ge=1)
    """Contributions of a run that are taken and not applied yet, in its open round and its queue."""
    events_per_run: int = Field(default=4096, ge=1)
    """Events of a run that are kept for those who watch it."""
    parameters_per_run: int = Field(default=2_000_000_000, ge=1)
    """Parameters of a run."""


class StorageSection(_Section):
    """How runs are kept in the data directory."""

    segment_bytes: int = Field(default=64 * _MIB, ge=4096)
    """A file of a journal does not grow beyond this, but for one that holds a single step."""
    journal_bytes: int = Field(default=1024 * _MIB, ge=4096)
    """A checkpoint is taken when the journal has grown by this since the last one, or by eight times the run's state if
    that is more. A server that is started anew applies all of that again."""
    sync_seconds: float = Field(default=0.5, gt=0, le=0.5)
    """At durability journal, how soon what is written is brought to the disk itself. What is acknowledged is lost with
    the machine's power for no longer than a second, so it is at most half of that."""


class DeviceSection(_Section):
    """The accelerator."""

    block_elements: int | None = Field(default=None, ge=1)
    """The length of a block of state; unset: the platform's best, 1 Mi elements on a CPU and 32 Mi elsewhere."""
    count: Annotated[int, Field(ge=1)] | Literal["all"] | None = None
    """How many of this host's devices a run's state is dealt to, or all; unset: one on a CPU, all elsewhere."""


class LogSection(_Section):
    """The log, on standard error."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    """The least important level that is written."""
    format: Literal["text", "json"] = "text"
    """Text for people, or one JSON object a line."""


class ServerConfig(_Section):
    """Everything that can be configured."""

    server: ServerSection = ServerSection()
    tls: TlsSection = TlsSection()
    access: AccessSection = AccessSection()
    leases: LeasesSection = LeasesSection()
    limits: LimitsSection = LimitsSection()
    storage: StorageSection = StorageSection()
    device: DeviceSection = DeviceSection()
    log: LogSection = LogSection()


def load(path: Path | None = None, *, overrides: dict[str, dict[str, Any]] | None = None) -> ServerConfig:
    """Reads the file, then the environment, then the overrides; the last one that sets a key wins.

    Raises:
        ConfigError: a file that cannot be read, an unknown key, or a value out of range.
    """
    merged: dict[str, dict[str, Any]] = {}
    for layer in (_from_file(path), _from_environment(), overrides or {}):
        for section, values in layer.items():
            if not isinstance(values, dict):
                raise ConfigError(f"{section} is not a section: write it under a [section] heading")
            merged.setdefault(section, {}).update(values)
    try:
        return ServerConfig.model_validate(merged)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(detail) for detail in error.errors())) from error


def _from_file(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error


def _from_environment() -> dict[str, dict[str, Any]]:
    for section, keys in ((name, _known_keys((name, ""))) for name in ServerConfig.model_fields):
        for key in keys:
            meant = f"KEDGE_{section}__{key}".upper()
            if meant.replace("__", "_", 1) in os.environ:
                raise ConfigError(f"{meant.replace('__', '_', 1)} is not read: write {meant}, with two underscores")
    layer: dict[str, dict[str, Any]] = {}
    for name, value in os.environ.items():
        match = _ENVIRONMENT_NAME.fullmatch(name)
        if match:
            layer.setdefault(match[1].lower(), {})[match[2].lower()] = value
    return layer


def _explain(detail: Any) -> str:
    key = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        known = ", ".join(_known_keys(detail["loc"]))
        return f"{key} is not a key of the configuration: known here are {known}"
    return f"{key} = {detail['input']!r}: {detail['msg']}"


def _known_keys(location: tuple[Any, ...]) -> list[str]:
    if len(location) == 1:
        return list(ServerConfig.model_fields)
    section = ServerConfig.model_fields[location[0]].annotation
    return list(getattr(section, "model_fields", ()))
