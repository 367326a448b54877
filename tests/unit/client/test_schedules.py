"""Schedules against braintools' and PyTorch's own of the same name, closed forms, and what is refused."""

import inspect
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest

from kedge import optim
from kedge.optim import schedules

TICKS = 200
FLOAT32_MAX = 3.4028234663852886e38
NAMES = [name for name in schedules.__all__ if name not in ("Composite", "PlateauState", "Schedule", "Tick")]


@pytest.fixture(scope="module")
def braintools_optim() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("braintools").optim


@pytest.fixture(scope="module")
def torch_optim() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("torch").optim


def close(rates: list[float], *, scale: float, within: float = 2e-6) -> Any:
    """Within float32's reach of the greatest rate: braintools subtracts in float32."""
    return pytest.approx(rates, rel=within, abs=within * scale)


def rates_of(schedule: optim.Schedule, ticks: int = TICKS) -> list[float]:
    return [schedule.rate(tick) for tick in range(ticks)]


BRAINTOOLS_CASES: list[tuple[str, dict[str, Any]]] = [
    ("ConstantLR", {}),
    ("ConstantLR", {"base_lr": 0.3, "factor": 0.25, "total_iters": 50, "last_epoch": 7}),
    ("ConstantLR", {"base_lr": 0.3, "factor": 0.0, "total_iters": 0}),
    ("StepLR", {}),
    ("StepLR", {"base_lr": 0.1, "step_size": 7, "gamma": 0.9, "last_epoch": 13}),
    ("StepLR", {"base_lr": 1e-6, "step_size": 20, "gamma": 3.0}),
    ("MultiStepLR", {}),
    ("MultiStepLR", {"base_lr": 0.1, "milestones": [100, 20, 20, 0], "gamma": 0.5}),
    ("MultiStepLR", {"base_lr": 0.1, "milestones": (50,), "gamma": 1.5, "last_epoch": 45}),
    ("ExponentialLR", {}),
    ("ExponentialLR", {"base_lr": 0.1, "gamma": 0.99, "last_epoch": 100}),
    ("ExponentialLR", {"base_lr": 1e-4, "gamma": 1.02}),
    ("ExponentialDecayLR", {}),
    ("ExponentialDecayLR", {"base_lr": 0.1, "decay_steps": 30, "decay_rate": 0.5, "transition_begin": 25}),
    (
        "ExponentialDecayLR",
        {"base_lr": 1, "decay_steps": 30, "decay_rate": 0.5, "staircase": True, "end_value": 0.1},
    ),
    ("ExponentialDecayLR", {"base_lr": 0.1, "decay_steps": 30, "decay_rate": 1.5, "end_value": 0.3, "last_epoch": 20}),
    ("ExponentialDecayLR", {"base_lr": 0.1, "decay_rate": 1.0, "end_value": 0.05}),
    ("CosineAnnealingLR", {}),
    ("CosineAnnealingLR", {"base_lr": 0.1, "T_max": 150, "eta_min": 0.01, "last_epoch": 10}),
    ("CosineAnnealingLR", {"base_lr": 0.01, "T_max": 99, "eta_min": 0.1}),
    ("CosineAnnealingWarmRestarts", {}),
    ("CosineAnnealingWarmRestarts", {"base_lr": 0.1, "T_0": 7, "T_mult": 2, "eta_min": 1e-3}),
    ("CosineAnnealingWarmRestarts", {"base_lr": 0.1, "T_0": 1, "T_mult": 3}),
    ("PolynomialLR", {}),
    ("PolynomialLR", {"base_lr": 0.1, "total_iters": 150, "power": 2.0, "last_epoch": 10}),
    ("PolynomialLR", {"base_lr": 0.1, "total_iters": 30, "power": 0.5}),
    ("PolynomialLR", {"base_lr": 0.1, "total_iters": 30, "power": 0.0}),
    ("LinearLR", {}),
    ("LinearLR", {"base_lr": 0.1, "start_factor": 0.0, "end_factor": 0.5, "total_iters": 120, "last_epoch": 3}),
    ("LinearLR", {"base_lr": 0.1, "start_factor": 1.0, "end_factor": 0.1, "total_iters": 33}),
    ("LinearLR", {"base_lr": 0.1, "end_factor": 0.7, "total_iters": 0}),
    ("CyclicLR", {"step_size_up": 40}),
    ("CyclicLR", {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 25, "mode": "triangular2", "last_epoch": 9}),
    ("CyclicLR", {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 33, "mode": "exp_range", "gamma": 0.99}),
    ("CyclicLR", {"base_lr": 0.1, "max_lr": 0.01, "step_size_up": 50, "step_size_down": 50, "mode": "exp_range"}),
    ("OneCycleLR", {"total_steps": 150}),
    ("OneCycleLR", {"max_lr": 0.1, "epochs": 4, "steps_per_epoch": 45, "pct_start": 0.1, "last_epoch": 5}),
    ("OneCycleLR", {"total_steps": 170, "anneal_strategy": "linear", "div_factor": 10.0, "final_div_factor": 0.5}),
    ("OneCycleLR", {"total_steps": 60, "epochs": 3, "pct_start": 0.77}),
    ("WarmupScheduler", {}),
    ("WarmupScheduler", {"base_lr": 0.1, "warmup_epochs": 150, "warmup_start_lr": 0.01, "last_epoch": 20}),
    ("WarmupScheduler", {"base_lr": 0.1, "warmup_epochs": 50, "warmup_start_lr": 0.5}),
    ("WarmupScheduler", {"base_lr": 0.1, "warmup_epochs": 0}),
    ("WarmupCosineSchedule", {}),
    ("WarmupCosineSchedule", {"base_lr": 0.1, "warmup_steps": 20, "total_steps": 150, "eta_min": 1e-3}),
    ("WarmupCosineSchedule", {"base_lr": 0.1, "warmup_steps": 30, "total_steps": 30, "warmup_start_lr": 0.2}),
    ("WarmupCosineSchedule", {"base_lr": 0.1, "warmup_steps": 0, "total_steps": 180, "last_epoch": 40}),
    ("PiecewiseConstantSchedule", {}),
    ("PiecewiseConstantSchedule", {"boundaries": [10, 50, 120], "values": [0.1, 0.5, 0.0, 0.2], "last_epoch": 2}),
    ("PiecewiseConstantSchedule", {"boundaries": [0, 60], "values": [1.0, 0.1, 0.01]}),
]


