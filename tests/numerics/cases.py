"""The optimizers that are compared with the oracle and with optax: each as a user writes it, and in plain numbers."""

from typing import Any, NamedTuple

import numpy as np

from kedge import optim

from .oracle import Recipe, adabelief

PARAMETER_COUNT = 41
STEP_COUNT = 60
EXAMPLE_COUNTS = (3, 1, 4)
"""Of the contributions of every round: their shares are .375, .125 and .5."""


class Case(NamedTuple):
    """One optimizer."""

    name: str
    optimizer: optim.Optimizer
    recipe: Recipe


def _step_lr(**fields: Any) -> tuple[str, dict[str, Any]]:
    return ("step_lr", fields)


def _exponential_lr(**fields: Any) -> tuple[str, dict[str, Any]]:
    return ("exponential_lr", fields)


def _constant_lr(**fields: Any) -> tuple[str, dict[str, Any]]:
    return ("constant_lr", fields)


_CLIPS: dict[str, float] = {"grad_clip_norm": 4.0, "grad_clip_value": 0.7}
_CLIPPED: dict[str, float] = {"clip_norm": 4.0, "clip_value": 0.7}
"""The norms of `make_rounds` lie between 0.5 and 10: some rounds are clipped, some are not."""

CASES = [
    Case("sgd", optim.SGD(lr=0.05), Recipe(rule="sgd", lr=0.05)),
    Case(
        "sgd_decay_constant_lr",
        optim.SGD(lr=optim.ConstantLR(0.05, 0.25, 7, steps_per_epoch=2), weight_decay=0.1),
        Recipe(rule="sgd", lr=_constant_lr(base_lr=0.05, factor=0.25, total_iters=7, steps_per_epoch=2), decay=0.1),
    ),
    Case("sgd_momentum", optim.SGD(lr=0.02, momentum=0.9), Recipe(rule="sgd", lr=0.02, momentum=0.9)),
    Case(
        "sgd_nesterov_clip_norm",
        optim.SGD(lr=0.02, momentum=0.8, nesterov=True, grad_clip_norm=3.0),
        Recipe(rule="sgd", lr=0.02, momentum=0.8, nesterov=True, clip_norm=3.0),
    ),
    Case("adam", optim.Adam(lr=0.01), Recipe(rule="adam", lr=0.01)),
    Case(
        "adam_betas_eps_decay_clip_value",
        optim.Adam(lr=0.01, betas=(0.8, 0.95), eps=1e-2, weight_decay=0.05, grad_clip_value=0.7),
        Recipe(rule="adam", lr=0.01, betas=(0.8, 0.95), eps=1e-2, decay=0.05, clip_value=0.7),
    ),
    Case("adamw", optim.AdamW(lr=0.01), Recipe(rule="adamw", lr=0.01, decoupled_decay=0.01)),
    Case(
        "adamw_step_lr_both_clips",
        optim.AdamW(lr=optim.StepLR(0.02, 10, 0.5), weight_decay=0.3, **_CLIPS),
        Recipe(rule="adamw", lr=_step_lr(base_lr=0.02, step_size=10, gamma=0.5), decoupled_decay=0.3, **_CLIPPED),
    ),
    Case("adabelief", optim.AdaBelief(lr=0.01), adabelief(lr=0.01)),
    Case(
        "adabelief_eps_root",
        optim.AdaBelief(lr=0.01, betas=(0.7, 0.95), eps=1e-3, eps_root=1e-4),
        adabelief(lr=0.01, betas=(0.7, 0.95), eps=1e-3, eps_root=1e-4),
    ),
    Case("adabelief_eps_twice", optim.AdaBelief(lr=0.01, eps=1e-3), adabelief(lr=0.01, eps=1e-3, eps_root=1e-3)),
    Case("adabelief_no_eps_root", optim.AdaBelief(lr=0.01, eps_root=0.0), adabelief(lr=0.01, eps_root=0.0)),
    Case(
        "adabelief_max_direction",
        optim.AdaBelief(lr=0.01, max_direction=0.75),
        adabelief(lr=0.01, max_direction=0.75),
    ),
    Case(
        "adabelief_decay_both_clips_exponential_lr",
        optim.AdaBelief(lr=optim.ExponentialLR(0.02, 0.9, steps_per_epoch=3), weight_decay=0.1, **_CLIPS),
        adabelief(lr=_exponential_lr(base_lr=0.02, gamma=0.9, steps_per_epoch=3), decay=0.1, **_CLIPPED),
    ),
    Case(
        "lookahead_sgd_momentum",
        optim.Lookahead(optim.SGD(lr=0.02, momentum=0.9), sync_period=7, alpha=0.3),
        Recipe(rule="sgd", lr=0.02, momentum=0.9, sync_period=7, alpha=0.3),
    ),
    Case(
        "lookahead_adam_period_1",
        optim.Lookahead(optim.Adam(lr=0.01), sync_period=1, alpha=0.6),
        Recipe(rule="adam", lr=0.01, sync_period=1, alpha=0.6),
    ),
    Case(
        "lookahead_adamw_lr_replaced",
        optim.Lookahead(optim.AdamW(lr=9.0, weight_decay=0.2), sync_period=4, lr=optim.StepLR(0.02, 5, 0.8)),
        Recipe(
            rule="adamw",
            lr=_step_lr(base_lr=0.02, step_size=5, gamma=0.8),
            decoupled_decay=0.2,
            sync_period=4,
        ),
    ),
    Case(
        "lookahead_adabelief_max_direction",
        optim.Lookahead(optim.AdaBelief(lr=0.01, eps=1e-3, max_direction=0.5), sync_period=4),
        adabelief(lr=0.01, eps=1e-3, eps_root=1e-3, max_direction=0.5, sync_period=4),
    ),
    Case("lookahead_adabelief", optim.Lookahead(optim.AdaBelief(lr=0.01)), adabelief(lr=0.01, sync_period=5)),
    Case(
        "lookahead_adabelief_everything",
        optim.Lookahead(
            optim.AdaBelief(lr=optim.StepLR(0.02, 4, 0.7, steps_per_epoch=3), **_CLIPS),
            sync_period=6,
            alpha=0.8,
            weight_decay=0.1,
        ),
        adabelief(
            lr=_step_lr(base_lr=0.02, step_size=4, gamma=0.7, steps_per_epoch=3),
            decay=0.1,
            sync_period=6,
            alpha=0.8,
            **_CLIPPED,
        ),
    ),
]


def make_weights(seed: int = 0) -> np.ndarray:
    """Initial weights of the size of one."""
    return np.random.default_rng(seed).normal(size=PARAMETER_COUNT).astype(np.float32)


def make_rounds(seed: int = 1) -> list[list[np.ndarray]]:
    """Rounds of three contributions; the scale differs from element to element and from round to round."""
    rng = np.random.default_rng(seed)
    elements = 10.0 ** rng.uniform(-3, 0.3, PARAMETER_COUNT)
    shape = (STEP_COUNT, len(EXAMPLE_COUNTS), PARAMETER_COUNT)
    scales = 10.0 ** rng.uniform(-0.7, 0.7, (STEP_COUNT, 1, 1))
    return [list(contributions) for contributions in (rng.normal(size=shape) * elements * scales).astype(np.float32)]
