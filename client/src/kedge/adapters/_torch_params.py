"""Which parameter of a module is which tensor of a run, and their values on the way to NumPy and back.

Names decide wherever there are names. Nothing here joins or sends: whatever does not fit is refused before that.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch

from kedge.wire.errors import KedgeError
from kedge.wire.manifest import DTYPES, Manifest, TensorSpec, unsupported_dtype

_DTYPES = {getattr(torch, name): dtype for name, dtype in DTYPES.items()}
_BFLOAT16 = DTYPES["bfloat16"]


def as_array(tensor: Any) -> np.ndarray:
    """The values of a tensor; in memory that both share, if it is on the CPU."""
    values = tensor.detach().cpu()
    if values.dtype is torch.bfloat16:  # which NumPy knows by another package's name only
        return np.asarray(values.view(torch.int16).numpy()).view(_BFLOAT16)
    return np.asarray(values.numpy())


def as_tensor(array: np.ndarray) -> Any:
    """The values of an array as a tensor, in memory that both share."""
    if array.dtype == _BFLOAT16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def gradient(name: str, parameter: Any) -> np.ndarray:
    """What to push for a parameter: zeros if it has no gradient.

    Raises:
        KedgeError: UNSUPPORTED_STRUCTURE for a sparse gradient.
    """
    grad = parameter.grad
    if grad is None:
        return np.zeros(tuple(parameter.shape), np.float32)
    if grad.layout is not torch.strided:
        raise KedgeError(
            "UNSUPPORTED_STRUCTURE",
            f"the gradient of {name!r} is sparse: make its layer with sparse=False, or set p.grad = p.grad.to_dense()",
            tensor=name,
        )
    return as_array(grad)


def check_parameter(name: str, parameter: Any) -> None:
    """Refuses a parameter that cannot be held.

    Raises:
        KedgeError: UNSUPPORTED_DTYPE, or UNSUPPORTED_STRUCTURE for one without memory.
    """
    if parameter.dtype not in _DTYPES:
        raise unsupported_dtype(name, str(parameter.dtype).removeprefix("torch."))
    if parameter.is_meta:
        raise KedgeError(
            "UNSUPPORTED_STRUCTURE",
            f"parameter {name!r} is on the meta device: give it memory first, as in model.to_empty(device='cpu')",
            tensor=name,
        )


def named_groups(params: Any, manifest: Manifest, *, allow_missing: bool = False) -> list[dict[str, Any]]:
    """Parameter groups as (name, parameter) pairs, checked against the run's tensors.

    Args:
        params: as torch's optimizers take them.
        manifest: the run's.
        allow_missing: whether tensors of the run may be absent.

    Returns:
        New groups with the options that they came with. A parameter that requires no gradient and that the run does not
        have is left out.

    Raises:
        TypeError, ValueError: for what torch's optimizers do not take either.
        KedgeError: TENSOR_MISSING, TENSOR_UNEXPECTED, TENSOR_SHAPE_MISMATCH, UNSUPPORTED_DTYPE, UNSUPPORTED_STRUCTURE.
    """
    groups = as_groups(params)
    pairs = [pair for group in groups for pair in group["params"]]
    if pairs and all(name is None for name, _ in pairs):
        groups = _named_by_order(groups, manifest)
    elif any(name is None for name, _ in pairs):
        raise ValueError("params has names for some parameters only: give all of them with names, or none")
    groups = _known_groups(groups, manifest)
    tensors = _checked_tensors(groups, manifest)
    for spec in manifest.tensors:
        if spec.name not in tensors and not allow_missing:
            raise KedgeError(
                "TENSOR_MISSING",
                f"params has no {spec.name!r}, which the run has: give every parameter, also those that need no "
                "gradient; one that is tied to another comes with named_parameters(remove_duplicate=False)",
                tensor=spec.name,
            )
    return groups


def left_out(given: list[dict[str, Any]], groups: list[dict[str, Any]]) -> dict[str, Any]:
    """The parameters of the groups that were given, by name or number, that are not in those made of them."""
    held = {id(tensor) for group in groups for _, tensor in group["params"]}
    pairs = [pair for group in given for pair in group["params"]]
    return {name or f"parameter {i}": tensor for i, (name, tensor) in enumerate(pairs) if id(tensor) not in held}


def check_left_out(parameters: Mapping[str, Any]) -> None:
    """Refuses a gradient of what the run does not have.

    Raises:
        ValueError: that names the parameter.
    """
    for name, parameter in parameters.items():
        if parameter.requires_grad and parameter.grad is not None:
            raise ValueError(
                f"{name!r} has a gradient and is not in the run, since it required none when this optimizer was made: "
                "create a run while it requires one, or set its requires_grad=False and grad=None"
            )


def groups_of_model(model: Any, param_groups: Any) -> list[dict[str, Any]]:
    """Parameter groups as (name, parameter) pairs, with the module's names.

    Args:
        model: the module.
        param_groups: torch's groups of its parameters, with names or without; None for all in one group.

    Raises:
        TypeError, ValueError: for what torch's optimizers do not take either, and for parameters of another module.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = as_groups(model.named_parameters() if param_groups is None else param_groups)
    for index, group in enumerate(groups):
        for name, parameter in group["params"]:
            if id(parameter) not in names:
                raise ValueError(
                    f"param_groups has {name or 'a parameter'} in group {index}, which is no parameter of the model"
                )
        group["params"] = [(names[id(parameter)], parameter) for _, parameter in group["params"]]
    return groups


