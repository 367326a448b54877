"""The client of a server: connecting to it, and the runs that it holds."""

import logging
import uuid
from collections.abc import Sequence
from typing import Any, NamedTuple

from kedge import optim, policies, tree
from kedge.config import (
    CredentialSources,
    FilePath,
    check_token_stays_secret,
    resolve_address,
    resolve_credentials,
)
from kedge.optim.groups import assign, check_groups
from kedge.retry import Retrier
from kedge.run import Run
from kedge.settings import check_admission, check_aggregation, check_checkpoints, check_durability
from kedge.transport import NewRun, RunInfo, Transport, in_process
from kedge.wire.errors import KedgeError
from kedge.wire.manifest import Manifest, TensorSpec
from kedge.wire.names import parse_run, run_name

ALL_THAT_ARE_FINITE = policies.Admission()
"""The admission of a run that is created without one."""

_logger = logging.getLogger("kedge")


def connect(
    address: str | None = None,
    *,
    token: str | None = None,
    token_file: FilePath | None = None,
    ca_file: FilePath | None = None,
    cert_file: FilePath | None = None,
    key_file: FilePath | None = None,
    server_name: str | None = None,
    timeout_seconds: float = 10.0,
    retry_seconds: float = 60.0,
) -> "Client":
    """Connects to a server; blocks until it answers.

    The connection is TLS if `ca_file` or `cert_file` is given. Files are read again when they change, so that tokens
    and certificates can be replaced while training goes on. What is None comes from the environment, if it is there.

    Args:
        address: host:port; None takes KEDGE_ADDRESS.
        token: says who calls; for a secret, a file is the better place.
        token_file: a file that holds one; None takes KEDGE_TOKEN_FILE.
        ca_file: the CAs that the server's certificate is checked against, in PEM, or "system" for those that this
            system trusts; None takes KEDGE_CA_FILE, and the system's where only a certificate is given.
        cert_file: this side's certificate in PEM, for a server that asks for one; None takes KEDGE_CERT_FILE.
        key_file: its private key, not encrypted; None takes KEDGE_KEY_FILE.
        server_name: the name that the server's certificate must have, where it is not that of the address; None takes
            KEDGE_SERVER_NAME.
        timeout_seconds: how long to wait for the server.
        retry_seconds: how long each later call goes on trying while the server cannot be reached, or asks to come back.

    Returns:
        A client; close it, or use it in a `with` block.

    Raises:
        ValueError: if there is no address, a file cannot be used, arguments contradict each other, or a token would go
            over a network unencrypted.
        KedgeError: SERVER_UNAVAILABLE; TLS_FAILED, which says why; UNAUTHENTICATED.

    Example:
        >>> with kedge.connect("localhost:50051") as client:
        ...     run = client.get_run("digits")
    """
    sources = resolve_credentials(
        token=token,
        token_file=token_file,
        ca_file=ca_file,
        cert_file=cert_file,
        key_file=key_file,
        server_name=server_name,
    )
    transport = _transport_to(resolve_address(address), sources)
    try:
        transport.wait_until_ready(timeout_seconds)
    except BaseException:
        transport.close()
        raise
    return Client(transport, Retrier(retry_seconds))


