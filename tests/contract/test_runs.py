from collections import OrderedDict
from typing import NamedTuple

import ml_dtypes
import numpy as np
import pytest

import kedge
from kedge import optim

SGD = optim.SGD(lr=1.0)
ALONE = kedge.Synchronous(quorum=1)


class Layer(NamedTuple):
    kernel: np.ndarray
    bias: np.ndarray


def reason_of(error):
    return error.value.reason


def test_created_run_is_found_by_id_and_by_name(client, new_run, run_name):
    run = new_run(SGD, ALONE)

    assert run.name == f"runs/{run_name}"
    assert run.id == run_name
    for name in (run_name, run.name):
        found = client.get_run(name)
        assert found.name == run.name
        assert found.manifest == run.manifest
        assert found.optimizer == SGD
        assert found.aggregation == ALONE


@pytest.mark.parametrize(
    "optimizer",
    [
        optim.SGD(lr=0.5, momentum=0.9, nesterov=True, weight_decay=0.25),
        optim.Adam(betas=(0.5, 0.75), eps=1e-3, grad_clip_norm=2.0),
        optim.AdamW(weight_decay=0.125, grad_clip_value=3.0),
        optim.AdaBelief(lr=optim.StepLR(base_lr=0.5, step_size=3), eps_root=0.0),
        optim.Lookahead(
            optim.AdaBelief(lr=optim.ExponentialLR(base_lr=0.5, steps_per_epoch=2)), sync_period=7, alpha=0.75
        ),
        optim.Lookahead(optim.AdamW(lr=optim.ConstantLR(total_iters=0), weight_decay=0.5)),
    ],
)
def test_optimizer_comes_back_as_it_was_given(client, new_run, run_name, optimizer):
    new_run(optimizer, ALONE)

    assert client.get_run(run_name).optimizer == optimizer


@pytest.mark.parametrize(
    "aggregation",
    [
        kedge.Synchronous(quorum=3),
        kedge.Synchronous(quorum=2, timeout_seconds=1.5),
        kedge.Asynchronous(),
        kedge.Asynchronous(max_staleness=0, scaling="inverse"),
        kedge.Synchronous(3, combine="trimmed_mean"),
        kedge.Synchronous(7, combine="trimmed_mean", trim_count=3, deterministic=False),
        kedge.Synchronous(3, combine="median"),
        kedge.BoundedStaleness(0),
        kedge.BoundedStaleness(7),
        kedge.Buffered(4),
        kedge.Buffered(5, max_staleness=0, scaling="none", combine="trimmed_mean", trim_count=2, deterministic=False),
    ],
)
def test_aggregation_comes_back_as_it_was_given(client, new_run, run_name, aggregation):
    new_run(SGD, aggregation)

    assert client.get_run(run_name).aggregation == aggregation


def test_list_has_every_run_in_the_order_of_names(client, run_name):
    names = [f"{run_name}-{letter}" for letter in "cabde"]
    for name in names:
        client.create_run(name, params=np.zeros(2, np.float32), optimizer=SGD, aggregation=ALONE)

    mine = [info for info in client.list_runs() if info.name.startswith(f"runs/{run_name}-")]

    assert [info.name for info in mine] == sorted(f"runs/{name}" for name in names)
    assert all(info.parameter_count == 2 and info.manifest is None and info.optimizer == SGD for info in mine)


def test_deleted_run_is_gone(client, new_run, run_name):
    run = new_run(SGD, ALONE)
    client.delete_run(run_name)

    assert run.name not in {info.name for info in client.list_runs()}
    for use in (run.status, run.pull, run.snapshot, run.delete, run.join, lambda: client.get_run(run_name)):
        with pytest.raises(kedge.errors.NotFoundError) as error:
            use()
        assert reason_of(error) == "RUN_NOT_FOUND"


def test_run_that_exists_cannot_be_created_again(client, new_run):
    run = new_run(SGD, ALONE)

    with pytest.raises(kedge.errors.ConflictError) as error:
        new_run(SGD, ALONE)

    assert reason_of(error) == "RUN_ALREADY_EXISTS"
    assert error.value.metadata["run"] == run.name


def test_unknown_run_is_named_in_the_error(client):
    with pytest.raises(kedge.errors.NotFoundError) as error:
        client.get_run("nowhere")

    assert reason_of(error) == "RUN_NOT_FOUND"
    assert error.value.metadata["run"] == "runs/nowhere"


