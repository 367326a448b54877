"""braintools' own examples with one line changed: the optimizer is the adapter's."""

import doctest
from collections.abc import Sequence
from typing import Any

import brainstate
import braintools
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kedge
from kedge import optim
from kedge.adapters import brainstate as kb

from . import examples

ADABELIEF = {
    "basic": optim.AdaBelief(lr=0.001, betas=(0.9, 0.999), eps=1e-16),
    "betas": optim.AdaBelief(lr=0.001, betas=(0.8, 0.999)),
    "step_lr": optim.AdaBelief(lr=0.001),
    "weight_decay": optim.AdaBelief(lr=0.001, weight_decay=0.01),
    "clipping": optim.AdaBelief(lr=0.001, grad_clip_norm=1.0),
    "complete": optim.AdaBelief(lr=0.001, weight_decay=0.0001, grad_clip_norm=1.0),
}

LOOKAHEAD = {
    "sgd": optim.Lookahead(optim.SGD(lr=0.1), sync_period=5, alpha=0.5),
    "adam": optim.Lookahead(optim.Adam(lr=0.001), sync_period=6, alpha=0.5),
    "sync_period": optim.Lookahead(optim.SGD(lr=0.1, momentum=0.9), sync_period=10, alpha=0.5),
    "alpha": optim.Lookahead(optim.Adam(lr=0.001), sync_period=5, alpha=0.3),
    "exponential_lr": optim.Lookahead(optim.SGD(lr=0.1), sync_period=5, alpha=0.5),
}

ALL = [
    *((text, ADABELIEF[name]) for name, text in examples.ADABELIEF.items()),
    *((text, LOOKAHEAD[name]) for name, text in examples.LOOKAHEAD.items()),
]
IDS = [*(f"adabelief-{name}" for name in ADABELIEF), *(f"lookahead-{name}" for name in LOOKAHEAD)]


def execute(text: str, client: kedge.Client, *, replace_schedulers: bool = True, **names: Any) -> dict[str, Any]:
    """Runs an example as it stands but for its optimizer, and gives the names that it defines."""
    for kind in ("AdaBelief", "Lookahead"):
        text = text.replace(f"braintools.optim.{kind}(", f"kb.{kind}(client=client, ")
    if replace_schedulers:
        text = text.replace("braintools.optim.", "kb.")
    names |= {"client": client, "kb": kb}
    for example in doctest.DocTestParser().get_examples(text):
        exec(example.source, names)
    return names


@pytest.mark.parametrize(("text", "expected"), ALL, ids=IDS)
def test_an_example_makes_the_run_that_it_describes(
    any_client: kedge.Client, text: str, expected: optim.Optimizer
) -> None:
    with execute(text, any_client)["optimizer"] as optimizer:
        run = any_client.get_run(optimizer.run.name)
        assert optim.from_spec(run.optimizer.spec()) == optim.from_spec(expected.spec())
        assert [spec.name for spec in run.manifest.tensors] == ["weight.bias", "weight.weight"]
        assert run.status().workers[0].name == optimizer.state_dict()["worker"]


@pytest.mark.parametrize("replace_schedulers", [True, False], ids=["kedge", "braintools"])
@pytest.mark.parametrize(
    ("text", "ticks", "rate"),
    [
        (examples.ADABELIEF["step_lr"], 29, 0.001),
        (examples.ADABELIEF["step_lr"], 30, 0.0005),
        (examples.LOOKAHEAD["exponential_lr"], 2, 0.1 * 0.95**2),
    ],
    ids=["step_lr-29", "step_lr-30", "exponential_lr-2"],
)
def test_the_scheduler_of_an_example_sets_the_rate_of_the_run(
    client: kedge.Client, text: str, ticks: int, rate: float, replace_schedulers: bool
) -> None:
    names = execute(text, client, replace_schedulers=replace_schedulers)
    for _ in range(ticks):
        names["scheduler"].step()
    with names["optimizer"] as optimizer:
        assert optimizer.current_lr == pytest.approx(rate, rel=1e-12)
        assert optimizer.run.status().learning_rate == pytest.approx(rate, rel=1e-12)


def random_batches(count: int) -> list[tuple[jax.Array, jax.Array]]:
    rng = np.random.default_rng(3)
    inputs = rng.normal(size=(count, 32, 784)).astype(np.float32)
    labels = rng.integers(10, size=(count, 32))
    return [(jnp.asarray(x), jax.nn.one_hot(y, 10)) for x, y in zip(inputs, labels, strict=True)]


def mean_loss(model: Any, batches: Sequence[tuple[jax.Array, jax.Array]]) -> float:
    """Written out, and not with the metric of the example."""
    terms = [np.asarray(jax.nn.log_softmax(model(x))) * np.asarray(y) for x, y in batches]
    return -float(np.mean([term.sum(axis=1).mean() for term in terms]))


def test_the_training_example_trains(any_client: kedge.Client) -> None:
    batches = random_batches(3)
    names = execute(examples.TRAINING, any_client, data_loader=batches)
    with names["optimizer"] as optimizer:
        assert optimizer.step_count.value == 30
        assert optimizer.run.status().lookahead_sync_count == 6
        # Ten classes by chance: log 10 = 2.3. After ten passes it has the 96 images by heart.
        assert mean_loss(names["model"], batches) < 0.05
        optimizer.pull("slow")
        assert mean_loss(names["model"], batches) < 0.05


def test_the_training_example_ends_where_braintools_ends(any_client: kedge.Client) -> None:
    batches = random_batches(2)
    brainstate.random.seed(5)
    ours = execute(examples.TRAINING, any_client, data_loader=batches)
    brainstate.random.seed(5)
    theirs = execute(
        examples.TRAINING.replace("braintools.optim.", "theirs."),
        any_client,
        data_loader=batches,
        theirs=braintools.optim,
    )
    ours["optimizer"].close()
    for path, state in theirs["model"].states(brainstate.ParamState).items():
        for leaf, value in state.value.items():
            got = ours["model"].states(brainstate.ParamState)[path].value[leaf]
            np.testing.assert_allclose(got, value, rtol=0, atol=2e-6)  # found: at most 2e-7