class Client:
    """A connection to a server. `kedge.connect` makes it; it may be used from any thread."""

    def __init__(self, transport: Transport, retrier: Retrier) -> None:
        self._transport = transport
        self._retrier = retrier

    def create_run(
        self,
        name: str,
        *,
        params: Any,
        optimizer: optim.Optimizer,
        aggregation: policies.Policy,
        groups: Sequence[optim.Group] = (),
        admission: policies.Admission = ALL_THAT_ARE_FINITE,
        durability: policies.Durability | None = None,
        checkpoints: policies.Checkpoints | None = None,
    ) -> Run:
        """Creates a run; blocks until the server holds it.

        Args:
            name: "digits" or "runs/digits".
            params: the initial weights: nested dicts, lists, tuples and named tuples of arrays, each float32, bfloat16
                or float16.
            optimizer: of `kedge.optim`.
            aggregation: `kedge.Synchronous`, `kedge.Asynchronous`, `kedge.BoundedStaleness` or `kedge.Buffered`.
            groups: tensors with hyperparameters of their own, `kedge.optim.Group`; each tensor belongs to the first
                that takes it.
            admission: which gradients it takes; by default all that are finite.
            durability: what an acknowledged push is to survive: "memory", "checkpoint", "journal" or "journal-sync".
                None: "journal" where the server has a data directory, else "memory".
            checkpoints: when checkpoints are taken, and which are kept; None: `kedge.Checkpoints()`.

        Returns:
            The run. What is pulled from it has the structure of `params`.

        Raises:
            ValueError: for groups of one name, or a group that gets no tensor.
            KedgeError: INVALID_NAME, UNSUPPORTED_DTYPE, UNSUPPORTED_STRUCTURE, MANIFEST_INVALID (nothing was sent);
                INVALID_CONFIGURATION for what only the server can judge, as the arguments of `optim.Optax`;
                DURABILITY_UNAVAILABLE if the server has no data directory; RUN_ALREADY_EXISTS, NON_FINITE_WEIGHTS,
                RUN_TOO_LARGE, TOO_MANY_RUNS; SERVER_UNAVAILABLE.

        Example:
            >>> run = client.create_run(
            ...     "digits",
            ...     params={"w": np.zeros((64, 10), np.float32)},
            ...     optimizer=optim.Lookahead(optim.AdaBelief(lr=1e-3), sync_period=5, alpha=0.5),
            ...     aggregation=kedge.Synchronous(quorum=4),
            ... )
        """
        config = _checked(_RunConfig(optimizer, aggregation, groups, admission, durability, checkpoints))
        leaves = tree.named_leaves(params)
        manifest = tree.manifest_from_leaves(leaves)
        run_id = parse_run(run_name(name))
        assign(config.groups, leaves)
        new = NewRun(run_id, manifest, list(leaves.values()), **config._asdict(), request_id=uuid.uuid4().hex)
        info = self._retrier.call(lambda: self._transport.create_run(new))
        return Run(self._transport, self._retrier, info, manifest=manifest, template=tree.Template.from_tree(params))

    def get_run(self, name: str, *, like: Any = None) -> Run:
        """Opens a run that exists.

        Args:
            name: "digits" or "runs/digits".
            like: a tree named and shaped as the run's params, whose structure the pulled weights get; None gives a flat
                dict from tensor names to arrays.

        Raises:
            KedgeError: INVALID_NAME, RUN_NOT_FOUND; TENSOR_MISSING, TENSOR_UNEXPECTED or TENSOR_SHAPE_MISMATCH if
                `like` does not fit; SERVER_UNAVAILABLE.
        """
        info = self._retrier.call(lambda: self._transport.get_run(run_name(name)))
        manifest = _manifest_of(info)
        if like is None:
            return Run(self._transport, self._retrier, info, manifest=manifest, template=tree.Template.flat(manifest))
        tree.arrays_in_order(like, manifest)
        return Run(self._transport, self._retrier, info, manifest=manifest, template=tree.Template.from_tree(like))

    def get_or_create_run(
        self,
        name: str,
        *,
        params: Any,
        optimizer: optim.Optimizer,
        aggregation: policies.Policy,
        groups: Sequence[optim.Group] = (),
        admission: policies.Admission = ALL_THAT_ARE_FINITE,
        durability: policies.Durability | None = None,
        checkpoints: policies.Checkpoints | None = None,
    ) -> Run:
        """Opens a run, or creates it if it does not exist: workers may call this in any order.

        Args:
            name: as for `create_run`.
            params: as for `create_run`. If the run exists only their names, shapes, dtypes and order matter.
            optimizer: as for `create_run`. If the run exists it must have the same.
            aggregation: as for `create_run`. If the run exists its own holds, and a warning says so
                where they differ.
            groups: as for `create_run`. If the run exists it must have the same.
            admission: as for `create_run`. If the run exists its own holds, as with the aggregation.
            durability: the same. None is no other than the run's own.
            checkpoints: the same.

        Raises:
            KedgeError: RUN_MISMATCH if the run that exists has other tensors, another optimizer or other groups; also
                those of `create_run`.
        """
        config = _checked(_RunConfig(optimizer, aggregation, groups, admission, durability, checkpoints))
        try:
            return self._get_same_run(name, params, config)
        except KedgeError as error:
            if error.reason != "RUN_NOT_FOUND":
                raise
        try:
            return self.create_run(name, params=params, **config._asdict())
        except KedgeError as error:
            if error.reason != "RUN_ALREADY_EXISTS":
                raise
        return self._get_same_run(name, params, config)

    def list_runs(self) -> list[RunInfo]:
        """What the server says of each of its runs, by name and without manifests.

        Raises:
            KedgeError: SERVER_UNAVAILABLE.
        """
        return self._retrier.call(self._transport.list_runs)

    def delete_run(self, name: str) -> None:
        """Deletes a run with its weights and leases. Whatever waits in it fails with RUN_NOT_FOUND.

        Args:
            name: "digits" or "runs/digits".

        Raises:
            KedgeError: INVALID_NAME, RUN_NOT_FOUND, SERVER_UNAVAILABLE.
        """
        self._retrier.call(lambda: self._transport.delete_run(run_name(name)))

    def close(self) -> None:
        """Ends the connection; what still waits on it fails with CANCELLED. May be called twice."""
        self._retrier.close()
        self._transport.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _get_same_run(self, name: str, params: Any, config: "_RunConfig") -> Run:
        info = self._retrier.call(lambda: self._transport.get_run(run_name(name)))
        wanted = tree.manifest_from_leaves(tree.named_leaves(params))
        manifest = _manifest_of(info)
        if manifest.digest != wanted.digest:
            raise _mismatch(info, "manifest", _first_difference(manifest, wanted))
        if optim.from_spec(info.optimizer.spec()) != optim.from_spec(config.optimizer.spec()):
            raise _mismatch(info, "optimizer", f"it has {info.optimizer}, asked for is {config.optimizer}")
        if info.groups != config.groups:
            raise _mismatch(info, "groups", f"it has {list(info.groups)}, asked for are {list(config.groups)}")
        for setting in ("aggregation", "admission", "durability", "checkpoints"):
            held, asked = getattr(info, setting), getattr(config, setting)
            if asked is not None and not _is_same(held, asked):
                message = "%s exists and keeps its %s: it has %s, asked for is %s"
                _logger.warning(message, info.name, setting, held, asked)
        return Run(self._transport, self._retrier, info, manifest=manifest, template=tree.Template.from_tree(params))


