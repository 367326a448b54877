"""Runs as plain values: what `--json` prints. Fields are named as in `kedge.RunInfo` and `kedge.RunStatus`.

JSON has no NaN and no infinity: a loss that is one becomes null.
"""

import dataclasses
import math
from typing import Any

from kedge.optim import Lookahead, Optimizer
from kedge.policies import Policy
from kedge.transport.values import RunInfo
from kedge.wire.manifest import DTYPES, Manifest


def run_fields(info: RunInfo) -> dict[str, Any]:
    """A run without its tensors."""
    return {
        "name": info.name,
        "create_time": info.create_time.isoformat(),
        "parameter_count": info.parameter_count,
        "optimizer": _with_type(info.optimizer),
        "aggregation": _with_type(info.aggregation),
        "status": _finite(dataclasses.asdict(info.status)),
    }


def manifest_fields(manifest: Manifest) -> dict[str, Any]:
    """A run's tensors."""
    tensors = [{"name": t.name, "shape": list(t.shape), "dtype": t.dtype} for t in manifest.tensors]
    return {"tensor_count": len(tensors), "size_bytes": size_bytes(manifest), "tensors": tensors}


def size_bytes(manifest: Manifest) -> int:
    """The bytes of one kind of weights in the dtypes of the manifest."""
    return sum(spec.size * DTYPES[spec.dtype].itemsize for spec in manifest.tensors)


def optimizer_title(optimizer: Optimizer) -> str:
    """Its name, with that of the optimizer inside it: Lookahead(AdaBelief)."""
    name = type(optimizer).__name__
    return f"{name}({type(optimizer.base_optimizer).__name__})" if isinstance(optimizer, Lookahead) else name


def policy_title(policy: Policy) -> str:
    """A policy as it is written, without the arguments that have their default: Synchronous(quorum=4)."""
    given = [(field, getattr(policy, field.name)) for field in dataclasses.fields(policy)]
    arguments = [f"{field.name}={value!r}" for field, value in given if value != field.default]
    return f"{type(policy).__name__}({', '.join(arguments)})"


def _with_type(value: Any) -> Any:
    if not dataclasses.is_dataclass(value):
        return value
    fields = {field.name: _with_type(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return {"type": type(value).__name__} | fields


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
