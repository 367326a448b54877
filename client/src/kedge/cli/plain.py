"""Runs and events as plain values: what `--json` prints. Fields are named as in `kedge.RunInfo` and `kedge.Event`.

JSON has no NaN and no infinity: a loss that is one becomes null.
"""

import dataclasses
import math
from typing import Any

from kedge.optim import Lookahead, Optax, Optimizer
from kedge.optim.controls import Change, RecordedChange
from kedge.policies import Admission, Checkpoints, Policy
from kedge.transport.values import Checkpoint, Event, RunInfo
from kedge.wire.manifest import DTYPES, Manifest


def run_fields(info: RunInfo) -> dict[str, Any]:
    """A run without its tensors."""
    return {
        "name": info.name,
        "create_time": info.create_time.isoformat(),
        "parameter_count": info.parameter_count,
        "optimizer": _with_type(info.optimizer),
        "aggregation": _with_type(info.aggregation),
        "admission": _with_type(info.admission),
        "groups": [_with_type(group) for group in info.groups],
        "durability": info.durability,
        "checkpoints": _with_type(info.checkpoints),
        "changes": [{"step": made.step, "group": made.group} | _with_type(made.change) for made in info.changes],
        "status": finite(dataclasses.asdict(info.status)),
    }


def checkpoint_fields(checkpoint: Checkpoint) -> dict[str, Any]:
    """A checkpoint."""
    fields = dataclasses.asdict(checkpoint) | {"create_time": checkpoint.create_time.isoformat()}
    return {name: finite(value) for name, value in fields.items()}


def event_fields(event: Event) -> dict[str, Any]:
    """An event."""
    fields = {field.name: getattr(event, field.name) for field in dataclasses.fields(event)}
    fields |= {"time": event.time.isoformat(), "aggregation": _with_type(event.aggregation)}
    return {name: finite(value) for name, value in fields.items()}


def manifest_fields(manifest: Manifest) -> dict[str, Any]:
    """A run's tensors."""
    tensors = [{"name": t.name, "shape": list(t.shape), "dtype": t.dtype} for t in manifest.tensors]
    return {"tensor_count": len(tensors), "size_bytes": size_bytes(manifest), "tensors": tensors}


def size_bytes(manifest: Manifest) -> int:
    """The bytes of one kind of weights in the dtypes of the manifest."""
    return sum(spec.size * DTYPES[spec.dtype].itemsize for spec in manifest.tensors)


def optimizer_title(optimizer: Optimizer) -> str:
    """Its name, with that of the optimizer inside it: Lookahead(AdaBelief)."""
    if isinstance(optimizer, Lookahead):
        return f"Lookahead({optimizer_title(optimizer.base_optimizer)})"
    return f"Optax({optimizer.name!r})" if isinstance(optimizer, Optax) else type(optimizer).__name__


def change_title(made: RecordedChange) -> str:
    """A change of hyperparameters as it was made: lr=0.01, weight_decay=0.1 from step 200."""
    given = ", ".join(f"{field}={value!r}" for field, value in made.change._asdict().items() if value is not None)
    return f"{given}{f' of group {made.group!r}' if made.group else ''} from step {made.step}"


def policy_title(policy: Policy | Admission | Checkpoints) -> str:
    """A setting as it is written, without what has its default: Synchronous(quorum=4)."""
    given = [(field, getattr(policy, field.name)) for field in dataclasses.fields(policy)]
    arguments = [f"{field.name}={value!r}" for field, value in given if value != field.default]
    return f"{type(policy).__name__}({', '.join(arguments)})"


def finite(value: Any) -> Any:
    """The same with null for every number that JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _with_type(value: Any) -> Any:
    if isinstance(value, Change):
        return _with_type({field: of for field, of in value._asdict().items() if of is not None})
    if isinstance(value, dict):
        return {key: _with_type(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [_with_type(item) for item in value]
    if value == math.inf:
        return "off"  # a clip
    if not dataclasses.is_dataclass(value):
        return value
    fields = {field.name: _with_type(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return {"type": type(value).__name__} | fields
