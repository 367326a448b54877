"""Which parameters belong to which tensors: names, order, shapes, ties, and what does not fit."""

import copy

import numpy as np
import pytest

import kedge
from kedge import KedgeError, optim

torch = pytest.importorskip("torch")

from kedge.adapters.torch import RemoteOptimizer  # noqa: E402  it needs PyTorch

SGD = optim.SGD(lr=1.0)
ALONE = kedge.Synchronous(quorum=1)


def module(**shapes):
    """A module with parameters of these shapes, filled with 1, 2, 3, ..."""
    result = torch.nn.Module()
    for index, (name, shape) in enumerate(shapes.items(), 1):
        result.register_parameter(name, torch.nn.Parameter(torch.full(shape, float(index))))
    return result


def run_of(client, run_name, model, **options):
    params = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
    return client.create_run(run_name, params=params, optimizer=SGD, aggregation=ALONE, **options)


def assert_nobody_joined(run):
    assert run.status().workers == ()
    assert run.status().step == 0


# What is taken


@pytest.mark.parametrize("form", ["named", "plain", "groups", "named groups", "another optimizer's groups"])
def test_parameters_begin_with_the_runs_weights_however_they_are_given(client, run_name, form):
    model = module(a=(2,), b=(2, 3), c=())
    run = run_of(client, run_name, model)
    given = module(a=(2,), b=(2, 3), c=())
    for parameter in given.parameters():
        parameter.data.zero_()
    forms = {
        "named": given.named_parameters(),
        "plain": given.parameters(),
        "groups": [{"params": [given.a, given.b]}, {"params": given.c}],
        "named groups": [{"params": [("c", given.c), ("a", given.a)]}, {"params": [("b", given.b)]}],
        "another optimizer's groups": torch.optim.SGD(given.named_parameters()).param_groups,
    }
    if form == "another optimizer's groups":
        forms[form][0].pop("momentum")
        forms[form][0].pop("nesterov")
        forms[form][0]["lr"] = 1.0
    with RemoteOptimizer(forms[form], run=run) as optimizer:
        assert [p.detach().mean().item() for p in given.parameters()] == [1, 2, 3]
        given.b.grad = torch.ones(2, 3)
        optimizer.step()

    assert [p.detach().mean().item() for p in given.parameters()] == [1, 1, 3]
    assert {name: array.mean() for name, array in run.pull().items()} == {"a": 1, "b": 1, "c": 3}


def test_weights_are_set_in_place_so_that_views_of_parameters_stay_views(client, run_name):
    model = module(a=(2, 2))
    view, address = model.a.data.view(-1), model.a.data_ptr()
    with RemoteOptimizer.create(model, client, run_name, SGD) as optimizer:
        model.a.grad = torch.ones(2, 2)
        optimizer.step()

    assert (view.tolist(), model.a.data_ptr()) == ([0, 0, 0, 0], address)


def test_names_decide_and_not_the_order(client, run_name):
    run = run_of(client, run_name, module(a=(2,), b=(2,)))
    swapped = module(b=(2,), a=(2,))
    with RemoteOptimizer(swapped.named_parameters(), run=run):
        assert (swapped.a.tolist(), swapped.b.tolist()) == ([1, 1], [2, 2])


def test_nested_trees_of_params_have_the_names_of_a_module(client, run_name):
    params = {"0": {"weight": np.zeros((1, 2), np.float32), "bias": np.zeros(1, np.float32)}}
    run = client.create_run(run_name, params=params, optimizer=SGD, aggregation=ALONE)
    model = torch.nn.Sequential(torch.nn.Linear(2, 1))
    with RemoteOptimizer(model.named_parameters(), run=run) as optimizer:
        model(torch.tensor([2.0, 3.0])).backward()
        optimizer.step()

    assert run.pull()["0"]["weight"].tolist() == [[-2, -3]]
    assert model[0].weight.tolist() == [[-2, -3]]


def test_parameter_without_a_gradient_counts_as_one_of_zeros(client, run_name):
    model = module(a=(2,), b=(2,))
    with RemoteOptimizer.create(model, client, run_name, optim.SGD(lr=1.0, weight_decay=0.25)) as optimizer:
        model.a.grad = torch.ones(2)
        optimizer.step()

    assert (model.a.tolist(), model.b.tolist()) == ([-0.25, -0.25], [1.5, 1.5])


def test_step_without_any_gradient_is_refused(client, run_name):
    model = module(a=(2,))
    with RemoteOptimizer.create(model, client, run_name, SGD) as optimizer:
        with pytest.raises(ValueError, match=r"call loss.backward\(\)"):
            optimizer.step()
        model.a.grad = torch.ones(2)
        optimizer.step()
        optimizer.zero_grad()
        assert model.a.grad is None
        with pytest.raises(ValueError, match=r"call loss.backward\(\)"):
            optimizer.step()
        assert optimizer.run.status().step == 1