@pytest.mark.parametrize("name", ["", "a/b", "-a", "runs/", "a b", "x" * 64, "runs/a/workers/b"])
def test_what_cannot_name_a_run_is_refused(client, name):
    with pytest.raises(kedge.errors.InvalidInputError) as error:
        client.create_run(name, params=np.zeros(2, np.float32), optimizer=SGD, aggregation=ALONE)

    assert reason_of(error) == "INVALID_NAME"


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_weights_make_no_run(client, new_run, run_name, bad):
    with pytest.raises(kedge.errors.InvalidInputError) as error:
        new_run(SGD, ALONE, np.array([1, 2, bad], np.float32))

    assert reason_of(error) == "NON_FINITE_WEIGHTS"
    with pytest.raises(kedge.errors.NotFoundError):
        client.get_run(run_name)


def test_get_or_create_creates_once_and_then_opens(client, other_client, run_name):
    params = {"w": np.array([3.0], np.float32)}
    first = client.get_or_create_run(run_name, params=params, optimizer=SGD, aggregation=ALONE)
    with first.join() as worker:
        worker.pull()
        worker.step({"w": np.array([1.0], np.float32)})
    other = {"w": np.array([50.0], np.float32)}
    second = other_client.get_or_create_run(run_name, params=other, optimizer=SGD, aggregation=kedge.Asynchronous())

    assert second.aggregation == ALONE
    assert second.pull()["w"] == [2.0]


def test_get_or_create_takes_options_for_the_same_wherever_they_stand(client, run_name):
    params = np.zeros(2, np.float32)
    around = optim.Lookahead(optim.SGD(lr=1.0), grad_clip_norm=2.0, lr=0.5)
    inside = optim.Lookahead(optim.SGD(lr=0.5, grad_clip_norm=2.0))
    client.get_or_create_run(run_name, params=params, optimizer=around, aggregation=ALONE)

    client.get_or_create_run(run_name, params=params, optimizer=inside, aggregation=ALONE)


@pytest.mark.parametrize(
    ("params", "optimizer", "field"),
    [
        ({"w": np.zeros(3, np.float32)}, SGD, "manifest"),
        ({"v": np.zeros(2, np.float32)}, SGD, "manifest"),
        ({"w": np.zeros(2, np.float16)}, SGD, "manifest"),
        ({"w": np.zeros(2, np.float32), "b": np.zeros(1, np.float32)}, SGD, "manifest"),
        ({"w": np.zeros(2, np.float32)}, optim.SGD(lr=0.5), "optimizer"),
        ({"w": np.zeros(2, np.float32)}, optim.Lookahead(SGD), "optimizer"),
    ],
)
def test_get_or_create_refuses_a_run_that_is_another(client, run_name, params, optimizer, field):
    client.create_run(run_name, params={"w": np.zeros(2, np.float32)}, optimizer=SGD, aggregation=ALONE)

    with pytest.raises(kedge.errors.ConflictError) as error:
        client.get_or_create_run(run_name, params=params, optimizer=optimizer, aggregation=ALONE)

    assert reason_of(error) == "RUN_MISMATCH"
    assert error.value.metadata == {"run": f"runs/{run_name}", "field": field}


def test_one_of_many_creates_the_run_and_all_open_it(client, run_name, in_background):
    params = np.zeros(2, np.float32)
    opened = [
        in_background(client.get_or_create_run, run_name, params=params, optimizer=SGD, aggregation=ALONE)
        for _ in range(8)
    ]

    assert {run.result(30).name for run in opened} == {f"runs/{run_name}"}


def nested():
    return OrderedDict(
        layers=[
            Layer(np.arange(6, dtype=np.float32).reshape(2, 3), np.array([0.5, -0.5, 1.5], ml_dtypes.bfloat16)),
            Layer(np.full((3, 1), 0.25, np.float16), np.array([7], np.float32)),
        ],
        scale=np.float32(2.5),
        empty={},
        more=({"z": np.zeros((0, 4), np.float32), "a": np.float32(-1)},),
    )


