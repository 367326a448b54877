"""Whole trainings: the numbers are those of torch.optim."""

import copy

import pytest

import kedge
from kedge import optim

torch = pytest.importorskip("torch")

from kedge.adapters.torch import RemoteOptimizer, pull  # noqa: E402  it needs PyTorch

loss_of = torch.nn.functional.cross_entropy

PAIRS = {
    "sgd": (optim.SGD(lr=0.1), lambda p: torch.optim.SGD(p, lr=0.1)),
    "momentum": (optim.SGD(lr=0.1, momentum=0.9), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)),
    "nesterov": (
        optim.SGD(lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3),
    ),
    "adam": (optim.Adam(lr=1e-2), lambda p: torch.optim.Adam(p, lr=1e-2)),
    "adam with decay": (
        optim.Adam(lr=1e-2, betas=(0.8, 0.99), eps=1e-6, weight_decay=1e-2),
        lambda p: torch.optim.Adam(p, lr=1e-2, betas=(0.8, 0.99), eps=1e-6, weight_decay=1e-2),
    ),
    "adamw": (optim.AdamW(lr=1e-2, weight_decay=0.1), lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1)),
}


def train(model, optimizer, batches, *, after=lambda: None):
    """The loop that a user has. Returns the losses."""
    losses = []
    for images, labels in batches:
        optimizer.zero_grad()
        loss = loss_of(model(images), labels)
        loss.backward()
        optimizer.step()
        after()
        losses.append(loss.item())
    return losses


def assert_close(model, reference, atol=1e-5):
    for (name, mine), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS.keys())
def test_forty_steps_end_where_torchs_own_optimizer_ends(any_client, run_name, network, batches, pair):
    settings, torchs = pair
    model, reference, untrained = network(), network(), network()
    with RemoteOptimizer.create(model, any_client, run_name, settings) as optimizer:
        losses = train(model, optimizer, batches)
        assert optimizer.worker.step_number == 40
    expected = train(reference, torchs(reference.parameters()), batches)

    assert losses == pytest.approx(expected, abs=1e-5)
    assert losses[-1] < losses[0] - 0.1
    assert_close(model, reference)
    assert not torch.allclose(model[0].weight, untrained[0].weight, atol=1e-2)


def test_mean_of_two_workers_is_one_process_on_the_joined_batch(any_client, run_name, network, batches, in_background):
    """The workers' shares of a batch differ in size, so their gradients differ in weight."""
    reference = network()
    train(reference, torch.optim.SGD(reference.parameters(), lr=0.1, momentum=0.9), batches)

    def work(share, seed):
        model = network(seed)
        with RemoteOptimizer.create(
            model, any_client, run_name, optim.SGD(lr=0.1, momentum=0.9), aggregation=kedge.Synchronous(quorum=2)
        ) as optimizer:
            for images, labels in batches:
                optimizer.zero_grad()
                loss = loss_of(model(images[share]), labels[share])
                loss.backward()
                optimizer.step(loss=loss, example_count=len(labels[share]))
        return model

    first = RemoteOptimizer.create(
        network(), any_client, run_name, optim.SGD(lr=0.1, momentum=0.9), aggregation=kedge.Synchronous(quorum=2)
    )
    first.close()  # its weights are those that both begin with, whatever their own were
    futures = [in_background(work, slice(12), 5), in_background(work, slice(12, None), 6)]
    a, b = (future.result(100) for future in futures)

    assert_close(a, reference)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_lookahead_is_torchs_optimizer_with_its_weights_pulled_back(client, run_name, network, batches):
    model, reference = network(), network()
    settings = optim.Lookahead(optim.SGD(lr=0.1), sync_period=5, alpha=0.5)
    with RemoteOptimizer.create(model, client, run_name, settings) as optimizer:
        train(model, optimizer, batches[:20])

    inner = torch.optim.SGD(reference.parameters(), lr=0.1)
    slow = copy.deepcopy(reference)
    for begin in range(0, 20, 5):
        train(reference, inner, batches[begin : begin + 5])
        with torch.no_grad():
            for fast_p, slow_p in zip(reference.parameters(), slow.parameters(), strict=True):
                slow_p.add_(fast_p - slow_p, alpha=0.5)
                fast_p.copy_(slow_p)
    assert_close(model, reference)
    untrained = network(7)
    untrained.load_state_dict(pull(optimizer.run, "slow"))
    assert_close(untrained, slow)


