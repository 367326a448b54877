"""Hyperparameters between torch's parameter groups and the run: shown, set by hand, and moved by torch's schedulers."""

import pytest

import kedge
from kedge import optim

torch = pytest.importorskip("torch")

from kedge.adapters.torch import RemoteOptimizer  # noqa: E402  it needs PyTorch

loss_of = torch.nn.functional.cross_entropy
lr_scheduler = torch.optim.lr_scheduler

SCHEDULERS = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, step_size=4, gamma=0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [3, 7], gamma=0.3),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, gamma=0.9),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, start_factor=0.25, total_iters=5),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=12),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=5),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=12, power=2),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3, cycle_momentum=False),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.3, total_steps=13, cycle_momentum=False),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=4), lr_scheduler.ExponentialLR(o, 0.8)], milestones=[4]
    ),
}


def train(model, optimizer, batches, scheduler):
    """Returns the rates that the steps were made with."""
    rates = []
    for images, labels in batches:
        optimizer.zero_grad()
        loss_of(model(images), labels).backward()
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return rates


def assert_close(model, reference, atol=1e-5):
    for mine, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=atol)


def only(optimizer):
    (group,) = optimizer.param_groups
    return group


def step(optimizer):
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def lr_changes(run):
    return [(made.step, made.group, made.change.lr) for made in run.info().changes]


# Torch's schedulers


@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS.keys())
def test_schedulers_of_torch_train_as_they_do_with_torchs_optimizer(client, run_name, network, batches, make):
    model, reference = network(), network()
    with RemoteOptimizer.create(model, client, run_name, optim.SGD(lr=0.1, momentum=0.9)) as optimizer:
        rates = train(model, optimizer, batches[:12], make(optimizer))
    theirs = torch.optim.SGD(reference.parameters(), lr=0.1, momentum=0.9)

    assert rates == train(reference, theirs, batches[:12], make(theirs))
    assert len({rate for (rate,) in rates}) > 1
    assert_close(model, reference)


def test_scheduler_of_torch_trains_alike_on_a_real_server(any_client, run_name, network, batches):
    model, reference = network(), network()
    with RemoteOptimizer.create(model, any_client, run_name, optim.AdamW(lr=1e-2)) as optimizer:
        train(model, optimizer, batches, SCHEDULERS["CosineAnnealingLR"](optimizer))
    theirs = torch.optim.AdamW(reference.parameters(), lr=1e-2)
    train(reference, theirs, batches, SCHEDULERS["CosineAnnealingLR"](theirs))

    assert_close(model, reference)


def test_plateau_scheduler_of_torch_lowers_the_runs_rate(client, run_name):
    model = torch.nn.Linear(1, 1)
    with RemoteOptimizer.create(model, client, run_name, optim.SGD(lr=0.5)) as optimizer:
        scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
        for loss in (1.0, 2.0, 0.5):
            step(optimizer)
            scheduler.step(loss)
        assert lr_changes(optimizer.run) == [(3, "", 0.25)]
        assert optimizer.run.status().learning_rate == only(optimizer)["lr"] == 0.25


def test_momentum_is_not_the_workers_to_cycle(client, run_name):
    model = torch.nn.Linear(1, 1)
    settings = optim.SGD(lr=0.5, momentum=0.9)
    with (
        RemoteOptimizer.create(model, client, run_name, settings) as optimizer,
        pytest.raises(ValueError, match="cycle_momentum"),
    ):
        lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=5)


def test_workers_that_run_the_same_scheduler_change_the_rate_once(client, run_name, in_background):
    def work(_):
        model = torch.nn.Linear(1, 1)
        with RemoteOptimizer.create(
            model, client, run_name, optim.SGD(lr=1.0), aggregation=kedge.Synchronous(quorum=2)
        ) as optimizer:
            scheduler = lr_scheduler.LinearLR(optimizer, start_factor=0.5, total_iters=2)
            for _ in range(4):
                step(optimizer)
                scheduler.step()
            return model.bias.item(), only(optimizer)["lr"]

    run = RemoteOptimizer.create(
        torch.nn.Linear(1, 1), client, run_name, optim.SGD(lr=1.0), aggregation=kedge.Synchronous(quorum=2)
    )
    bias = run.run.pull()["bias"].item()
    run.close()
    (a, rate), (b, _) = [future.result(60) for future in [in_background(work, index) for index in range(2)]]

    assert a == b == pytest.approx(bias - 0.5 - 0.75 - 1 - 1, abs=1e-6)
    assert rate == 1.0
    assert lr_changes(run.run) == [(1, "", 0.5), (2, "", 0.75), (3, "", 1.0)]