class _RunConfig(NamedTuple):
    """What a run is created with, besides its tensors."""

    optimizer: optim.Optimizer
    aggregation: policies.Policy
    groups: Sequence[optim.Group]
    admission: policies.Admission
    durability: policies.Durability | None
    checkpoints: policies.Checkpoints | None


def _transport_to(address: str, sources: CredentialSources) -> Transport:
    if in_process.is_in_process(address):
        return in_process.transport_to(address)
    check_token_stays_secret(address, sources)
    from kedge.transport.credentials import Credentials
    from kedge.transport.grpc import GrpcTransport

    return GrpcTransport(address, Credentials(sources))


def _checked(config: _RunConfig) -> _RunConfig:
    """The same, its groups as a tuple.

    Raises:
        TypeError, ValueError: for what can be no such setting; the message names it.
    """
    if not isinstance(config.optimizer, optim.Optimizer):
        raise TypeError(f"optimizer is {config.optimizer!r}: give one of kedge.optim, as in optim.Adam(lr=1e-3)")
    check_aggregation(config.aggregation)
    check_admission(config.admission)
    check_durability(config.durability)
    check_checkpoints(config.checkpoints)
    return config._replace(groups=check_groups(config.groups))


def _is_same(held: Any, asked: Any) -> bool:
    """Whether two settings are one on the wire, which holds seconds as whole nanoseconds."""
    if held == asked or isinstance(asked, str):
        return bool(held == asked)
    from kedge.wire.policies import admission_to_wire, checkpoints_to_wire, policy_to_wire  # brings protobuf along

    to_wires: dict[type, Any] = {policies.Admission: admission_to_wire, policies.Checkpoints: checkpoints_to_wire}
    to_wire = to_wires.get(type(asked), policy_to_wire)
    return bool(to_wire(held) == to_wire(asked))


def _manifest_of(info: RunInfo) -> Manifest:
    if info.manifest is None:
        raise KedgeError("INTERNAL", f"the server described {info.name} without its tensors")
    return info.manifest


def _mismatch(info: RunInfo, field: str, difference: str) -> KedgeError:
    return KedgeError(
        "RUN_MISMATCH",
        f"{info.name} exists and has another {field}: {difference}; choose another name, or delete the run",
        run=info.name,
        field=field,
    )


def _first_difference(manifest: Manifest, wanted: Manifest) -> str:
    for held, asked in zip(manifest.tensors, wanted.tensors, strict=False):
        if held != asked:
            return f"it has {_described(held)} where {_described(asked)} is asked for"
    return f"it has {len(manifest.tensors)} tensors, asked for are {len(wanted.tensors)}"


def _described(spec: TensorSpec) -> str:
    return f"{spec.name!r} of {spec.dtype} {list(spec.shape)}"