def test_convolutions_whose_gradients_lie_channels_last(any_client, run_name, batches):
    torch.manual_seed(3)
    model = torch.nn.Sequential(
        torch.nn.Unflatten(1, (1, 8, 8)),
        torch.nn.Conv2d(1, 4, 3),
        torch.nn.Conv2d(4, 3, 3),
        torch.nn.Flatten(),
        torch.nn.Linear(48, 10),
    ).to(memory_format=torch.channels_last)
    reference = copy.deepcopy(model)
    with RemoteOptimizer.create(model, any_client, run_name, optim.SGD(lr=0.1)) as optimizer:
        train(model, optimizer, batches[:10])
        assert not model[2].weight.grad.is_contiguous()
        assert model[2].weight.is_contiguous(memory_format=torch.channels_last)
    train(reference, torch.optim.SGD(reference.parameters(), lr=0.1), batches[:10])

    assert_close(model, reference)


def test_gradients_clipped_by_torch_are_pushed_clipped(client, run_name, network, batches):
    model, reference = network(), network()

    def clipped_training(net, optimizer):
        for images, labels in batches[:10]:
            optimizer.zero_grad()
            loss_of(net(images), labels).backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 0.1)
            optimizer.step()

    with RemoteOptimizer.create(model, client, run_name, optim.Adam(lr=1e-2)) as optimizer:
        clipped_training(model, optimizer)
    clipped_training(reference, torch.optim.Adam(reference.parameters(), lr=1e-2))

    assert_close(model, reference)


def test_grad_scaler_scales_back_and_skips_what_overflows(client, run_name, network, batches):
    model, reference = network(), network()
    with RemoteOptimizer.create(model, client, run_name, optim.SGD(lr=0.1)) as optimizer:
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for index, (images, labels) in enumerate(batches[:6]):
            optimizer.zero_grad()
            scaler.scale(loss_of(model(images), labels)).backward()
            if index == 2:
                model[0].bias.grad[0] = torch.inf
            scaler.step(optimizer, example_count=len(labels))
            scaler.update()
        assert optimizer.run.status().step == 5
    train(reference, torch.optim.SGD(reference.parameters(), lr=0.1), batches[:2] + batches[3:6])

    assert_close(model, reference)
    assert scaler.get_scale() == 512.0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bit_parameters_follow_weights_that_the_server_holds_in_float32(any_client, run_name, dtype):
    dtype = getattr(torch, dtype)
    model = torch.nn.Linear(2, 1, bias=False).to(dtype)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 2.0]]))
    with RemoteOptimizer.create(model, any_client, run_name, optim.SGD(lr=1.0)) as optimizer:
        for _ in range(8):
            model.weight.grad = torch.tensor([[2.0**-12, 2.0**-4]], dtype=dtype)
            optimizer.step()
        held = optimizer.run.pull()["weight"]

    # A step of 2**-12 is lost in a parameter of either dtype at 1.0; the server adds up eight of them to 2**-9.
    assert model.weight.dtype is dtype
    assert model.weight.tolist() == [[torch.tensor(1 - 2.0**-9).to(dtype).item(), 1.5]]
    assert held.tolist() == model.weight.tolist()
    (pulled,) = pull(optimizer.run).values()
    assert (pulled.dtype, pulled.tolist()) == (dtype, model.weight.tolist())


@pytest.mark.parametrize("wire_dtype", ["bfloat16", "float16"])
def test_wire_dtype_rounds_what_travels(client, run_name, wire_dtype):
    model = torch.nn.Linear(1, 1, bias=False)
    near = 1 + 2.0**-12
    with torch.no_grad():
        model.weight.fill_(near)
    optimizer = RemoteOptimizer.create(model, client, run_name, optim.SGD(lr=1.0), wire_dtype=wire_dtype)
    with optimizer:
        assert model.weight.item() == 1.0
        model.weight.grad = torch.full((1, 1), 0.5 + 2.0**-13)
        optimizer.step()
        assert optimizer.run.pull()["weight"].item() == near - 0.5