# By hand


def test_rate_and_decay_set_by_hand_hold_from_the_next_step(client, run_name):
    model = torch.nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(8.0)
    with RemoteOptimizer.create(model, client, run_name, optim.SGD(lr=1.0)) as optimizer:
        only(optimizer)["lr"] = torch.tensor(0.5)
        only(optimizer)["weight_decay"] = 0.25
        assert optimizer.run.info().changes == ()
        step(optimizer)
        assert model.weight.item() == 8 - 0.5 * (1 + 0.25 * 8)
        step(optimizer)

        (made,) = optimizer.run.info().changes
        assert (made.step, made.change.lr, made.change.weight_decay) == (1, 0.5, 0.25)


def test_decay_of_adamw_is_the_decoupled_one(client, run_name):
    model = torch.nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(8.0)
    with RemoteOptimizer.create(model, client, run_name, optim.AdamW(lr=0.5, weight_decay=0.125)) as optimizer:
        assert only(optimizer)["weight_decay"] == 0.125
        only(optimizer)["weight_decay"] = 0.25
        model.weight.grad = torch.zeros(1, 1)
        optimizer.step()

    assert model.weight.item() == 8 - 0.5 * 0.25 * 8


@pytest.mark.parametrize("bad", [-0.5, float("nan"), float("inf")])
def test_rate_out_of_range_is_refused_and_nothing_pushed(client, run_name, bad):
    model = torch.nn.Linear(1, 1)
    with RemoteOptimizer.create(model, client, run_name, optim.SGD(lr=1.0)) as optimizer:
        only(optimizer)["lr"] = bad
        with pytest.raises(ValueError, match=r"^lr is"):
            step(optimizer)
        assert optimizer.run.status().workers[0].last_sequence == 0
        only(optimizer)["lr"] = 0.5
        step(optimizer)
        assert lr_changes(optimizer.run) == [(1, "", 0.5)]


def test_change_that_did_not_arrive_is_sent_with_the_next_step(client, run_name, monkeypatch):
    model = torch.nn.Linear(1, 1)
    with RemoteOptimizer.create(model, client, run_name, optim.SGD(lr=1.0)) as optimizer:
        only(optimizer)["lr"] = 0.5
        with monkeypatch.context() as patch:

            def fail(**_):
                raise kedge.KedgeError("SERVER_UNAVAILABLE", "no answer")

            patch.setattr(optimizer.run, "set_hyperparameters", fail)
            with pytest.raises(kedge.KedgeError, match="no answer"):
                step(optimizer)
        assert optimizer.run.status().step == 0
        step(optimizer)
        assert lr_changes(optimizer.run) == [(1, "", 0.5)]


def test_change_that_arrived_before_a_push_that_did_not_stays_shown(client, run_name, monkeypatch):
    model = torch.nn.Linear(1, 1)
    with RemoteOptimizer.create(model, client, run_name, optim.SGD(lr=1.0)) as optimizer:
        only(optimizer)["lr"] = 0.5
        with monkeypatch.context() as patch:

            def fail(*_, **__):
                raise kedge.KedgeError("SERVER_UNAVAILABLE", "no answer")

            patch.setattr(optimizer.worker, "step", fail)
            with pytest.raises(kedge.KedgeError, match="no answer"):
                step(optimizer)
        optimizer.pull()
        assert only(optimizer)["lr"] == 0.5
        step(optimizer)
        assert lr_changes(optimizer.run) == [(1, "", 0.5)]


# What groups show


def test_groups_show_what_the_run_was_created_with_until_its_first_step(client, run_name):
    """Another worker's scheduler may have changed the rate already; all schedulers have to begin with the same."""
    models = [torch.nn.Linear(1, 1) for _ in range(3)]
    with RemoteOptimizer.create(models[0], client, run_name, optim.SGD(lr=1.0, weight_decay=0.5)) as first:
        first.run.set_hyperparameters(lr=0.25, weight_decay=0.125)
        with RemoteOptimizer.create(models[1], client, run_name, first.run.optimizer) as second:
            assert (only(second)["lr"], only(second)["weight_decay"]) == (1.0, 0.5)
            assert second.defaults["lr"] == 1.0
        step(first)
        with RemoteOptimizer.create(models[2], client, run_name, first.run.optimizer) as third:
            assert (only(third)["lr"], only(third)["weight_decay"]) == (0.25, 0.125)
        assert lr_changes(first.run) == [(1, "", 0.25)]