@pytest.mark.parametrize(("name", "arguments"), BRAINTOOLS_CASES)
def test_schedule_agrees_with_that_of_braintools(braintools_optim: Any, name: str, arguments: dict[str, Any]) -> None:
    reference = getattr(braintools_optim, name)(**arguments)
    expected = []
    for _ in range(TICKS):
        expected.append(float(reference.current_lrs.value[0]))
        reference.step()

    rates = rates_of(getattr(optim, name)(**arguments))

    assert rates == close(expected, scale=max(expected))


CHAINS: dict[str, Callable[[Any], Any]] = {
    "warm-up and decay": lambda of: of.ChainedScheduler(
        [of.LinearLR(base_lr=0.1, start_factor=0.1, total_iters=20), of.ExponentialLR(base_lr=0.01, gamma=0.98)]
    ),
    "three": lambda of: of.ChainedScheduler(
        [
            of.StepLR(base_lr=0.2, step_size=60, gamma=0.3),
            of.WarmupScheduler(base_lr=0.5, warmup_epochs=30),
            of.MultiStepLR(base_lr=1.0, milestones=[50, 150]),
        ]
    ),
    "one cycle, relative to its first rate": lambda of: of.ChainedScheduler(
        [of.OneCycleLR(max_lr=0.1, total_steps=100), of.ConstantLR(base_lr=0.1, factor=0.5, total_iters=10)]
    ),
    "base_lr 0": lambda of: of.ChainedScheduler([of.StepLR(base_lr=0.1), of.WarmupScheduler(0.0, 5, 0.1)]),
    "one after the other": lambda of: of.SequentialLR(
        [of.WarmupScheduler(base_lr=0.1, warmup_epochs=10), of.CosineAnnealingLR(base_lr=0.1, T_max=90), of.StepLR()],
        milestones=[10, 110],
    ),
    "polynomial after a constant": lambda of: of.SequentialLR(
        [of.ConstantLR(base_lr=0.1, total_iters=50), of.PolynomialLR(base_lr=0.3, total_iters=60, power=2.0)],
        milestones=[35],
    ),
    "only one": lambda of: of.SequentialLR([of.ExponentialLR(base_lr=0.1)], milestones=[]),
    "first never": lambda of: of.SequentialLR([of.StepLR(), of.ExponentialLR(base_lr=0.1)], milestones=[0]),
}