def groups_to_create(groups: list[dict[str, Any]], is_held: Callable[[str], bool]) -> list[dict[str, Any]]:
    """The groups with what a run is created with.

    Args:
        groups: of (name, parameter) pairs.
        is_held: whether a parameter of this name is part of the run although it requires no gradient.

    Raises:
        KedgeError: UNSUPPORTED_DTYPE, UNSUPPORTED_STRUCTURE.
    """
    held = [
        {**group, "params": [(name, p) for name, p in group["params"] if p.requires_grad or is_held(name)]}
        for group in groups
    ]
    for name, parameter in (pair for group in held for pair in group["params"]):
        check_parameter(name, parameter)
    return held


def as_groups(params: Any) -> list[dict[str, Any]]:
    """New groups with (name or None, parameter) pairs in "params".

    Raises:
        TypeError, ValueError: for what torch's optimizers do not take either.
    """
    if isinstance(params, torch.Tensor | torch.nn.Module | Mapping | str) or not isinstance(params, Iterable):
        raise TypeError(f"params is a {type(params).__name__}: give model.named_parameters(), or a list of groups")
    given = list(params)
    if not given:
        raise ValueError("params is empty: a generator, as model.parameters() is, gives its parameters only once")
    if not isinstance(given[0], dict):
        given = [{"params": given}]
    return [_as_group(group) for group in given]


def _as_group(group: Any) -> dict[str, Any]:
    if not isinstance(group, dict) or "params" not in group:
        raise TypeError(f"params holds {group!r}: each parameter group is a dict with 'params'")
    params = group["params"]
    params = [params] if isinstance(params, torch.Tensor) else list(params)
    if "param_names" in group:  # as a torch optimizer keeps them
        params = list(zip(group["param_names"], params, strict=True))
    options = {key: value for key, value in group.items() if key != "param_names"}
    return {**options, "params": [_as_pair(param) for param in params]}


def _as_pair(param: Any) -> tuple[str | None, Any]:
    name, tensor = param if isinstance(param, tuple) and len(param) == 2 else (None, param)
    if not isinstance(tensor, torch.Tensor) or not isinstance(name, str | None):
        raise TypeError(f"params holds a {type(param).__name__}: give parameters, or (name, parameter) pairs")
    return name, tensor


