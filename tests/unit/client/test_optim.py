"""Optimizers and schedules as values: what is refused when they are constructed, and what rate they give."""

from collections.abc import Callable

import pytest

from kedge import optim

FLOAT32_MAX = 3.4028234663852886e38


@pytest.mark.parametrize(
    ("construct", "field"),
    [
        (lambda: optim.SGD(lr=-1e-3), "lr"),
        (lambda: optim.SGD(lr=float("nan")), "lr"),
        (lambda: optim.SGD(lr=float("inf")), "lr"),
        (lambda: optim.SGD(momentum=1.0), "momentum"),
        (lambda: optim.SGD(momentum=-0.1), "momentum"),
        (lambda: optim.SGD(nesterov=True), "nesterov"),
        (lambda: optim.SGD(weight_decay=-1), "weight_decay"),
        (lambda: optim.SGD(grad_clip_norm=0), "grad_clip_norm"),
        (lambda: optim.Adam(grad_clip_value=-1), "grad_clip_value"),
        (lambda: optim.Adam(betas=(0.9, 1.0)), "betas"),
        (lambda: optim.Adam(betas=(-0.1, 0.9)), "betas"),
        (lambda: optim.Adam(betas=(0.9,)), "betas"),
        (lambda: optim.Adam(eps=0), "eps"),
        (lambda: optim.AdamW(eps=1e-46), "eps"),  # float32 has nothing between it and 0
        (lambda: optim.AdaBelief(eps=1e-60, eps_root=0), "eps"),
        (lambda: optim.AdaBelief(eps_root=-1e-16), "eps_root"),
        (lambda: optim.Lookahead(optim.SGD(), sync_period=0), "sync_period"),
        (lambda: optim.Lookahead(optim.SGD(), alpha=1.5), "alpha"),
        (lambda: optim.Lookahead(optim.SGD(), alpha=-0.1), "alpha"),
        (lambda: optim.Lookahead(optim.SGD(), lr=-1), "lr"),
        (lambda: optim.Lookahead(optim.SGD(weight_decay=1e-4), weight_decay=1e-4), "weight_decay"),
        (lambda: optim.Lookahead(optim.SGD(grad_clip_norm=1), grad_clip_norm=2), "grad_clip_norm"),
        (lambda: optim.StepLR(step_size=0), "step_size"),
        (lambda: optim.StepLR(base_lr=-1), "base_lr"),
        (lambda: optim.ExponentialLR(gamma=0), "gamma"),
        (lambda: optim.ConstantLR(factor=1.1), "factor"),
        (lambda: optim.ConstantLR(steps_per_epoch=0), "steps_per_epoch"),
    ],
)
def test_value_out_of_range_is_refused_by_its_name(construct: Callable[[], object], field: str) -> None:
    with pytest.raises(ValueError, match=f"^{field} "):
        construct()


@pytest.mark.parametrize(
    "construct",
    [
        lambda: optim.SGD(lr="fast"),
        lambda: optim.SGD(lr=True),
        lambda: optim.StepLR(step_size=1.5),
        lambda: optim.Lookahead(optim.Lookahead(optim.SGD())),
        lambda: optim.Lookahead("sgd"),
    ],
)
def test_value_of_another_type_is_refused(construct: Callable[[], object]) -> None:
    with pytest.raises(TypeError):
        construct()


def test_defaults_are_those_of_the_seed_documents() -> None:
    # braintools.optim.AdaBelief(lr=0.001, betas=(0.9, 0.999), eps=1e-16, weight_decay=0.0, ...) and
    # braintools.optim.Lookahead(base_optimizer, sync_period=5, alpha=0.5, ...).
    assert optim.AdaBelief() == optim.AdaBelief(0.001, (0.9, 0.999), 1e-16, 0.0, None, None)
    lookahead = optim.Lookahead(optim.AdaBelief())
    assert (lookahead.sync_period, lookahead.alpha, lookahead.weight_decay) == (5, 0.5, 0.0)


def test_lookahead_keeps_the_rate_of_its_base_unless_it_has_one() -> None:
    assert optim.Lookahead(optim.SGD(lr=0.3)).spec().rate(0) == 0.3
    assert optim.Lookahead(optim.SGD(lr=0.3), lr=0.1).spec().rate(0) == 0.1


def test_options_of_lookahead_take_the_place_of_the_bases() -> None:
    spec = optim.Lookahead(optim.SGD(grad_clip_value=2.0), weight_decay=0.1, grad_clip_norm=1).spec()
    assert (spec.weight_decay, spec.grad_clip_norm, spec.grad_clip_value) == (0.1, 1, 2.0)


def test_adamws_decay_is_not_the_coupled_one() -> None:
    assert optim.AdamW(weight_decay=0.01).spec().weight_decay == 0


@pytest.mark.parametrize(
    "optimizer",
    [
        optim.SGD(0.1, 0.9, 1e-4, nesterov=True, grad_clip_norm=1.0),
        optim.AdamW(optim.StepLR(0.1, 5, 0.5)),
        optim.Lookahead(optim.AdaBelief(eps_root=0.0), 7, 0.3, optim.ExponentialLR(), grad_clip_value=0.5),
        optim.Lookahead(optim.AdamW(), weight_decay=0.1),
    ],
)
def test_laying_flat_and_standing_up_again_changes_nothing_that_matters(optimizer: optim.Optimizer) -> None:
    assert optim.from_spec(optimizer.spec()).spec() == optim.from_spec(optim.from_spec(optimizer.spec()).spec()).spec()
    again = optim.from_spec(optimizer.spec()).spec()
    before = optimizer.spec()
    assert [again.rate(step) for step in range(20)] == [before.rate(step) for step in range(20)]
    assert again._replace(base=before.base) == before


@pytest.mark.parametrize(
    ("schedule", "steps"),
    [(optim.ExponentialLR(1e-3, 1.1), 7500), (optim.StepLR(1e-3, 1, 1e200), 2), (optim.ExponentialLR(1e-3, 10.0), 60)],
)
def test_rate_that_grows_without_end_stops_at_what_float32_holds(schedule: optim.Schedule, steps: int) -> None:
    assert optim.SGD(schedule).spec().rate(steps) == FLOAT32_MAX


def test_schedules_tick_once_in_steps_per_epoch() -> None:
    schedule = optim.StepLR(1.0, step_size=2, gamma=0.5, steps_per_epoch=3)
    assert [schedule.rate(step) for step in (0, 5, 6, 11, 12)] == [1.0, 1.0, 0.5, 0.5, 0.25]
    assert [optim.ConstantLR(0.3, 0.5, 2).rate(step) for step in range(4)] == [0.15, 0.15, 0.3, 0.3]