def test_pulled_weights_have_the_structure_dtypes_and_values_of_the_params(new_run):
    run = new_run(SGD, ALONE, nested())

    pulled = run.pull()

    assert type(pulled) is OrderedDict
    assert list(pulled) == ["layers", "scale", "empty", "more"]
    assert type(pulled["layers"]) is list
    assert [type(layer) for layer in pulled["layers"]] == [Layer, Layer]
    assert type(pulled["more"]) is tuple
    assert pulled["empty"] == {}
    assert list(pulled["more"][0]) == ["z", "a"]
    pairs = [
        *zip(pulled["layers"][0], nested()["layers"][0], strict=True),
        *zip(pulled["layers"][1], nested()["layers"][1], strict=True),
        (pulled["scale"], nested()["scale"]),
        (pulled["more"][0]["z"], nested()["more"][0]["z"]),
        (pulled["more"][0]["a"], nested()["more"][0]["a"]),
    ]
    for got, given in pairs:
        assert got.dtype == given.dtype
        assert got.shape == given.shape
        np.testing.assert_array_equal(got, given)


def test_names_are_keys_joined_by_dots_in_the_order_of_the_tree(new_run):
    run = new_run(SGD, ALONE, nested())

    assert [(spec.name, spec.shape, spec.dtype) for spec in run.manifest.tensors] == [
        ("layers.0.kernel", (2, 3), "float32"),
        ("layers.0.bias", (3,), "bfloat16"),
        ("layers.1.kernel", (3, 1), "float16"),
        ("layers.1.bias", (1,), "float32"),
        ("scale", (), "float32"),
        ("more.0.z", (0, 4), "float32"),
        ("more.0.a", (), "float32"),
    ]


def test_without_a_template_weights_come_as_a_flat_dict(client, new_run, run_name):
    new_run(SGD, ALONE, {"a": {"b": np.float32(1)}, "c": [np.float32(2)]})

    assert client.get_run(run_name).pull() == {"a.b": 1.0, "c.0": 2.0}


def test_a_template_gives_its_structure(client, new_run, run_name):
    new_run(SGD, ALONE, {"a": {"b": np.float32(1)}, "c": [np.float32(2)]})
    like = {"c": (np.float32(0),), "a": {"b": np.float32(0)}}

    assert client.get_run(run_name, like=like).pull() == {"c": (2.0,), "a": {"b": 1.0}}


def test_a_template_that_does_not_fit_is_refused(client, new_run, run_name):
    new_run(SGD, ALONE)

    with pytest.raises(kedge.errors.InvalidInputError) as error:
        client.get_run(run_name, like={"w": np.zeros(9, np.float32)})

    assert reason_of(error) == "TENSOR_SHAPE_MISMATCH"


def test_bare_array_is_a_tree(new_run):
    run = new_run(SGD, ALONE, np.arange(3, dtype=np.float32))

    assert run.manifest.tensors[0].name == "weights"
    np.testing.assert_array_equal(run.pull(), [0, 1, 2])


def test_pulled_weights_are_the_callers_own(new_run):
    run = new_run(SGD, ALONE)
    run.pull()["w"][:] = 100

    assert run.pull()["w"] == [3.0]


def test_weights_of_many_chunks_come_back_whole(new_run):
    given = np.random.default_rng(0).standard_normal((3, 1_000_003)).astype(np.float32)  # 12 MB in chunks of 1 MiB
    run = new_run(SGD, ALONE, {"a": given, "b": np.float32(4)})

    np.testing.assert_array_equal(run.pull()["a"], given)


def test_fresh_run_reports_its_beginning(new_run):
    status = new_run(optim.Lookahead(optim.SGD(lr=0.5), sync_period=2), ALONE).status()

    assert (status.step, status.lookahead_sync_count, status.learning_rate) == (0, 0, 0.5)
    assert (status.workers, status.round, status.loss) == ((), None, None)
    assert (status.applied_count, dict(status.rejected_counts)) == (0, {})


def test_manifest_of_another_run_under_the_same_name_is_noticed(client, new_run, run_name):
    old = new_run(SGD, ALONE)
    old.delete()
    client.create_run(run_name, params=np.zeros(2, np.float32), optimizer=SGD, aggregation=ALONE)

    with pytest.raises(kedge.KedgeError) as error:
        old.pull()

    assert reason_of(error) == "MANIFEST_MISMATCH"


def test_closed_client_refuses_and_may_be_closed_twice(client, new_run):
    run = new_run(SGD, ALONE)
    client.close()
    client.close()

    with pytest.raises(kedge.KedgeError) as error:
        run.status()

    assert reason_of(error) == "CANCELLED"