def _named_by_order(groups: list[dict[str, Any]], manifest: Manifest) -> list[dict[str, Any]]:
    """Gives parameters without names those of the run's tensors, in order."""
    tensors = [tensor for group in groups for _, tensor in group["params"]]
    if len(tensors) != len(manifest.tensors):  # those that the run may have been made without
        kept = [tensor for tensor in tensors if tensor.requires_grad]
        _check_left_out(kept, [tensor for tensor in tensors if not tensor.requires_grad])
        tensors = kept
    _check_order(tensors, manifest)
    _check_unambiguous(groups)
    names = {id(tensor): spec.name for tensor, spec in zip(tensors, manifest.tensors, strict=True)}
    return [
        {**group, "params": [(names[id(tensor)], tensor) for _, tensor in group["params"] if id(tensor) in names]}
        for group in groups
    ]


def _check_left_out(kept: list[Any], left_out: list[Any]) -> None:
    """Refuses to guess which of several parameters of one shape the run has."""
    for shape in {tuple(tensor.shape) for tensor in kept} & {tuple(tensor.shape) for tensor in left_out}:
        raise ValueError(
            f"params has parameters of shape {shape} with and without requires_grad, more than the run has, and no "
            "names to tell them apart: give names, as model.named_parameters() does"
        )


def _check_order(tensors: list[Any], manifest: Manifest) -> None:
    specs = manifest.tensors
    if len(tensors) != len(specs):
        reason = "TENSOR_MISSING" if len(tensors) < len(specs) else "TENSOR_UNEXPECTED"
        name = specs[len(tensors)].name if len(tensors) < len(specs) else f"parameter {len(specs)}"
        raise KedgeError(
            reason,
            f"params has {len(tensors)} parameters without names, the run has {len(specs)} tensors: give all of them, "
            "or names, as model.named_parameters() does",
            tensor=name,
        )
    for index, (tensor, spec) in enumerate(zip(tensors, specs, strict=True)):
        _check_shape(f"parameter {index}", tensor, spec, hint="; give names, as model.named_parameters() does")


def _check_unambiguous(groups: list[dict[str, Any]]) -> None:
    """Refuses groups whose order alone would have to tell two parameters of one shape apart."""
    shapes: Counter[tuple[int, ...]] = Counter()
    for group in groups:
        shapes.update({tuple(tensor.shape) for _, tensor in group["params"]})
    for shape, count in shapes.items():
        if count > 1:
            raise ValueError(
                f"params has parameters of shape {shape} in {count} groups, and no names to tell them apart: give "
                "(name, parameter) pairs, as list(model.named_parameters()) has them"
            )


def _known_groups(groups: list[dict[str, Any]], manifest: Manifest) -> list[dict[str, Any]]:
    """The groups without what needs no gradient and is not the run's."""
    names = {spec.name for spec in manifest.tensors}
    return [
        {**group, "params": [(name, p) for name, p in group["params"] if name in names or p.requires_grad]}
        for group in groups
    ]


def _checked_tensors(groups: list[dict[str, Any]], manifest: Manifest) -> dict[str, Any]:
    specs = {spec.name: spec for spec in manifest.tensors}
    tensors: dict[str, Any] = {}
    for name, tensor in (pair for group in groups for pair in group["params"]):
        if name not in specs:
            raise KedgeError(
                "TENSOR_UNEXPECTED",
                f"the run has no tensor {name!r}: leave the parameter out, or create a run that has it",
                tensor=name,
            )
        if name in tensors:
            raise ValueError(f"params has {name!r} twice: give each name once")
        check_parameter(name, tensor)
        _check_shape(repr(name), tensor, specs[name])
        tensors[name] = tensor
    return tensors


def _check_shape(what: str, tensor: Any, spec: TensorSpec, hint: str = "") -> None:
    if tuple(tensor.shape) != spec.shape:
        raise KedgeError(
            "TENSOR_SHAPE_MISMATCH",
            f"{what} has shape {tuple(tensor.shape)}, the run's {spec.name!r} has {spec.shape}{hint}",
            tensor=spec.name,
            expected=spec.shape,
            got=tuple(tensor.shape),
        )
