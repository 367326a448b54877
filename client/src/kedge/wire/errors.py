"""The catalogue of errors: every reason, its gRPC status, its retry rule, its exception and its metadata.

Domain code raises `KedgeError(reason, message, **metadata)`; one server interceptor turns it into a status with a
`google.rpc.ErrorInfo`, one client function turns that back. Identity is the reason, never the text.
`tools/generate_errors.py` writes docs/errors.md and proto/kedge/v1/error_reason.proto from here.
"""

from enum import StrEnum
from types import MappingProxyType
from typing import Any, NamedTuple

DOMAIN = "kedge.dev"


class Retry(StrEnum):
    """What may be done after an error."""

    NEVER = "never"
    """The same call fails again: change it first."""
    BACKOFF = "backoff"
    """The same call may succeed later; the SDK repeats it by itself within `retry_seconds`."""
    REJOIN = "rejoin"
    """After taking a new lease; the SDK does so by itself."""
    PULL = "pull"
    """After pulling newer weights and computing the gradient anew."""


class KedgeError(Exception):
    """Whatever goes wrong in Kedge. Its subclasses name the families; `reason` is its identity.

    Constructing it with a reason makes an instance of that reason's family: `KedgeError("RUN_NOT_FOUND", ...)` is a
    `NotFoundError`.

    Attributes:
        reason: a name of the catalogue (docs/errors.md).
        metadata: what the reason is about, by the keys that the catalogue lists; all values are text.
        retry_after_seconds: the delay that the server asks for, if it does.
    """

    reason: str
    metadata: dict[str, str]
    retry_after_seconds: float | None

    def __new__(cls, reason: str, *_: object, **__: object) -> "KedgeError":
        """An instance of the reason's family."""
        family = CATALOGUE[reason].exception if cls is KedgeError and reason in CATALOGUE else cls
        return super().__new__(family)

    def __init__(
        self, reason: str, message: str, *, retry_after_seconds: float | None = None, **metadata: object
    ) -> None:
        """Takes the reason, a message for people, and the metadata of the catalogue."""
        super().__init__(message)
        self.reason = reason
        self.metadata = {key: str(value) for key, value in metadata.items()}
        self.retry_after_seconds = retry_after_seconds

    def __str__(self) -> str:
        """The message with its reason."""
        return f"{self.message} [{self.reason}]"

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles by reason, message and metadata, as process pools need."""
        return _rebuild, (self.reason, self.message, self.retry_after_seconds, self.metadata)

    @property
    def message(self) -> str:
        """The message alone."""
        return str(self.args[0])

    @property
    def entry(self) -> "Entry":
        """Its entry in the catalogue; that of INTERNAL for a reason that this version does not know."""
        return CATALOGUE.get(self.reason, CATALOGUE["INTERNAL"])


def _rebuild(reason: str, message: str, delay: float | None, metadata: dict[str, str]) -> KedgeError:
    return KedgeError(reason, message, retry_after_seconds=delay, **metadata)


class InvalidInputError(KedgeError, ValueError):
    """What was given is wrong by itself: a name, a number, a tensor, a message."""


class NotFoundError(KedgeError, LookupError):
    """What was named does not exist."""


class ConflictError(KedgeError):
    """What was asked for contradicts what exists."""


class LeaseError(KedgeError):
    """The worker's lease does not allow it."""


class AccessError(KedgeError):
    """Who calls is not known, or may not do this."""


class ResourceExhaustedError(KedgeError):
    """A limit of the server is reached."""


class WaitTimeoutError(KedgeError):
    """What was waited for did not happen in time."""


class UnavailableError(KedgeError):
    """No server answers, or it is going away."""


class InternalError(KedgeError):
    """The server failed: a defect."""


class Entry(NamedTuple):
    """One reason of the catalogue."""

    status: str
    """The name of the gRPC status code."""
    retry: Retry
    exception: type[KedgeError]
    metadata: tuple[str, ...]
    help: str
    """What happened and what to do, in a sentence."""