def test_schedule_of_the_run_is_shown_and_left_alone(client, run_name):
    model = torch.nn.Linear(1, 1)
    schedule = optim.StepLR(base_lr=1.0, step_size=1, gamma=0.5, steps_per_epoch=2)
    with RemoteOptimizer.create(model, client, run_name, optim.SGD(lr=schedule)) as optimizer:
        shown = [only(optimizer)["lr"]]
        for _ in range(5):
            step(optimizer)
            shown.append(only(optimizer)["lr"])
        assert shown == [1.0, 1.0, 0.5, 0.5, 0.25, 0.25]
        assert optimizer.run.info().changes == ()
        with RemoteOptimizer(torch.nn.Linear(1, 1).parameters(), run=optimizer.run) as late:
            assert only(late)["lr"] == 0.25

        only(optimizer)["lr"] = 3.0
        step(optimizer)
        step(optimizer)
        assert only(optimizer)["lr"] == optimizer.run.status().learning_rate == 3.0
        assert lr_changes(optimizer.run) == [(6, "", 3.0)]


@pytest.mark.parametrize(
    "schedule",
    [
        optim.CosineAnnealingLR(0.5, T_max=6, last_epoch=1),
        optim.CyclicLR(0.1, 0.5, step_size_up=3),
        optim.OneCycleLR(max_lr=0.5, epochs=4, steps_per_epoch=3),
        optim.WarmupCosineSchedule(0.5, warmup_steps=2, total_steps=5, steps_per_epoch=2),
        optim.SequentialLR([optim.LinearLR(0.5, 0.1, total_iters=3), optim.ExponentialLR(0.5)], milestones=[3]),
    ],
    ids=lambda schedule: type(schedule).__name__,
)
def test_rate_that_is_shown_is_the_one_that_the_server_uses(client, run_name, schedule):
    with RemoteOptimizer.create(torch.nn.Linear(1, 1), client, run_name, optim.SGD(lr=schedule)) as optimizer:
        shown, used = [], []
        for _ in range(10):
            shown.append(only(optimizer)["lr"])
            used.append(optimizer.run.status().learning_rate)
            step(optimizer)
    assert shown == used
    assert len(set(shown)) > 2


def test_schedule_set_on_the_live_run_is_shown_after_a_pull(client, run_name):
    model = torch.nn.Linear(1, 1)
    with RemoteOptimizer.create(model, client, run_name, optim.SGD(lr=1.0)) as optimizer:
        step(optimizer)
        optimizer.run.set_hyperparameters(lr=optim.ExponentialLR(base_lr=0.5, gamma=0.5))
        optimizer.pull()
        shown = [only(optimizer)["lr"]]
        for _ in range(2):
            step(optimizer)
            shown.append(only(optimizer)["lr"])

        assert shown == [0.5, 0.25, 0.125]
        assert optimizer.run.status().learning_rate == 0.125
        assert len(optimizer.run.info().changes) == 1


def test_schedule_that_ticks_by_hand_is_shown_as_of_the_last_pull(client, run_name):
    model = torch.nn.Linear(1, 1)
    schedule = optim.ExponentialLR(base_lr=1.0, gamma=0.5, tick="manual")
    with RemoteOptimizer.create(model, client, run_name, optim.SGD(lr=schedule)) as optimizer:
        step(optimizer)
        optimizer.run.tick_schedule()
        step(optimizer)
        assert only(optimizer)["lr"] == 1.0
        optimizer.pull()
        assert only(optimizer)["lr"] == 0.5
        assert optimizer.run.info().changes == ()


def test_pull_takes_newer_weights_and_keeps_what_was_set_and_not_sent(client, run_name):
    models = [torch.nn.Linear(1, 1) for _ in range(2)]
    with (
        RemoteOptimizer.create(models[0], client, run_name, optim.SGD(lr=1.0), aggregation=kedge.Asynchronous()) as a,
        RemoteOptimizer(models[1].named_parameters(), run=a.run) as b,
    ):
        only(b)["weight_decay"] = 0.5
        step(a)
        a.run.set_hyperparameters(lr=0.25)
        b.pull()

        assert torch.equal(models[0].weight, models[1].weight)
        assert b.worker.step_number == 1
        assert (only(b)["lr"], only(b)["weight_decay"]) == (0.25, 0.5)


# Groups on both sides