def test_it_follows_the_usual_closure(client, run_name, network, batches):
    model, reference = network(), network()
    theirs = torch.optim.SGD(reference.parameters(), lr=0.1)
    images, labels = batches[0]

    def closure_for(net, optimizer):
        def closure():
            optimizer.zero_grad()
            loss = loss_of(net(images), labels)
            loss.backward()
            return loss

        return closure

    with RemoteOptimizer.create(model, client, run_name, optim.SGD(lr=0.1)) as optimizer:
        with torch.no_grad():  # as torch's own, it lets the closure compute gradients
            loss = optimizer.step(closure_for(model, optimizer))
        assert optimizer.run.status().loss == pytest.approx(loss.item())
        assert loss.item() == theirs.step(closure_for(reference, theirs)).item()
        optimizer.step(closure_for(model, optimizer), loss=7.0)
        assert optimizer.run.status().loss == 7.0
    theirs.step(closure_for(reference, theirs))
    assert_close(model, reference)


def test_loss_and_example_count_go_along(client, run_name, network, batches):
    model = network()
    images, labels = batches[0]
    with RemoteOptimizer.create(model, client, run_name, optim.SGD(lr=0.1)) as optimizer:
        loss = loss_of(model(images), labels)
        loss.backward()

        assert optimizer.step(loss=loss, example_count=len(labels)) is None
        assert optimizer.run.status().loss == pytest.approx(loss.item())
        with pytest.raises(TypeError, match="loss is"):
            optimizer.step(loss="low")
        with pytest.raises(kedge.KedgeError, match="example_count is 0"):
            optimizer.step(example_count=0)
        assert optimizer.worker.step_number == optimizer.run.status().step == 1


def test_step_hooks_are_called_around_the_step(client, run_name, network, batches):
    model = network()
    images, labels = batches[0]
    seen = []
    with RemoteOptimizer.create(model, client, run_name, optim.SGD(lr=0.1)) as optimizer:
        optimizer.register_step_pre_hook(lambda opt, args, kwargs: seen.append(opt.worker.step_number))
        after = optimizer.register_step_post_hook(lambda opt, args, kwargs: seen.append(opt.worker.step_number))
        loss_of(model(images), labels).backward()
        optimizer.step()
        assert seen == [0, 1]
        after.remove()
        optimizer.step()
    assert seen == [0, 1, 1]


def test_late_gradient_is_left_out_and_the_newest_weights_taken(client, run_name, network):
    """Two workers, a quorum of one: the second one's gradient is of weights that are no more."""
    settings = optim.SGD(lr=1.0)
    models = [network(), network()]
    with (
        RemoteOptimizer.create(models[0], client, run_name, settings) as fast,
        RemoteOptimizer.create(models[1], client, run_name, settings) as slow,
    ):
        for model, value in zip(models, (0.25, 100.0), strict=True):
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, value)
        fast.step()
        slow.step()

        assert slow.worker.last_result.reason == "STALE_GRADIENT"
        assert fast.worker.last_result.outcome == "applied"
        assert slow.worker.step_number == 1
    assert_close(models[1], models[0], atol=0)
    assert torch.equal(models[0][2].bias, network()[2].bias - 0.25)


def test_gradient_with_a_nan_changes_nothing(client, run_name, network, caplog):
    model = network()
    with RemoteOptimizer.create(model, client, run_name, optim.Adam(lr=1.0)) as optimizer:
        model[0].bias.grad = torch.full_like(model[0].bias, torch.nan)
        optimizer.step()
        assert optimizer.worker.last_result.reason == "NON_FINITE_GRADIENT"
    assert_close(model, network(), atol=0)
    assert "NON_FINITE_GRADIENT" in caplog.text