def _invalid(text: str, *metadata: str) -> Entry:
    return Entry("INVALID_ARGUMENT", Retry.NEVER, InvalidInputError, metadata, text)


def _no_access(status: str, text: str, *metadata: str, retry: Retry = Retry.NEVER) -> Entry:
    return Entry(status, retry, AccessError, metadata, text)


CATALOGUE: MappingProxyType[str, Entry] = MappingProxyType(
    {
        # What was given.
        "MALFORMED_MESSAGE": _invalid(
            "The bytes are not the message that this method takes: generate from the .proto files of this version."
        ),
        "UNEXPECTED_MESSAGE": _invalid(
            "The stream's messages are out of order: send a header, then chunks, then a trailer.", "expected", "got"
        ),
        "INVALID_NAME": _invalid("Not a resource name: use runs/{run} and runs/{run}/workers/{worker}.", "name"),
        "INVALID_CONFIGURATION": _invalid(
            "An optimizer, schedule, policy or setting is out of its range: the field is named.", "field"
        ),
        "MANIFEST_INVALID": _invalid(
            "A manifest without tensors, with a name twice, or with offsets or a digest that do not fit.", "tensor"
        ),
        "TENSOR_MISSING": _invalid(
            "A tensor of the manifest is missing: give every one, zeros where there is no gradient.", "tensor"
        ),
        "TENSOR_UNEXPECTED": _invalid(
            "A tensor that the manifest does not know: leave it out, or create the run anew with it.", "tensor"
        ),
        "TENSOR_SHAPE_MISMATCH": _invalid("A tensor's shape is not the manifest's.", "tensor", "expected", "got"),
        "UNSUPPORTED_DTYPE": _invalid(
            "Only float32, bfloat16 and float16 are held: convert the array first.", "tensor", "dtype"
        ),
        "UNSUPPORTED_STRUCTURE": _invalid(
            "A tree may hold dicts, lists, tuples and arrays, and its keys no control characters.", "tensor"
        ),
        "MANIFEST_MISMATCH": _invalid(
            "The digest is not the run's: the gradient is of another model or another order of tensors.",
            "expected",
            "got",
        ),
        "SIZE_MISMATCH": _invalid(
            "The bytes declared are not those of the manifest in this dtype, or not those that came.", "expected", "got"
        ),
        "CHUNK_OUT_OF_RANGE": _invalid("A chunk reaches beyond the end of the flat range.", "offset", "size_bytes"),
        "CHUNK_OVERLAP": _invalid("A chunk begins before the end of the one before it.", "offset", "expected"),
        "CHUNK_GAP": _invalid(
            "A chunk begins after the end of the one before it: one is missing, or out of order.", "offset", "expected"
        ),
        "CHUNK_MISALIGNED": _invalid(
            "A chunk's offset or length is no multiple of the dtype's size, or it is empty.", "offset"
        ),
        "NON_FINITE_WEIGHTS": _invalid("The initial weights hold a NaN or an infinity.", "element"),
        "CHECKSUM_MISMATCH": Entry(
            "DATA_LOSS",
            Retry.BACKOFF,
            InvalidInputError,
            ("expected", "got"),
            "The bytes changed on the way: they do not have the trailer's CRC-32C. Send them again.",
        ),
        # What becomes of a contribution.
        "NON_FINITE_GRADIENT": _invalid(
            "The gradient holds a NaN or an infinity; nothing was changed. Skip the batch, or lower the rate.",
            "element",
        ),
        "GRADIENT_TOO_LARGE": _invalid(
            "The squares of the gradient's elements add up to more than float32 holds; nothing was changed. "
            "Lower the loss scale.",
            "sum_of_squares",
        ),
        "NORM_ABOVE_LIMIT": _invalid(
            "The gradient's norm is above the run's `max_norm`; nothing was changed. Clip it, or raise the limit.",
            "norm",
            "limit",
        ),
        "NORM_OUTLIER": _invalid(
            "The gradient's norm is far above what the run's workers send; nothing was changed. Look for bad data, or "
            "raise the run's `outlier_factor`.",
            "norm",
            "limit",
        ),
        "COHORT_TOO_SMALL": Entry(
            "ABORTED",
            Retry.PULL,
            ConflictError,
            ("contribution_count", "required_count"),
            "The round ended with fewer contributions than its trimmed mean or median needs; nothing was changed. "
            "Join more workers, or choose another `combine`.",
        ),
        "INVALID_EXAMPLE_COUNT": _invalid(
            "example_count must be at least 1: it weighs the contribution in the mean.", "example_count"
        ),
        "STALE_GRADIENT": Entry(
            "ABORTED",
            Retry.PULL,
            ConflictError,
            ("base_step", "step", "limit"),
            "The gradient's base_step is too old for the run's policy: pull and recompute.",
        ),
        "BASE_STEP_AHEAD": _invalid(
            "The gradient's base_step is one that the run has not reached: send the step that came with the weights.",
            "base_step",
            "step",
        ),
        "ALREADY_CONTRIBUTED": Entry(
            "ABORTED",
            Retry.PULL,
            ConflictError,
            ("step",),
            "The worker has contributed to this round already: pull the next step's weights first.",
        ),
        "AHEAD_OF_BOUND": Entry(
            "ABORTED",
            Retry.PULL,
            ConflictError,
            ("clock", "slowest_clock", "bound"),
            "The worker is as far ahead of the slowest one as the bound allows: pull, which waits for the others.",
        ),
        "SEQUENCE_GAP": Entry(
            "FAILED_PRECONDITION",
            Retry.NEVER,
            ConflictError,
            ("expected", "got"),
            "A sequence was skipped: number contributions 1, 2, 3, ... in each epoch.",
        ),
        "SEQUENCE_FORGOTTEN": Entry(
            "FAILED_PRECONDITION",
            Retry.NEVER,
            ConflictError,
            ("got", "oldest"),
            "So old a sequence that its result is no longer recorded. It was not applied again.",
        ),
        # Leases.
        "WORKER_NOT_FOUND": Entry(
            "NOT_FOUND", Retry.REJOIN, LeaseError, ("worker",), "No such worker has joined: join the run first."
        ),
        "LEASE_EXPIRED": Entry(
            "FAILED_PRECONDITION",
            Retry.REJOIN,
            LeaseError,
            ("worker", "epoch"),
            "The lease ran out without a heartbeat: join again. The contribution was not taken.",
        ),
        "WORKER_SUPERSEDED": Entry(
            "FAILED_PRECONDITION",
            Retry.NEVER,
            LeaseError,
            ("worker", "epoch", "current_epoch"),
            "Another process has joined under the same worker name: this one may not write any more.",
        ),
        "WORKER_EVICTED": Entry(
            "FAILED_PRECONDITION",
            Retry.NEVER,
            LeaseError,
            ("worker", "cause"),
            "An operator or the run's quarantine sent the worker away; the cause says why. What it sent since then was "
            "not taken.",
        ),
        "EPOCH_FORGOTTEN": Entry(
            "FAILED_PRECONDITION",
            Retry.NEVER,
            LeaseError,
            ("worker", "epoch"),
            "So old an epoch that its contributions are no longer recorded. Nothing was applied now.",
        ),
        # Runs.
        "RUN_NOT_FOUND": Entry(
            "NOT_FOUND", Retry.NEVER, NotFoundError, ("run",), "No such run: create it, or look at the list of runs."
        ),
        "RUN_ALREADY_EXISTS": Entry(
            "ALREADY_EXISTS",
            Retry.NEVER,
            ConflictError,
            ("run",),
            "A run of this name exists: choose another name, or use get_or_create_run.",
        ),
        "RUN_MISMATCH": Entry(
            "FAILED_PRECONDITION",
            Retry.NEVER,
            ConflictError,
            ("run", "field"),
            "The run that exists has another manifest or optimizer than the one asked for.",
        ),
        "RUN_FAILED": Entry(
            "INTERNAL",
            Retry.NEVER,
            InternalError,
            ("run",),
            "An update of this run failed; its state in memory is lost, and the server's log has the cause. A run that "
            "is kept on disk is there again once the server is started anew.",
        ),
        "SHARED_MEMORY_UNAVAILABLE": Entry(
            "FAILED_PRECONDITION",
            Retry.NEVER,
            ConflictError,
            ("cause",),
            'Client and server cannot share memory: use transport="grpc", or "auto", which does so by itself.',
        ),
        "COMPRESSION_UNSAFE": Entry(
            "FAILED_PRECONDITION",
            Retry.NEVER,
            ConflictError,
            ("optimizer", "wire_dtype"),
            "The run's optimizer diverges on gradients whose elements are all of one magnitude: cap its direction, as "
            "in AdaBelief(max_direction=1.0), or send another wire dtype.",
        ),
        "DURABILITY_UNAVAILABLE": Entry(
            "FAILED_PRECONDITION",
            Retry.NEVER,
            ConflictError,
            ("durability",),
            "The run cannot be, or is not, kept on disk: start the server with --data-dir, or create the run with "
            "another durability.",
        ),
        "CHECKPOINT_NOT_FOUND": Entry(
            "NOT_FOUND",
            Retry.NEVER,
            NotFoundError,
            ("checkpoint",),
            "No such checkpoint: look at the list of the run's checkpoints. Old ones are deleted as the run was told.",
        ),
        "CHECKPOINT_DAMAGED": Entry(
            "DATA_LOSS",
            Retry.NEVER,
            InternalError,
            ("checkpoint",),
            "The files of the checkpoint are not as they were written: choose another. Nothing was changed.",
        ),
        "STORAGE_FULL": Entry(
            "RESOURCE_EXHAUSTED",
            Retry.BACKOFF,
            ResourceExhaustedError,
            ("run",),
            "The server's disk is full, so that nothing can be acknowledged: free space. What was taken already is "
            "applied then, and pulls go on meanwhile.",
        ),
        "STORAGE_UNAVAILABLE": Entry(
            "UNAVAILABLE",
            Retry.BACKOFF,
            UnavailableError,
            ("run",),
            "The server's data directory cannot be written to, as when its file system has become read-only: mend it. "
            "What was taken already is applied then, and pulls go on meanwhile.",
        ),
        "NO_SLOW_WEIGHTS": Entry(
            "FAILED_PRECONDITION",
            Retry.NEVER,
            ConflictError,
            ("run",),
            "The run has no Lookahead, so no slow weights: pull the fast ones.",
        ),
        "STEP_NOT_REACHED": Entry(
            "DEADLINE_EXCEEDED",
            Retry.NEVER,
            WaitTimeoutError,
            ("step", "min_step"),
            "The run did not reach the step in the time given.",
        ),
        "WAITING_FOR_SLOWEST": Entry(
            "DEADLINE_EXCEEDED",
            Retry.NEVER,
            WaitTimeoutError,
            ("clock", "slowest_clock", "bound"),
            "The worker is ahead of the slowest one by more than the bound, and that one did not catch up in the time "
            "given: ask again.",
        ),
        # The server.
        "STAGING_FULL": Entry(
            "RESOURCE_EXHAUSTED",
            Retry.BACKOFF,
            ResourceExhaustedError,
            ("limit_bytes",),
            "Too many gradients are on their way in at once: push again after the delay.",
        ),
        "QUEUE_FULL": Entry(
            "RESOURCE_EXHAUSTED",
            Retry.BACKOFF,
            ResourceExhaustedError,
            ("limit",),
            "The run holds as many contributions as limits.contributions_per_run allows: push again after the delay.",
        ),
        "TOO_MANY_STREAMS": Entry(
            "RESOURCE_EXHAUSTED",
            Retry.BACKOFF,
            ResourceExhaustedError,
            ("limit",),
            "The server holds as many streams as limits.streams allows: open one after the delay.",
        ),
        "TOO_MANY_WORKERS": Entry(
            "RESOURCE_EXHAUSTED",
            Retry.NEVER,
            ResourceExhaustedError,
            ("limit",),
            "The run has as many workers as limits.workers_per_run allows.",
        ),
        "RUN_TOO_LARGE": Entry(
            "RESOURCE_EXHAUSTED",
            Retry.NEVER,
            ResourceExhaustedError,
            ("limit", "parameter_count"),
            "The model has more parameters, or a round more workers or contributions, than the server's limits allow.",
        ),
        "TOO_MANY_RUNS": Entry(
            "RESOURCE_EXHAUSTED",
            Retry.NEVER,
            ResourceExhaustedError,
            ("limit",),
            "The server holds as many runs as limits.runs allows: delete one.",
        ),
        "UPLOAD_STALLED": Entry(
            "DEADLINE_EXCEEDED",
            Retry.BACKOFF,
            WaitTimeoutError,
            ("idle_seconds",),
            "No message of an upload came for limits.upload_idle_seconds: send it again.",
        ),
        "READER_STALLED": Entry(
            "DEADLINE_EXCEEDED",
            Retry.BACKOFF,
            WaitTimeoutError,
            ("idle_seconds",),
            "The weights were not read for limits.read_idle_seconds, or more slowly than everyone else when memory for "
            "readers ran out: pull again.",
        ),
        "UNAUTHENTICATED": _no_access(
            "UNAUTHENTICATED",
            "The server asks who calls, and knows no token or client certificate of this call, or no more: give one.",
        ),
        "PERMISSION_DENIED": _no_access(
            "PERMISSION_DENIED",
            "The caller's role does not allow this method, or not on this run: use credentials that do. `run` is empty "
            "where it is the role alone.",
            *("role", "needs", "run"),
        ),
        "WRONG_IDENTITY": _no_access(
            "PERMISSION_DENIED",
            "The worker was joined by a caller with other credentials: join under a name of your own.",
            "worker",
        ),
        "TLS_FAILED": _no_access(
            "UNAVAILABLE",
            "No TLS, the message says why. `cause` is CERTIFICATE_EXPIRED, CERTIFICATE_NOT_YET_VALID, UNKNOWN_CA, "
            "WRONG_NAME, CLIENT_CERTIFICATE_REFUSED, SERVER_IS_PLAINTEXT, SERVER_WANTS_TLS, TLS_VERSION or OTHER.",
            *("address", "cause"),
            retry=Retry.BACKOFF,  # files may be replaced meanwhile
        ),
        "SERVER_UNAVAILABLE": Entry(
            "UNAVAILABLE",
            Retry.BACKOFF,
            UnavailableError,
            ("address",),
            "No server answers at the address: start one, or check the address and the network.",
        ),
        "SERVER_DRAINING": Entry("UNAVAILABLE", Retry.BACKOFF, UnavailableError, (), "The server is shutting down."),
        "CANCELLED": Entry(
            "CANCELLED",
            Retry.NEVER,
            UnavailableError,
            (),
            "The call was cancelled: the worker or client was closed while it waited.",
        ),
        "UNSUPPORTED": Entry(
            "UNIMPLEMENTED",
            Retry.NEVER,
            InvalidInputError,
            ("method",),
            "This server does not know the method or feature: bring client and server to the same version.",
        ),
        "INTERNAL": Entry("INTERNAL", Retry.NEVER, InternalError, (), "A defect in the server. Its log has the cause."),
    }
)