def split(model):
    named = dict(model.named_parameters())
    return [
        {"params": [named[name] for name in ("0.weight", "2.weight")], "weight_decay": 0.1},
        {"params": [named[name] for name in ("0.bias", "2.bias")], "lr": 0.05},
    ]


def test_parameter_groups_of_torch_become_the_runs_and_train_alike(any_client, run_name, network, batches):
    model, reference = network(), network()
    settings = optim.SGD(lr=0.2, momentum=0.9)
    with RemoteOptimizer.create(model, any_client, run_name, settings, param_groups=split(model)) as optimizer:
        assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(0.2, 0.1), (0.05, 0.0)]
        assert [group.name for group in optimizer.run.groups] == ["group 0", "group 1"]
        rates = train(model, optimizer, batches, SCHEDULERS["StepLR"](optimizer))
    theirs = torch.optim.SGD(split(reference), lr=0.2, momentum=0.9)

    assert rates == train(reference, theirs, batches, SCHEDULERS["StepLR"](theirs))
    assert_close(model, reference)


def test_groups_of_the_run_are_torch_groups_of_one_list_of_parameters(client, run_name, network, batches):
    model, reference = network(), network()
    groups = [optim.Group("*.bias", lr=0.05, weight_decay=0.0)]
    settings = optim.SGD(lr=0.2, momentum=0.9, weight_decay=0.1)
    with RemoteOptimizer.create(model, client, run_name, settings, groups=groups) as optimizer:
        assert [group["param_names"] for group in optimizer.param_groups] == [
            ["0.weight", "2.weight"],
            ["0.bias", "2.bias"],
        ]
        train(model, optimizer, batches[:12], SCHEDULERS["ExponentialLR"](optimizer))
    theirs = torch.optim.SGD(split(reference), lr=0.2, momentum=0.9)
    train(reference, theirs, batches[:12], SCHEDULERS["ExponentialLR"](theirs))

    assert_close(model, reference)


def test_group_without_a_rate_of_its_own_follows_the_runs(client, run_name):
    model = torch.nn.Linear(1, 1)
    schedule = optim.ExponentialLR(base_lr=1.0, gamma=0.5)
    with RemoteOptimizer.create(
        model, client, run_name, optim.SGD(lr=schedule), groups=[optim.Group("bias", weight_decay=0.0)]
    ) as optimizer:
        step(optimizer)
        assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5]
        optimizer.param_groups[1]["lr"] = 2.0
        bias = model.bias.item()
        step(optimizer)
        assert model.bias.item() == pytest.approx(bias - 2.0)
        assert [group["lr"] for group in optimizer.param_groups] == [0.25, 2.0]
        assert lr_changes(optimizer.run) == [(2, "bias", 2.0)]
        with RemoteOptimizer(torch.nn.Linear(1, 1).named_parameters(), run=optimizer.run) as late:
            assert [group["lr"] for group in late.param_groups] == [0.25, 2.0]


def test_rate_of_a_frozen_group_goes_nowhere(client, run_name):
    model = torch.nn.Linear(1, 1)
    bias = model.bias.item()
    with RemoteOptimizer.create(
        model, client, run_name, optim.SGD(lr=1.0), groups=[optim.Group("bias", frozen=True)]
    ) as optimizer:
        for group in optimizer.param_groups:
            group["lr"] = 0.5
        step(optimizer)
        assert lr_changes(optimizer.run) == [(1, "", 0.5)]
    assert model.bias.item() == bias


def test_torch_groups_that_agree_are_one_where_the_run_has_one(client, run_name):
    model = torch.nn.Linear(1, 1)
    run = RemoteOptimizer.create(model, client, run_name, optim.SGD(lr=1.0)).run
    groups = [{"params": [("weight", model.weight)]}, {"params": [("bias", model.bias)]}]
    with RemoteOptimizer(groups, run=run) as optimizer:
        scheduler = lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
        step(optimizer)
        scheduler.step()
        step(optimizer)
        assert lr_changes(run) == [(2, "", 0.5)]

        optimizer.param_groups[1]["lr"] = 0.125
        with pytest.raises(ValueError, match=r"lr is 0.5 in parameter group 0, 0.125 in parameter group 1.*groups=\["):
            step(optimizer)
        assert run.status().step == 2


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"lr": 0.5}, r"lr is 1 in parameter group 0, 0.5 in parameter group 1, but the run has no groups.*create"),
        ({"weight_decay": 0.5}, r"weight_decay is 0 in parameter group 0, 0.5 in parameter group 1"),
        ({"momentum": 0.5}, "momentum is set in parameter group 1"),
        ({"grad_clip_norm": 0.5}, "grad_clip_norm is set in parameter group 1.*optim.Group"),
    ],
)
def test_options_that_the_run_has_no_group_for_are_refused_before_it_is_joined(client, run_name, options, text):
    model = torch.nn.Linear(1, 1)
    params = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
    run = client.create_run(run_name, params=params, optimizer=optim.SGD(lr=1.0), aggregation=kedge.Asynchronous())
    with pytest.raises(ValueError, match=text):
        RemoteOptimizer([{"params": [model.weight]}, {"params": [model.bias], **options}], run=run)
    assert run.status().workers == ()