@pytest.mark.parametrize("build", CHAINS.values(), ids=CHAINS.keys())
def test_schedule_of_schedules_agrees_with_that_of_braintools(
    braintools_optim: Any, build: Callable[[Any], Any]
) -> None:
    import jax

    reference = build(braintools_optim)
    expected = []
    with jax.disable_jit():  # its SequentialLR compiles anew at every tick
        for _ in range(TICKS):
            expected.append(float(reference.get_lr()[0]))
            reference.step()

    rates = rates_of(build(optim))

    assert rates == close(expected, scale=max(expected))


def torch_rates(torch_optim: Any, build: Callable[[Any, Any], Any], base_lr: float) -> Iterator[float]:
    """The rates of PyTorch's schedule, which `build` makes of the module of schedules and an optimizer."""
    import torch

    optimizer = torch_optim.SGD([torch.zeros(1, requires_grad=True)], lr=base_lr)
    scheduler = build(torch_optim.lr_scheduler, optimizer)
    for _ in range(TICKS):
        yield optimizer.param_groups[0]["lr"]
        optimizer.step()
        scheduler.step()


TORCH_CASES: list[tuple[str, dict[str, Any]]] = [
    ("ConstantLR", {"factor": 0.25, "total_iters": 50}),
    ("StepLR", {"step_size": 7, "gamma": 0.9}),
    ("MultiStepLR", {"milestones": [100, 20, 20], "gamma": 0.5}),
    ("ExponentialLR", {"gamma": 0.97}),
    ("CosineAnnealingLR", {"T_max": 200, "eta_min": 0.01}),  # beyond T_max PyTorch's rises again
    ("CosineAnnealingWarmRestarts", {"T_0": 10, "eta_min": 0.01}),
    ("CosineAnnealingWarmRestarts", {"T_0": 5, "T_mult": 2}),
    ("PolynomialLR", {"total_iters": 120, "power": 1.7}),
    ("LinearLR", {"start_factor": 0.1, "end_factor": 0.7, "total_iters": 90}),
    ("CyclicLR", {"max_lr": 0.5, "step_size_up": 30}),
    ("CyclicLR", {"max_lr": 0.5, "step_size_up": 10, "step_size_down": 25}),
    ("CyclicLR", {"max_lr": 0.5, "step_size_up": 25, "step_size_down": 3, "mode": "triangular2"}),
    ("CyclicLR", {"max_lr": 0.5, "step_size_up": 7, "step_size_down": 9, "mode": "exp_range", "gamma": 0.98}),
    ("CyclicLR", {"max_lr": 0.5, "step_size_up": 7, "mode": "exp_range", "gamma": 1.01}),
    ("CyclicLR", {"max_lr": 0.02, "step_size_up": 7, "step_size_down": 9, "mode": "triangular2"}),
]


@pytest.mark.parametrize(("name", "arguments"), TORCH_CASES)
def test_schedule_agrees_with_that_of_pytorch(torch_optim: Any, name: str, arguments: dict[str, Any]) -> None:
    own = {"base_lr": 0.1, "cycle_momentum": False} if name == "CyclicLR" else {}
    build = lambda of, optimizer: getattr(of, name)(optimizer, **own, **arguments)  # noqa: E731

    rates = rates_of(getattr(optim, name)(base_lr=0.1, **arguments))

    # PyTorch multiplies from tick to tick: its rounding adds up.
    assert rates == pytest.approx(list(torch_rates(torch_optim, build, 0.1)), rel=1e-12, abs=1e-14)