def test_sparse_gradient_is_refused_and_a_dense_one_of_the_same_values_is_not(client, run_name):
    model = torch.nn.Embedding(4, 2, sparse=True)
    with torch.no_grad():
        model.weight.fill_(5.0)
    with RemoteOptimizer.create(model, client, run_name, SGD) as optimizer:
        model(torch.tensor([1, 1])).sum().backward()
        with pytest.raises(KedgeError, match=r"'weight' is sparse.*sparse=False") as error:
            optimizer.step()
        assert error.value.reason == "UNSUPPORTED_STRUCTURE"
        assert optimizer.run.status().workers[0].last_sequence == 0
        model.weight.grad = model.weight.grad.to_dense()
        optimizer.step()

    assert model.weight.tolist() == [[5, 5], [3, 3], [5, 5], [5, 5]]


# Tied and frozen parameters


class Tied(torch.nn.Module):
    """An embedding that is the output layer too, as in many language models."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(5, 3)
        self.head = torch.nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.embed(x)).square().mean()


def assert_trains_as_torch(model, optimizer, reference, theirs):
    for _ in range(3):
        for net, stepper in ((model, optimizer), (reference, theirs)):
            stepper.zero_grad()
            net(torch.tensor([0, 3, 3])).backward()
            stepper.step()
    torch.testing.assert_close(model.embed.weight, reference.embed.weight, rtol=0, atol=1e-5)


def test_tied_parameters_are_one_tensor(client, run_name):
    model = Tied()
    reference = copy.deepcopy(model)
    with RemoteOptimizer.create(model, client, run_name, optim.SGD(lr=0.5, momentum=0.9)) as optimizer:
        assert [spec.name for spec in optimizer.run.manifest.tensors] == ["embed.weight"]
        theirs = torch.optim.SGD(reference.parameters(), lr=0.5, momentum=0.9)
        assert_trains_as_torch(model, optimizer, reference, theirs)
    assert model.head.weight is model.embed.weight


def test_run_of_a_state_dict_holds_tied_parameters_twice_and_trains_them_alike(client, run_name):
    model = Tied()
    reference = copy.deepcopy(model)
    run = client.create_run(
        run_name, params=model.state_dict(), optimizer=optim.SGD(lr=0.5, momentum=0.9), aggregation=ALONE
    )
    with pytest.raises(KedgeError, match=r"'head.weight'.*remove_duplicate=False") as error:
        RemoteOptimizer(model.named_parameters(), run=run)
    assert error.value.reason == "TENSOR_MISSING"
    with RemoteOptimizer(model.named_parameters(remove_duplicate=False), run=run) as optimizer:
        assert len(optimizer.param_groups[0]["params"]) == 1
        theirs = torch.optim.SGD(reference.parameters(), lr=0.5, momentum=0.9)
        assert_trains_as_torch(model, optimizer, reference, theirs)
    pulled = run.pull()
    assert np.array_equal(pulled["embed.weight"], pulled["head.weight"])


def test_what_needs_no_gradient_stays_out_of_the_run_and_as_it_is(client, run_name):
    models = [module(a=(2,), b=(1,)) for _ in range(2)]
    for index, model in enumerate(models):
        model.a.requires_grad_(False).fill_(10 + index)
    for form in ("named_parameters", "parameters"):
        with RemoteOptimizer.create(models[0], client, f"{run_name}-{form}", SGD) as optimizer:
            assert list(optimizer.run.pull()) == ["b"]
            with RemoteOptimizer(getattr(models[1], form)(), run=optimizer.run):
                assert (models[1].a.tolist(), models[1].b.tolist()) == ([11, 11], [2])


@pytest.mark.parametrize("form", ["create", "named_parameters", "parameters"])
def test_gradient_of_what_was_left_out_of_the_run_is_refused_and_nothing_pushed(client, run_name, form):
    model = module(a=(2,), b=(1,))
    model.a.requires_grad_(False)
    optimizer = RemoteOptimizer.create(model, client, run_name, SGD)
    if form != "create":
        optimizer.close()
        optimizer = RemoteOptimizer(getattr(model, form)(), run=optimizer.run)
    model.a.requires_grad_(True)
    model.a.grad, model.b.grad = torch.ones(2), torch.ones(1)
    name = "parameter 0" if form == "parameters" else "a"
    with pytest.raises(ValueError, match=f"'{name}' has a gradient and is not in the run.*create a run while"):
        optimizer.step()
    assert optimizer.run.status().step == 0

    model.a.requires_grad_(False)
    optimizer.step()
    assert optimizer.run.status().step == 1
    optimizer.close()


def test_order_does_not_tell_a_frozen_parameter_that_the_run_does_not_have_from_one_that_it_has(client, run_name):
    model = module(a=(2,), b=(2,))
    run = run_of(client, run_name, module(a=(2,)))
    model.a.requires_grad_(False)  # it is a that the run has, and b that requires a gradient
    with pytest.raises(ValueError, match=r"of shape \(2,\) with and without requires_grad.*give names"):
        RemoteOptimizer(model.parameters(), run=run)
    assert_nobody_joined(run)


def test_frozen_group_takes_what_needs_no_gradient_into_the_run(client, run_name):
    models = [module(a=(2,), b=(2,)) for _ in range(2)]
    for index, model in enumerate(models):
        model.a.requires_grad_(False).fill_(10 + index)
    frozen = [optim.Group("a", frozen=True)]
    settings = optim.SGD(lr=1.0, weight_decay=0.5)
    optimizers = [RemoteOptimizer.create(model, client, run_name, settings, groups=frozen) for model in models]
    assert models[1].a.tolist() == [10, 10]
    models[0].b.grad = torch.zeros(2)
    optimizers[0].step()

    assert (models[0].a.tolist(), models[0].b.tolist()) == ([10, 10], [1, 1])
    for optimizer in optimizers:
        optimizer.close()


# What does not fit


@pytest.mark.parametrize(
    ("given", "reason", "text"),
    [
        (lambda m: [("a", m.a)], "TENSOR_MISSING", "params has no 'b'"),
        (lambda m: [m.a], "TENSOR_MISSING", "1 parameters without names, the run has 2"),
        (lambda m: [m.a, m.b, m.x], "TENSOR_UNEXPECTED", "3 parameters without names"),
        (lambda m: [("a", m.a), ("b", m.b), ("x", m.x)], "TENSOR_UNEXPECTED", "no tensor 'x'"),
        (lambda m: [("a", m.a), ("b", m.x)], "TENSOR_SHAPE_MISMATCH", r"'b' has shape \(5,\)"),
        (lambda m: [m.b, m.a], "TENSOR_SHAPE_MISMATCH", r"parameter 0 has shape \(2, 3\).*give names"),
        (lambda m: [("a", m.a.double()), ("b", m.b)], "UNSUPPORTED_DTYPE", "'a' is float64"),
        (lambda m: [("a", m.a.to("meta")), ("b", m.b)], "UNSUPPORTED_STRUCTURE", "'a' is on the meta device"),
    ],
)
def test_parameters_that_are_not_the_runs_are_refused_before_it_is_joined(client, run_name, given, reason, text):
    run = run_of(client, run_name, module(a=(2,), b=(2, 3)))
    with pytest.raises(KedgeError, match=text) as error:
        RemoteOptimizer(given(module(a=(2,), b=(2, 3), x=(5,))), run=run)
    assert error.value.reason == reason
    assert_nobody_joined(run)


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        (lambda m: m, TypeError, "params is a Module"),
        (lambda m: m.a, TypeError, "params is a Parameter"),
        (lambda m: dict(m.named_parameters()), TypeError, "params is a dict"),
        (lambda m: 3, TypeError, "params is a int"),
        (lambda m: [m.a, 3], TypeError, "params holds a int"),
        (lambda m: [{"parameters": [m.a]}], TypeError, "each parameter group is a dict with 'params'"),
        (lambda m: [{"params": [m.a]}, m.b], TypeError, "each parameter group is a dict with 'params'"),
        (lambda m: [], ValueError, "params is empty"),
        (lambda m: iter(()), ValueError, "gives its parameters only once"),
        (lambda m: [("a", m.a), m.b], ValueError, "names for some parameters only"),
        (lambda m: [("a", m.a), ("a", m.b)], ValueError, "'a' twice"),
    ],
)
def test_what_is_no_list_of_parameters_is_refused(client, run_name, given, error, text):
    run = run_of(client, run_name, module(a=(2,), b=(2,)))
    with pytest.raises(error, match=text):
        RemoteOptimizer(given(module(a=(2,), b=(2,))), run=run)
    assert_nobody_joined(run)


def test_run_is_no_name(client, run_name):
    with pytest.raises(TypeError, match=r"run is 'digits'.*client\.get_run"):
        RemoteOptimizer(module(a=(2,)).parameters(), run="digits")


def test_groups_without_names_are_refused_where_order_alone_would_tell_two_parameters_apart(client, run_name):
    model = module(scale=(4,), shift=(4,))
    run = run_of(client, run_name, model)
    with pytest.raises(ValueError, match=r"shape \(4,\) in 2 groups, and no names to tell them apart"):
        RemoteOptimizer([{"params": [model.shift]}, {"params": [model.scale]}], run=run)
    assert_nobody_joined(run)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_module_of_a_dtype_that_cannot_be_held_makes_no_run(client, run_name, dtype):
    model = torch.nn.Module()
    model.weight = torch.nn.Parameter(torch.zeros(2, dtype=dtype))
    with pytest.raises(KedgeError, match=r"tensor 'weight' is (float|complex)64") as error:
        RemoteOptimizer.create(model, client, run_name, SGD)
    assert error.value.reason == "UNSUPPORTED_DTYPE"
    assert client.list_runs() == []


def test_module_of_another_shape_is_refused_by_the_run_that_exists(client, run_name):
    with RemoteOptimizer.create(torch.nn.Linear(2, 2), client, run_name, SGD) as optimizer:
        with pytest.raises(KedgeError) as error:
            RemoteOptimizer.create(torch.nn.Linear(3, 2), client, run_name, SGD)
        assert error.value.reason == "RUN_MISMATCH"
        assert len(optimizer.run.status().workers) == 1


# Parameters that come later


def test_tensors_without_a_parameter_get_zeros_until_their_group_is_added(client, run_name):
    run = run_of(client, run_name, module(a=(2,), b=(2,), c=(2,)), groups=[optim.Group("c", lr=0.5)])
    mine = module(a=(2,), b=(2,), c=(2,))
    for parameter in mine.parameters():
        parameter.data.zero_()
    with RemoteOptimizer([("a", mine.a)], run=run, allow_missing=True) as optimizer:
        mine.a.grad = torch.ones(2)
        optimizer.step()
        assert {name: array[0] for name, array in run.pull().items()} == {"a": 0, "b": 2, "c": 3}
        assert mine.c.tolist() == [0, 0]

        optimizer.add_param_group({"params": [("b", mine.b), ("c", mine.c)]})
        assert (mine.b.tolist(), mine.c.tolist()) == ([2, 2], [3, 3])
        assert [(g["param_names"], g["lr"]) for g in optimizer.param_groups] == [
            (["a"], 1.0),
            (["b"], 1.0),
            (["c"], 0.5),
        ]
        for parameter in mine.parameters():
            parameter.grad = torch.ones(2)
        optimizer.step()
    assert {name: array[0] for name, array in run.pull().items()} == {"a": -1, "b": 1, "c": 2.5}
    assert [p[0].item() for p in mine.parameters()] == [-1, 1, 2.5]


def test_adding_a_group_does_not_bring_back_a_rate_that_the_run_has_left(client, run_name):
    model = module(a=(2,), b=(2,))
    run = run_of(client, run_name, model)
    with RemoteOptimizer([("a", model.a)], run=run, allow_missing=True) as optimizer:
        model.a.grad = torch.ones(2)
        optimizer.step()
        run.set_hyperparameters(lr=0.25)
        optimizer.add_param_group({"params": [("b", model.b)]})
        assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]
        optimizer.step()
        assert [made.change.lr for made in run.info().changes] == [0.25]


def test_group_that_is_added_has_the_rate_that_was_set_for_the_others_and_not_sent_yet(client, run_name):
    model = module(a=(2,), b=(2,))
    run = run_of(client, run_name, model)
    with RemoteOptimizer([("a", model.a)], run=run, allow_missing=True) as optimizer:
        optimizer.param_groups[0]["lr"] = 0.5
        optimizer.add_param_group({"params": [("b", model.b)]})
        for parameter in model.parameters():
            parameter.grad = torch.ones(2)
        optimizer.step()
    assert (model.a.tolist(), model.b.tolist()) == ([0.5, 0.5], [1.5, 1.5])


@pytest.mark.parametrize(
    ("group", "error", "text"),
    [
        (lambda m: {"params": [("x", m.b)]}, KedgeError, "no tensor 'x'"),
        (lambda m: {"params": [("a", m.a)]}, ValueError, "'a' is in a parameter group already"),
        (lambda m: {"params": [m.b]}, KedgeError, "without names"),
        (lambda m: {"params": [("b", m.b)], "lr": 0.25}, ValueError, "lr is 1 in parameter group 0, 0.25 in parameter"),
        (lambda m: {"params": [("b", m.b)], "momentum": 0.5}, ValueError, "momentum is set in parameter group"),
        (lambda m: [("b", m.b)], TypeError, "param_group is a list"),
    ],
)
def test_group_that_cannot_be_added_leaves_the_optimizer_as_it_was(client, run_name, group, error, text):
    model = module(a=(2,), b=(2,))
    run = run_of(client, run_name, model)
    with RemoteOptimizer([("a", model.a)], run=run, allow_missing=True) as optimizer:
        with pytest.raises(error, match=text):
            optimizer.add_param_group(group(model))
        assert len(optimizer.param_groups) == 1
        model.a.grad = torch.ones(2)
        optimizer.step()
    assert (model.a.tolist(), model.b.tolist()) == ([0, 0], [2, 2])
