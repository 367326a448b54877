"""What torch's parameter groups hold beyond rate and decay, and what others do to the run meanwhile."""

import pytest

import kedge
from kedge import optim

torch = pytest.importorskip("torch")

from kedge.adapters.torch import RemoteOptimizer  # noqa: E402  it needs PyTorch

ALONE = kedge.Synchronous(quorum=1)


def step(optimizer, model):
    optimizer.zero_grad()
    model(torch.ones(1, 1)).sum().backward()
    optimizer.step()


def new_run(client, run_name, model, optimizer):
    params = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
    return client.create_run(run_name, params=params, optimizer=optimizer, aggregation=ALONE)


REFUSED = [
    (optim.SGD(momentum=0.9), {"maximize": True}, "maximize.*negate the loss"),
    (optim.SGD(momentum=0.9), {"momentum": 0.5}, "momentum is set in parameter group 0, to 0.5"),
    (optim.SGD(momentum=0.9), {"dampening": 0.1}, "dampening is set"),
    (optim.SGD(momentum=0.9), {"nesterov": True}, "nesterov is set"),
    (optim.Lookahead(optim.SGD(momentum=0.9)), {"momentum": 0.0}, "momentum is set"),
    (optim.SGD(), {"betas": (0.9, 0.999)}, "betas is set"),
    (optim.AdamW(), {"betas": (0.8, 0.999)}, "betas is set"),
    (optim.AdamW(), {"eps": 1e-3}, "eps is set"),
    (optim.AdamW(), {"amsgrad": True}, "amsgrad is set"),
]


@pytest.mark.parametrize(("optimizer", "options", "text"), REFUSED)
def test_options_that_differ_from_the_runs_optimizer_are_refused(client, run_name, optimizer, options, text):
    model = torch.nn.Linear(1, 1)
    groups = [{"params": list(model.named_parameters()), **options}]
    with pytest.raises(ValueError, match=text):
        RemoteOptimizer.create(model, client, run_name, optimizer, param_groups=groups)
    assert client.list_runs() == []

    run = new_run(client, run_name, model, optimizer)
    with pytest.raises(ValueError, match=text):
        RemoteOptimizer(groups, run=run)
    assert run.status().workers == ()


@pytest.mark.parametrize(("optimizer", "options", "text"), REFUSED)
def test_options_that_are_set_later_are_refused_and_nothing_is_pushed(client, run_name, optimizer, options, text):
    model = torch.nn.Linear(1, 1)
    with RemoteOptimizer.create(model, client, run_name, optimizer) as remote:
        remote.param_groups[0].update(options)
        with pytest.raises(ValueError, match=text):
            step(remote, model)
        assert remote.run.status().step == 0


@pytest.mark.parametrize(
    ("optimizer", "make"),
    [
        (optim.SGD(lr=0.5, momentum=0.9), lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9)),
        (optim.SGD(lr=0.5, momentum=0.9, nesterov=True), lambda p: torch.optim.SGD(p, 0.5, 0.9, nesterov=True)),
        (optim.Adam(lr=0.5, eps=1e-6), lambda p: torch.optim.Adam(p, lr=0.5, eps=1e-6)),
        (optim.AdamW(lr=0.5), lambda p: torch.optim.AdamW(p, lr=0.5, weight_decay=0.0)),
    ],
)
def test_groups_of_torchs_own_optimizer_are_taken_where_they_say_what_the_run_has(client, run_name, optimizer, make):
    model = torch.nn.Linear(1, 1)
    groups = make(model.parameters()).param_groups  # with every option that it has
    with RemoteOptimizer.create(model, client, run_name, optimizer, param_groups=groups) as remote:
        step(remote, model)
        assert remote.run.status().step == 1


def test_options_of_a_group_of_nothing_that_requires_a_gradient_are_refused(client, run_name):
    model = torch.nn.Linear(1, 1)
    model.bias.requires_grad_(False)
    groups = [{"params": [model.weight]}, {"params": [model.bias], "lr": 0.1}]
    with pytest.raises(ValueError, match="lr is set in parameter group 1, of which nothing requires a gradient"):
        RemoteOptimizer.create(model, client, run_name, optim.SGD(lr=1.0), param_groups=groups)
    assert client.list_runs() == []


def test_rate_that_another_set_in_place_of_a_schedule_is_shown_after_a_pull_and_stays(client, run_name):
    model = torch.nn.Linear(1, 1)
    with RemoteOptimizer.create(model, client, run_name, optim.SGD(lr=optim.ExponentialLR(1.0, 0.5))) as remote:
        (group,) = remote.param_groups
        step(remote, model)
        remote.run.set_hyperparameters(lr=0.125)
        assert group["lr"] == 0.5
        remote.pull()
        assert group["lr"] == 0.125
        step(remote, model)
        step(remote, model)
        assert group["lr"] == remote.run.status().learning_rate == 0.125

        group["lr"] = 0.5  # the rate that was shown before the pull
        step(remote, model)
        assert remote.run.status().learning_rate == 0.5