def test_torch_group_across_the_runs_groups_is_refused(client, run_name):
    model = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Linear(1, 2))
    with RemoteOptimizer.create(
        model, client, run_name, optim.SGD(lr=1.0), groups=[optim.Group("*.bias", lr=0.5)]
    ) as optimizer:
        named = list(model.named_parameters())
        with pytest.raises(ValueError, match=r"group 0 has tensors of no group and '\*.bias' in the run"):
            RemoteOptimizer([{"params": named[:2]}, {"params": named[2:]}], run=optimizer.run)


def test_one_torch_group_with_a_rate_of_its_own_sets_the_runs(client, run_name):
    model = torch.nn.Linear(1, 1)
    run = RemoteOptimizer.create(model, client, run_name, optim.SGD(lr=1.0)).run
    with RemoteOptimizer([{"params": model.named_parameters(), "lr": 0.5, "name": "all"}], run=run) as optimizer:
        assert (only(optimizer)["lr"], only(optimizer)["name"]) == (0.5, "all")
        step(optimizer)
        assert lr_changes(run) == [(1, "", 0.5)]


@pytest.mark.parametrize(
    ("groups", "text"),
    [
        (lambda m: [{"params": m.parameters(), "momentum": 0.5}], "momentum is set in parameter group 0"),
        (lambda m: [{"params": torch.nn.Linear(1, 1).parameters()}], "group 0, which is no parameter of the model"),
        (lambda m: [{"params": m.parameters(), "lr": -1.0}], "^lr is -1.0"),
        (lambda m: [], "params is empty"),
    ],
)
def test_parameter_groups_that_cannot_be_the_runs_make_no_run(client, run_name, groups, text):
    model = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match=text):
        RemoteOptimizer.create(model, client, run_name, optim.SGD(momentum=0.9), param_groups=groups(model))
    assert client.list_runs() == []


def test_groups_are_given_in_one_way_only(client, run_name):
    model = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match="groups and param_groups are both given"):
        RemoteOptimizer.create(
            model,
            client,
            run_name,
            optim.SGD(),
            groups=[optim.Group("bias")],
            param_groups=[{"params": model.parameters()}],
        )


def test_schedule_of_kedge_may_be_a_torch_groups_rate(client, run_name):
    model = torch.nn.Linear(1, 1)
    schedule = optim.ExponentialLR(base_lr=0.5, gamma=0.5)
    groups = [{"params": [model.weight]}, {"params": [model.bias], "lr": schedule, "name": "biases"}]
    with RemoteOptimizer.create(model, client, run_name, optim.SGD(lr=1.0), param_groups=groups) as optimizer:
        step(optimizer)
        assert [group["lr"] for group in optimizer.param_groups] == [1.0, 0.25]
        assert optimizer.run.groups == (optim.Group("bias", lr=schedule, name="biases"),)


def test_parameters_in_no_parameter_group_stay_out_of_the_run(client, run_name):
    model = torch.nn.Linear(1, 1)
    with RemoteOptimizer.create(
        model, client, run_name, optim.SGD(lr=1.0), param_groups=[{"params": model.bias}]
    ) as optimizer:
        assert list(optimizer.run.pull()) == ["bias"]


def test_names_with_wildcards_are_only_themselves(client, run_name):
    model = torch.nn.Module()
    model.values = torch.nn.ParameterDict({"a[b]*": torch.ones(1), "ab": torch.ones(1)})
    groups = [{"params": [model.values["a[b]*"]], "lr": 0.5}, {"params": [model.values["ab"]]}]
    with RemoteOptimizer.create(model, client, run_name, optim.SGD(lr=1.0), param_groups=groups) as optimizer:
        step(optimizer)
    assert (model.values["a[b]*"].item(), model.values["ab"].item()) == (0.5, 0.0)