def test_schedules_of_schedules_agree_with_those_of_pytorch(torch_optim: Any) -> None:
    def chained(of: Any, *optimizer: Any) -> Any:
        return of.ChainedScheduler(
            [of.LinearLR(*optimizer, start_factor=0.1, total_iters=30), of.ExponentialLR(*optimizer, gamma=0.99)]
        )

    def sequential(of: Any, *optimizer: Any) -> Any:
        parts = [of.ConstantLR(*optimizer, factor=0.5, total_iters=20), of.ExponentialLR(*optimizer, gamma=0.99)]
        return of.SequentialLR(*optimizer, parts, milestones=[40])

    for build in (chained, sequential):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch's SequentialLR uses what PyTorch has deprecated
            expected = list(torch_rates(torch_optim, build, 1e-3))
        assert rates_of(build(optim)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_arguments_are_those_of_braintools_in_their_order_with_their_defaults(braintools_optim: Any, name: str) -> None:
    theirs = inspect.signature(getattr(braintools_optim, name)).parameters.values()
    expected = [(each.name, each.default) for each in theirs]
    if name == "ChainedScheduler":
        expected.append(("last_epoch", 0))

    ours = inspect.signature(getattr(optim, name)).parameters.values()

    assert [(each.name, each.default) for each in ours if each.kind is each.POSITIONAL_OR_KEYWORD] == expected
    keywords = {each.name for each in ours if each.kind is each.KEYWORD_ONLY}
    assert keywords == ({"tick"} if name == "OneCycleLR" else {"steps_per_epoch", "tick"})


@pytest.mark.parametrize(("first", "factor"), [(1, 1), (1, 2), (3, 2), (10, 1), (10, 2), (7, 3), (243, 3), (6, 10)])
def test_every_warm_restart_begins_at_its_own_tick(first: int, factor: int) -> None:
    schedule = optim.CosineAnnealingWarmRestarts(0.1, first, factor, eta_min=0.01)
    start, length = 0, first
    for _ in range(60):
        last = 0.01 + 0.09 * (1 + math.cos(math.pi * (length - 1) / length)) / 2
        assert schedule.rate(start) == 0.1
        assert schedule.rate(start + length - 1) == pytest.approx(last, rel=1e-12)
        start, length = start + length, length * factor


def test_one_cycle_counts_epochs_in_steps_and_keeps_only_their_product() -> None:
    schedule = optim.OneCycleLR(0.1, epochs=3, steps_per_epoch=50)
    assert schedule == optim.OneCycleLR(0.1, total_steps=150)
    assert schedule.steps_per_tick == 1


def test_schedules_of_equal_meaning_are_equal_and_hash_alike() -> None:
    assert optim.MultiStepLR(1, [60, 30], 1) == optim.MultiStepLR(1.0, (30, 60), 1.0)
    assert len({optim.SequentialLR([optim.StepLR(1), optim.StepLR()], [3]) for _ in range(2)}) == 1
    assert optim.PiecewiseConstantSchedule() == optim.PiecewiseConstantSchedule(1e-3, [1000, 2000], [1, 0.1, 0.01])
    assert optim.CyclicLR(scale_mode="iterations") == optim.CyclicLR()


def test_schedule_is_shown_as_its_constructor_takes_it() -> None:
    shown = "StepLR(base_lr=1.0, step_size=30, gamma=0.1, last_epoch=0, steps_per_epoch=1, tick='step')"
    assert repr(optim.StepLR(1)) == shown
    chain = optim.ChainedScheduler([optim.StepLR(1)])
    assert repr(chain) == f"ChainedScheduler(schedulers=({shown},), last_epoch=0, steps_per_epoch=1, tick='step')"
    for schedule in (optim.CyclicLR(0.1), optim.OneCycleLR(0.1, epochs=3, steps_per_epoch=4)):
        assert eval(repr(schedule), vars(optim)) == schedule


def test_schedule_cannot_be_changed_but_replaced() -> None:
    schedule = optim.CyclicLR()
    with pytest.raises(FrozenInstanceError):
        schedule.gamma = 0.5  # type: ignore[misc]
    assert replace(schedule, gamma=0.5).gamma == 0.5
    with pytest.raises(ValueError, match=r"^gamma "):
        replace(schedule, gamma=-0.5)


@pytest.mark.parametrize(
    "schedule",
    [
        optim.ExponentialLR(1e-3, 1.1),
        optim.ExponentialLR(1e-3, 10),
        optim.StepLR(1e-3, 1, 1e200),
        optim.MultiStepLR(1e30, [1, 1, 1], 1e300),
        optim.ExponentialDecayLR(1e-3, 1, 1e300),
        optim.CyclicLR(1e-3, 1e-2, 2, 1, mode="exp_range", gamma=1e9),
        optim.ChainedScheduler([optim.ExponentialLR(1e-3, 1e200), optim.ExponentialLR(1e-3, 1e200)]),
    ],
)
def test_rate_that_grows_without_end_stops_at_what_float32_holds(schedule: optim.Schedule) -> None:
    assert schedule.rate(7501) == FLOAT32_MAX
    assert schedule.rate(2**63) in (FLOAT32_MAX, schedule.base_lr)


def test_factor_of_0_is_stronger_than_one_without_end() -> None:
    grows, ends = optim.ExponentialLR(5e-324, 1e300), optim.PolynomialLR(1.0, 5)
    for chain in ([ends, grows], [grows, ends], [grows, grows, ends, grows]):
        assert optim.ChainedScheduler(chain).rate(1000) == 0


def nested(levels: int) -> optim.Schedule:
    schedule: optim.Schedule = optim.StepLR()
    for _ in range(levels):
        schedule = optim.SequentialLR([schedule], [])
    return schedule


def test_schedules_nest_sixteen_deep_and_no_deeper() -> None:
    assert nested(16).rate(30) == pytest.approx(1e-4)
    with pytest.raises(ValueError, match=r"^schedulers has 17 levels"):
        nested(17)


def test_schedule_is_made_of_at_most_64_in_all() -> None:
    inner = optim.ChainedScheduler([optim.ConstantLR()] * 31)
    assert optim.ChainedScheduler([inner, optim.ChainedScheduler([optim.StepLR()] * 30)])
    with pytest.raises(ValueError, match=r"^schedulers has 65 schedules in all"):
        optim.ChainedScheduler([inner, inner])
    with pytest.raises(ValueError, match=r"^schedulers has 65 entries"):
        optim.ChainedScheduler([optim.StepLR()] * 65)


def test_plateau_has_no_rate_of_a_tick() -> None:
    with pytest.raises(TypeError, match="PlateauState"):
        optim.ReduceLROnPlateau().rate(0)


nan, inf = math.nan, math.inf


@pytest.mark.parametrize(
    ("construct", "field"),
    [
        (lambda: optim.StepLR(base_lr=nan), "base_lr"),
        (lambda: optim.StepLR(base_lr=1e39), "base_lr"),
        (lambda: optim.StepLR(base_lr=10**400), "base_lr"),
        (lambda: optim.StepLR(gamma=10**400), "gamma"),
        (lambda: optim.StepLR(gamma=inf), "gamma"),
        (lambda: optim.StepLR(gamma=nan), "gamma"),
        (lambda: optim.StepLR(step_size=2**63), "step_size"),
        (lambda: optim.StepLR(last_epoch=-1), "last_epoch"),
        (lambda: optim.StepLR(last_epoch=2**63), "last_epoch"),
        (lambda: optim.StepLR(steps_per_epoch=0), "steps_per_epoch"),
        (lambda: optim.StepLR(tick="epoch"), "tick"),
        (lambda: optim.StepLR(tick=[]), "tick"),
        (lambda: optim.ConstantLR(factor=nan), "factor"),
        (lambda: optim.ConstantLR(total_iters=-1), "total_iters"),
        (lambda: optim.MultiStepLR(milestones=[3, -1]), r"milestones\[1\]"),
        (lambda: optim.MultiStepLR(milestones=range(10_001)), "milestones"),
        (lambda: optim.MultiStepLR(gamma=0), "gamma"),
        (lambda: optim.ExponentialDecayLR(decay_steps=0), "decay_steps"),
        (lambda: optim.ExponentialDecayLR(decay_rate=0), "decay_rate"),
        (lambda: optim.ExponentialDecayLR(decay_rate=-0.5), "decay_rate"),
        (lambda: optim.ExponentialDecayLR(transition_begin=-1), "transition_begin"),
        (lambda: optim.ExponentialDecayLR(staircase=2), "staircase"),
        (lambda: optim.ExponentialDecayLR(end_value=-1e-9), "end_value"),
        (lambda: optim.CosineAnnealingLR(T_max=0), "T_max"),
        (lambda: optim.CosineAnnealingLR(eta_min=-1e-9), "eta_min"),
        (lambda: optim.CosineAnnealingWarmRestarts(T_0=0), "T_0"),
        (lambda: optim.CosineAnnealingWarmRestarts(T_mult=0), "T_mult"),
        (lambda: optim.CosineAnnealingWarmRestarts(eta_min=inf), "eta_min"),
        (lambda: optim.PolynomialLR(total_iters=0), "total_iters"),
        (lambda: optim.PolynomialLR(power=-1), "power"),
        (lambda: optim.PolynomialLR(power=nan), "power"),
        (lambda: optim.LinearLR(start_factor=-0.1), "start_factor"),
        (lambda: optim.LinearLR(end_factor=1.1), "end_factor"),
        (lambda: optim.LinearLR(total_iters=-1), "total_iters"),
        (lambda: optim.CyclicLR(max_lr=-1), "max_lr"),
        (lambda: optim.CyclicLR(step_size_up=0), "step_size_up"),
        (lambda: optim.CyclicLR(step_size_down=0), "step_size_down"),
        (lambda: optim.CyclicLR(mode="square"), "mode"),
        (lambda: optim.CyclicLR(gamma=0), "gamma"),
        (lambda: optim.CyclicLR(0.1, 0.01, gamma=1.01), "gamma"),  # the amplitude would grow below 0
        (lambda: optim.CyclicLR(scale_mode="epochs"), "scale_mode"),
        (optim.OneCycleLR, "total_steps"),
        (lambda: optim.OneCycleLR(epochs=3), "total_steps"),
        (lambda: optim.OneCycleLR(total_steps=0), "total_steps"),
        (lambda: optim.OneCycleLR(epochs=2**40, steps_per_epoch=2**40), "total_steps"),
        (lambda: optim.OneCycleLR(epochs=0, steps_per_epoch=5), "epochs"),
        (lambda: optim.OneCycleLR(epochs=5, steps_per_epoch=0), "steps_per_epoch"),
        (lambda: optim.OneCycleLR(total_steps=5, pct_start=1.0), "pct_start"),
        (lambda: optim.OneCycleLR(total_steps=5, pct_start=0), "pct_start"),
        (lambda: optim.OneCycleLR(total_steps=5, anneal_strategy="exp"), "anneal_strategy"),
        (lambda: optim.OneCycleLR(total_steps=5, div_factor=0), "div_factor"),
        (lambda: optim.OneCycleLR(total_steps=5, final_div_factor=-1), "final_div_factor"),
        (lambda: optim.WarmupScheduler(warmup_epochs=-1), "warmup_epochs"),
        (lambda: optim.WarmupScheduler(warmup_start_lr=-1), "warmup_start_lr"),
        (lambda: optim.WarmupCosineSchedule(warmup_steps=-1), "warmup_steps"),
        (lambda: optim.WarmupCosineSchedule(warmup_steps=0, total_steps=0), "total_steps"),
        (lambda: optim.WarmupCosineSchedule(warmup_steps=11, total_steps=10), "total_steps"),
        (lambda: optim.WarmupCosineSchedule(eta_min=-1), "eta_min"),
        (lambda: optim.PiecewiseConstantSchedule(boundaries=[5]), "values"),
        (lambda: optim.PiecewiseConstantSchedule(boundaries=[5, 5]), r"boundaries\[1\]"),
        (lambda: optim.PiecewiseConstantSchedule(boundaries=[], values=[-1.0]), r"values\[0\]"),
        (lambda: optim.ChainedScheduler([]), "schedulers"),
        (lambda: optim.ChainedScheduler([optim.StepLR(), optim.StepLR(last_epoch=3)]), r"schedulers\[1\]"),
        (lambda: optim.ChainedScheduler([optim.StepLR(steps_per_epoch=3)]), r"schedulers\[0\]"),
        (lambda: optim.SequentialLR([optim.OneCycleLR(total_steps=9, tick="manual")], []), r"schedulers\[0\]"),
        (lambda: optim.SequentialLR([optim.ReduceLROnPlateau()], []), r"schedulers\[0\]"),
        (lambda: optim.SequentialLR([optim.StepLR()] * 3, [4]), "milestones"),
        (lambda: optim.SequentialLR([optim.StepLR()] * 3, [4, 4]), r"milestones\[1\]"),
        (lambda: optim.ReduceLROnPlateau(mode="least"), "mode"),
        (lambda: optim.ReduceLROnPlateau(factor=1.0), "factor"),
        (lambda: optim.ReduceLROnPlateau(patience=-1), "patience"),
        (lambda: optim.ReduceLROnPlateau(threshold=-0.1), "threshold"),
        (lambda: optim.ReduceLROnPlateau(threshold=1.0), "threshold"),  # no loss could ever be better
        (lambda: optim.ReduceLROnPlateau(threshold_mode="relative"), "threshold_mode"),
        (lambda: optim.ReduceLROnPlateau(cooldown=-1), "cooldown"),
        (lambda: optim.ReduceLROnPlateau(min_lr=-1), "min_lr"),
        (lambda: optim.ReduceLROnPlateau(eps=-1), "eps"),
    ],
)
def test_value_out_of_range_is_refused_by_its_name(construct: Callable[[], object], field: str) -> None:
    with pytest.raises(ValueError, match=f"^{field} "):
        construct()


@pytest.mark.parametrize(
    ("construct", "field"),
    [
        (lambda: optim.StepLR(base_lr="fast"), "base_lr"),
        (lambda: optim.StepLR(base_lr=[0.1, 0.01]), "base_lr"),  # braintools takes one for each group
        (lambda: optim.StepLR(gamma=True), "gamma"),
        (lambda: optim.StepLR(gamma="0.1"), "gamma"),
        (lambda: optim.StepLR(last_epoch=None), "last_epoch"),
        (lambda: optim.StepLR(steps_per_epoch=1.0), "steps_per_epoch"),
        (lambda: optim.ConstantLR(factor=None), "factor"),
        (lambda: optim.MultiStepLR(milestones=30), "milestones"),
        (lambda: optim.MultiStepLR(milestones="30"), "milestones"),
        (lambda: optim.MultiStepLR(milestones=[1.5]), r"milestones\[0\]"),
        (lambda: optim.PolynomialLR(power="2"), "power"),
        (lambda: optim.CyclicLR(scale_fn=lambda cycle: 1.0), "scale_fn"),
        (lambda: optim.OneCycleLR(total_steps=5, pct_start=None), "pct_start"),
        (lambda: optim.PiecewiseConstantSchedule(boundaries=[], values=["1"]), r"values\[0\]"),
        (lambda: optim.ChainedScheduler(optim.StepLR()), "schedulers"),
        (lambda: optim.ChainedScheduler([0.1]), r"schedulers\[0\]"),
        (lambda: optim.ReduceLROnPlateau(threshold=None), "threshold"),
    ],
)
def test_value_of_another_type_is_refused_by_its_name(construct: Callable[[], object], field: str) -> None:
    with pytest.raises(TypeError, match=f"^{field} "):
        construct()


def test_function_for_cyclic_lr_is_refused_with_what_to_use_instead() -> None:
    with pytest.raises(TypeError, match='"triangular", "triangular2" or "exp_range"'):
        optim.CyclicLR(scale_fn=math.sqrt)


def test_inner_schedule_with_ticks_of_its_own_is_refused_with_where_to_set_them() -> None:
    with pytest.raises(ValueError, match="last_epoch=3: leave it out there, and set it on the SequentialLR"):
        optim.SequentialLR([optim.StepLR(last_epoch=3)], [])
    assert optim.SequentialLR([optim.StepLR(1.0, 3, 0.5)], [], last_epoch=3).rate(0) == 0.5
