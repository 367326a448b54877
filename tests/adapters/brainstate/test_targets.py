"""Which run an optimizer is of: given, named or made; what construction refuses; state_dict; parameter groups."""

from typing import Any

import brainstate
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kedge
from kedge import optim
from kedge.adapters import brainstate as kb


def states(**values: Any) -> dict[str, brainstate.ParamState]:
    return {name: brainstate.ParamState(jnp.asarray(value, jnp.float32)) for name, value in values.items()}


def create(client: kedge.Client, params: Any, optimizer: Any, **options: Any) -> kedge.Run:
    return client.create_run(
        "given", params=params, optimizer=optimizer, aggregation=kedge.Synchronous(quorum=1), **options
    )


ONES = {"a": jnp.ones(1), "b": jnp.ones(1)}


# ------------------------------------------------------------------------------------------------------- construction


def test_without_run_and_client_it_says_what_to_give() -> None:
    for kind in (kb.AdaBelief, lambda **target: kb.Lookahead(optim.SGD(), **target)):
        for target in ({}, {"run": "digits"}):
            with pytest.raises(ValueError, match=r"client is missing: give client=kedge\.connect\(\.\.\.\)"):
                kind(**target)


@pytest.mark.parametrize(
    ("target", "message"),
    [({"run": 3}, "run is 3: give a run"), ({"client": "localhost:1"}, "client is 'localhost:1'")],
)
def test_what_is_no_run_and_no_client_is_refused(target: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        kb.AdaBelief(**target)


def test_a_name_that_cannot_be_one_is_refused_at_once(client: kedge.Client) -> None:
    with pytest.raises(kedge.KedgeError) as caught:
        kb.AdaBelief(client=client, run="a/b")
    assert caught.value.reason == "INVALID_NAME"


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"eps": 0.0}, "eps"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"grad_clip_norm": 0.0}, "grad_clip_norm"),
        ({"grad_clip_value": -1.0}, "grad_clip_value"),
        ({"max_direction": 0.0}, "max_direction"),
    ],
)
def test_adabelief_names_the_argument_that_it_refuses(client: kedge.Client, arguments: Any, field: str) -> None:
    with pytest.raises(ValueError, match=f"^{field} is "):
        kb.AdaBelief(**arguments, client=client)


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"sync_period": 0}, "sync_period"),
        ({"alpha": 1.5}, "alpha"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"grad_clip_norm": 0.0}, "grad_clip_norm"),
        ({"grad_clip_value": -1.0}, "grad_clip_value"),
    ],
)
def test_lookahead_names_the_argument_that_it_refuses(client: kedge.Client, arguments: Any, field: str) -> None:
    with pytest.raises(ValueError, match=f"^{field} is "):
        kb.Lookahead(optim.SGD(), **arguments, client=client)


def test_a_base_optimizer_that_is_none_is_refused(client: kedge.Client) -> None:
    with pytest.raises(TypeError, match="base_optimizer is 'sgd'"):
        kb.Lookahead("sgd", client=client)


def test_a_base_optimizer_that_cannot_be_read_is_refused(client: kedge.Client) -> None:
    with pytest.raises(ValueError, match="this optax transformation cannot be read"):
        kb.Lookahead(optax.stateless(lambda updates, params: updates), client=client)


def test_the_arguments_stand_where_braintools_has_them(client: kedge.Client) -> None:
    belief = kb.AdaBelief(0.1, (0.8, 0.9), 1e-8, 0.1, 2.0, 3.0, client=client)
    assert belief.optimizer == optim.AdaBelief(
        lr=0.1, betas=(0.8, 0.9), eps=1e-8, weight_decay=0.1, grad_clip_norm=2.0, grad_clip_value=3.0
    )
    ahead = kb.Lookahead(optim.SGD(), 7, 0.3, 0.1, 0.2, 2.0, 3.0, client=client)
    assert ahead.optimizer == optim.Lookahead(
        optim.SGD(), sync_period=7, alpha=0.3, lr=0.1, weight_decay=0.2, grad_clip_norm=2.0, grad_clip_value=3.0
    )
    assert (belief.betas, belief.eps, belief.weight_decay, belief.grad_clip_norm) == ((0.8, 0.9), 1e-8, 0.1, 2.0)
    assert (ahead.sync_period, ahead.alpha, ahead.grad_clip_value) == (7, 0.3, 3.0)


def test_adabelief_has_a_greatest_direction_if_it_is_given_one(client: kedge.Client) -> None:
    assert kb.AdaBelief(max_direction=2.0, client=client).optimizer == optim.AdaBelief(max_direction=2.0)


def test_lookahead_keeps_the_rate_of_its_base_unless_it_is_given_one(client: kedge.Client) -> None:
    base = optax.sgd(learning_rate=0.25)
    kept = kb.Lookahead(base, client=client)
    replaced = kb.Lookahead(base, lr=0.125, client=client)
    assert (kept.current_lr, replaced.current_lr) == (0.25, 0.125)
    for optimizer, rate in ((kept, 0.25), (replaced, 0.125)):
        weights = states(w=[1.0])
        with optimizer.register_trainable_weights(weights):
            optimizer.update({"w": jnp.ones(1)})
        assert weights["w"].value.tolist() == [1.0 - rate]


# -------------------------------------------------------------------------------------------------------- which run


def test_without_a_name_each_optimizer_has_a_run_of_its_own(client: kedge.Client) -> None:
    names = set()
    for _ in range(2):
        for optimizer in (kb.AdaBelief(client=client), kb.Lookahead(optim.SGD(), client=client)):
            with optimizer.register_trainable_weights(states(w=[1.0])):
                names.add(optimizer.run.name)
    assert len(names) == 4
    assert sorted({name.removeprefix("runs/").split("-")[0] for name in names}) == ["adabelief", "lookahead"]


def test_a_run_that_is_made_takes_a_step_with_each_contribution(client: kedge.Client) -> None:
    with kb.AdaBelief(client=client).register_trainable_weights(states(w=[1.0])) as optimizer:
        assert optimizer.run.aggregation == kedge.Synchronous(quorum=1)


def test_a_run_of_that_name_with_another_optimizer_is_refused(client: kedge.Client) -> None:
    with kb.AdaBelief(client=client, run="one").register_trainable_weights(states(w=[1.0])):
        pass
    weights = states(w=[5.0])
    with pytest.raises(kedge.KedgeError) as caught:
        kb.AdaBelief(lr=0.1, client=client, run="one").register_trainable_weights(weights)
    assert (caught.value.reason, caught.value.metadata["field"]) == ("RUN_MISMATCH", "optimizer")
    assert weights["w"].value.tolist() == [5.0]


def test_a_run_that_is_given_decides_on_aggregation_and_needs_no_client(client: kedge.Client) -> None:
    run = create(client, {"w": np.array([2.0], np.float32)}, optim.AdaBelief(lr=0.1))
    weights = states(w=[1.0])
    with kb.AdaBelief(lr=0.1, run=run).register_trainable_weights(weights) as optimizer:
        assert optimizer.run is run
        assert weights["w"].value.tolist() == [2.0]


def test_a_run_may_have_been_made_of_nested_arrays_in_another_order(client: kedge.Client) -> None:
    layer = brainstate.nn.Linear(2, 1)
    params = {"weight": {"weight": np.ones((2, 1), np.float32), "bias": np.zeros(1, np.float32)}}
    run = create(client, params, optim.Lookahead(optim.SGD(lr=1.0), alpha=1.0))
    optimizer = kb.Lookahead(optim.SGD(lr=1.0), alpha=1.0, run=run)
    with optimizer.register_trainable_weights(layer.states(brainstate.ParamState)):
        optimizer.update({("weight",): {"weight": jnp.array([[1.0], [2.0]]), "bias": jnp.array([3.0])}})
    assert layer.weight.value["weight"].tolist() == [[0.0], [-1.0]]
    assert layer.weight.value["bias"].tolist() == [-3.0]


def test_a_run_that_is_given_with_another_optimizer_is_refused(client: kedge.Client) -> None:
    run = create(client, {"w": np.ones(1, np.float32)}, optim.SGD(lr=0.1))
    with pytest.raises(kedge.KedgeError, match="runs/given has another optimizer: it has SGD") as caught:
        kb.AdaBelief(run=run).register_trainable_weights(states(w=[1.0]))
    assert caught.value.reason == "RUN_MISMATCH"
    assert run.status().workers == ()


@pytest.mark.parametrize(
    ("weights", "reason"),
    [
        (states(a=[1.0], b=[1.0], c=[1.0]), "TENSOR_UNEXPECTED"),
        (states(c=[1.0]), "TENSOR_UNEXPECTED"),
        (states(a=[1.0, 2.0], b=[1.0]), "TENSOR_SHAPE_MISMATCH"),
    ],
)
def test_weights_that_a_given_run_does_not_have_are_refused(client: kedge.Client, weights: Any, reason: str) -> None:
    run = create(client, {"a": np.ones(1, np.float32), "b": np.ones(1, np.float32)}, optim.AdaBelief())
    optimizer = kb.AdaBelief(run=run)
    with pytest.raises(kedge.KedgeError) as caught:
        optimizer.register_trainable_weights(weights)
    assert caught.value.reason == reason
    assert run.status().workers == ()
    with optimizer.register_trainable_weights(states(a=[3.0], b=[4.0])):
        optimizer.update(ONES)
    assert run.status().step == 1


def test_a_given_run_is_joined_when_all_its_weights_are_registered(client: kedge.Client) -> None:
    run = create(client, {"a": np.ones(1, np.float32), "b": np.ones(1, np.float32)}, optim.AdaBelief())
    with kb.AdaBelief(run=run).register_trainable_weights(states(a=[3.0])) as optimizer:
        assert run.status().workers == ()
        with pytest.raises(kedge.KedgeError, match="'b'") as caught:
            optimizer.update(ONES)
        assert caught.value.reason == "TENSOR_MISSING"
        optimizer.register_trainable_weights(states(b=[4.0]))
        optimizer.update(ONES)
    assert run.status().step == 1


# -------------------------------------------------------------------------------------------------------- state_dict


def test_a_state_dict_names_run_worker_and_step(client: kedge.Client) -> None:
    with kb.AdaBelief(lr=0.1, client=client, run="one").register_trainable_weights(states(w=[1.0])) as optimizer:
        optimizer.update({"w": jnp.ones(1)})
        saved = optimizer.state_dict()
        (worker,) = optimizer.run.status().workers
    assert saved == {"run": "runs/one", "worker": worker.name, "step_count": 1, "lr": 0.1, "base_lr": 0.1}


def test_a_state_dict_leads_a_new_process_back_to_its_run(client: kedge.Client) -> None:
    weights = states(w=[1.0])
    with kb.Lookahead(optim.SGD(lr=1.0), client=client).register_trainable_weights(weights) as optimizer:
        optimizer.update({"w": jnp.ones(1)})
        saved = optimizer.state_dict()
    fresh = states(w=[7.0])
    resumed = kb.Lookahead(optim.SGD(lr=1.0), client=client)
    resumed.load_state_dict(saved)
    with resumed.register_trainable_weights(fresh):
        assert resumed.run.name == saved["run"]
        assert (resumed.step_count.value, fresh["w"].value.tolist()) == (1, [0.0])
    assert len(client.list_runs()) == 1


def test_a_state_dict_of_the_same_run_pulls_what_the_run_has_now(client: kedge.Client) -> None:
    mine = states(w=[1.0])
    with (
        kb.Lookahead(optim.SGD(lr=1.0), client=client, run="one").register_trainable_weights(mine) as one,
        kb.Lookahead(optim.SGD(lr=1.0), client=client, run="one").register_trainable_weights(states(w=[0.0])) as two,
    ):
        saved = one.state_dict()
        two.update({"w": jnp.ones(1)})
        one.load_state_dict(saved)
        assert (one.step_count.value, mine["w"].value.tolist()) == (1, [0.0])


def test_a_state_dict_of_another_run_is_refused(client: kedge.Client) -> None:
    with kb.AdaBelief(client=client, run="one").register_trainable_weights(states(w=[1.0])) as one:
        saved = one.state_dict()
    run = create(client, {"w": np.ones(1, np.float32)}, optim.AdaBelief())
    with kb.AdaBelief(client=client).register_trainable_weights(states(w=[1.0])) as registered:
        for other in (kb.AdaBelief(client=client, run="two"), kb.AdaBelief(run=run), registered):
            with pytest.raises(ValueError, match="state_dict is of runs/one, and this optimizer of runs/"):
                other.load_state_dict(saved)


def test_a_state_dict_of_braintools_is_refused(client: kedge.Client) -> None:
    with pytest.raises(ValueError, match="state_dict names no run"):
        kb.AdaBelief(client=client).load_state_dict({"step_count": 3, "opt_state": ()})


# --------------------------------------------------------------------------------------------------- parameter groups


@pytest.mark.parametrize("is_first", [True, False], ids=["before", "after"])
def test_a_parameter_group_has_hyperparameters_of_its_own(any_client: kedge.Client, is_first: bool) -> None:
    weights, bias = states(a=[1.0]), states(b=[1.0])
    with kb.Lookahead(optim.SGD(lr=0.5), alpha=1.0, client=any_client) as optimizer:
        if is_first:
            optimizer.add_param_group(bias, lr=0.25, weight_decay=2.0)
        optimizer.register_trainable_weights(weights)
        if not is_first:
            optimizer.add_param_group(bias, lr=0.25, weight_decay=2.0)
        optimizer.update(ONES)
        assert weights["a"].value.tolist() == [0.5]
        assert bias["b"].value.tolist() == [1.0 - 0.25 * (1.0 + 2.0 * 1.0)]
        groups = optimizer.param_groups
        assert [group["params"] for group in groups] == [weights, bias]
        assert (groups[0]["lr"].value, groups[1]["lr"], groups[1]["weight_decay"]) == (0.5, 0.25, 2.0)
        (group,) = optimizer.run.groups
        assert (group.name, group.lr, group.weight_decay) == ("group-1", 0.25, 2.0)


def test_registered_weights_may_go_into_a_group(client: kedge.Client) -> None:
    weights = states(a=[1.0], b=[1.0])
    optimizer = kb.Lookahead(optim.SGD(lr=1.0), alpha=1.0, client=client)
    with optimizer.register_trainable_weights(weights):
        optimizer.add_param_group({"anything": weights["b"]}, frozen=True)
        optimizer.update(ONES)
        assert optimizer.param_groups[0]["params"] == {"a": weights["a"]}
        assert optimizer.param_groups[1]["params"] == {"b": weights["b"]}
    assert (weights["a"].value.tolist(), weights["b"].value.tolist()) == ([0.0], [1.0])


def test_the_rate_of_a_group_can_be_changed_as_the_run_goes_on(client: kedge.Client) -> None:
    weights, bias = states(a=[1.0]), states(b=[1.0])
    with kb.Lookahead(optim.SGD(lr=0.5), alpha=1.0, client=client) as optimizer:
        optimizer.add_param_group(bias)
        optimizer.register_trainable_weights(weights)
        optimizer.param_groups[1]["lr"] = 0.125
        optimizer.param_groups[0]["lr"].value = 0.25
        optimizer.update(ONES)
        optimizer.param_groups[0]["weight_decay"] = 1.0
        optimizer.update(ONES)
    assert weights["a"].value.tolist() == [0.75 - 0.25 * (1.0 + 0.75)]
    assert bias["b"].value.tolist() == [0.875 - 0.125 * (1.0 + 0.875)]


@pytest.mark.parametrize("option", ["lr", "weight_decay"])
def test_a_group_cannot_go_back_to_the_value_of_the_run(client: kedge.Client, option: str) -> None:
    weights, bias = states(a=[1.0]), states(b=[1.0])
    with kb.Lookahead(optim.SGD(lr=0.5), alpha=1.0, client=client) as optimizer:
        optimizer.add_param_group(bias, **{option: 0.25})
        optimizer.register_trainable_weights(weights)
        optimizer.param_groups[1][option] = None
        with pytest.raises(ValueError, match=rf"^{option} of the group 'group-1' is None"):
            optimizer.update(ONES)
        assert optimizer.run.status().step == 0


def test_a_group_without_a_rate_has_that_of_the_run(client: kedge.Client) -> None:
    weights, bias = states(a=[1.0]), states(b=[1.0])
    scheduler = kb.ExponentialLR(0.5, 0.5)
    with kb.Lookahead(optim.SGD(), alpha=1.0, lr=scheduler, client=client) as optimizer:
        optimizer.add_param_group(bias, weight_decay=0.0)
        optimizer.register_trainable_weights(weights)
        scheduler.step()
        optimizer.update(ONES)
    assert weights["a"].value.tolist() == bias["b"].value.tolist() == [0.75]


def test_a_name_with_wildcards_in_it_is_taken_literally(client: kedge.Client) -> None:
    odd = states(**{"*[ab]?": [1.0]})
    with kb.Lookahead(optim.SGD(lr=1.0), alpha=1.0, client=client) as optimizer:
        optimizer.add_param_group(odd, frozen=True)
        optimizer.register_trainable_weights(states(a=[1.0]))
        optimizer.update({"a": jnp.ones(1), "*[ab]?": jnp.ones(1)})
        assert optimizer.run.groups[0].takes("*[ab]?")
        assert not optimizer.run.groups[0].takes("*ax")
    assert odd["*[ab]?"].value.tolist() == [1.0]


def test_a_group_that_is_added_to_a_closed_optimizer_waits_for_the_registration(client: kedge.Client) -> None:
    weights, bias = states(a=[1.0]), states(b=[1.0])
    params = kb.params(weights | bias)
    run = create(client, params, optim.AdaBelief(), groups=[optim.Group("b", frozen=True)])
    optimizer = kb.AdaBelief(run=run).register_trainable_weights(weights | bias)
    optimizer.close()
    optimizer.add_param_group(bias, frozen=True)
    assert run.status().workers == ()
    with optimizer.register_trainable_weights(weights):
        assert len(run.status().workers) == 1


def test_a_run_in_use_takes_no_more_groups(client: kedge.Client) -> None:
    weights = states(a=[1.0])
    with kb.AdaBelief(client=client).register_trainable_weights(weights) as optimizer:
        optimizer.update(ONES)
        with pytest.raises(ValueError, match=r"in use, .*: call add_param_group\(\) before"):
            optimizer.add_param_group(states(b=[1.0]))
        assert len(optimizer.param_groups) == 1
        optimizer.update(ONES)
        assert optimizer.run.status().step == 2


def test_a_run_that_another_worker_has_joined_is_not_made_anew(client: kedge.Client) -> None:
    with (
        kb.AdaBelief(client=client, run="one").register_trainable_weights(states(a=[1.0])) as one,
        kb.AdaBelief(client=client, run="one").register_trainable_weights(states(a=[1.0])),
        pytest.raises(ValueError, match="runs/one is in use"),
    ):
        one.add_param_group(states(b=[1.0]))


def test_a_run_of_anothers_making_is_not_made_anew(client: kedge.Client) -> None:
    create(client, {"a": np.ones(1, np.float32)}, optim.AdaBelief())
    with kb.AdaBelief(client=client, run="given").register_trainable_weights(states(a=[1.0])) as optimizer:
        with pytest.raises(ValueError, match="runs/given is in use"):
            optimizer.add_param_group(states(b=[1.0]))
        optimizer.update(ONES)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, "lr is -1.0"),
        ({"weight_decay": -1.0}, ValueError, "weight_decay is -1.0"),
        ({"momentum": 0.9}, TypeError, "momentum"),
    ],
)
def test_a_group_of_what_can_be_none_is_refused_and_changes_nothing(
    client: kedge.Client, arguments: Any, error: type[Exception], message: str
) -> None:
    with kb.AdaBelief(client=client).register_trainable_weights(states(a=[1.0])) as optimizer:
        with pytest.raises(error, match=message):
            optimizer.add_param_group(states(b=[1.0]), **arguments)
        optimizer.update({"a": jnp.ones(1)})
        assert (len(optimizer.param_groups), optimizer.run.groups) == (1, ())


def test_weights_belong_to_one_group(client: kedge.Client) -> None:
    bias = states(b=[1.0])
    optimizer = kb.AdaBelief(client=client)
    optimizer.add_param_group(bias, lr=0.1)
    with pytest.raises(ValueError, match="params has 'b', which is of another group"):
        optimizer.add_param_group(bias, lr=0.2)
    with pytest.raises(ValueError, match="params has no State"):
        optimizer.add_param_group({})


def test_a_weight_that_cannot_be_sent_does_not_cost_the_run(client: kedge.Client) -> None:
    with kb.AdaBelief(client=client).register_trainable_weights(states(a=[1.0])) as optimizer:
        with pytest.raises(kedge.KedgeError, match="'count'"):
            optimizer.add_param_group({"count": brainstate.ParamState(np.arange(2))})
        optimizer.update(ONES)
        assert optimizer.run.status().step == 1


def test_a_given_run_has_its_groups_already(client: kedge.Client) -> None:
    params = {"a": np.ones(1, np.float32), "b": np.ones(1, np.float32)}
    bias_group = optim.Group("b", lr=0.25, name="biases")
    run = create(client, params, optim.Lookahead(optim.SGD(lr=0.5), alpha=1.0), groups=[bias_group])
    optimizer = kb.Lookahead(optim.SGD(lr=0.5), alpha=1.0, run=run)
    weights, bias = states(a=[0.0]), states(b=[0.0])
    with optimizer.register_trainable_weights(weights):
        with pytest.raises(ValueError, match=r"lr is 0\.125, and the group 'biases' of runs/given has 0\.25"):
            optimizer.add_param_group(bias, lr=0.125)
        optimizer.register_trainable_weights(bias)
        worker = optimizer.state_dict()["worker"]
        optimizer.add_param_group(bias, lr=0.25)
        assert optimizer.state_dict()["worker"] == worker
        assert optimizer.param_groups[1]["name"] == "biases"
        optimizer.update(ONES)
        optimizer.param_groups[1]["lr"] = 0.5
        optimizer.update(ONES)
    assert (weights["a"].value.tolist(), bias["b"].value.tolist()) == ([0.0], [0.25])


def test_a_group_that_a_given_run_does_not_have_is_refused(client: kedge.Client) -> None:
    run = create(client, {"a": np.ones(1, np.float32), "b": np.ones(1, np.float32)}, optim.AdaBelief())
    optimizer = kb.AdaBelief(run=run)
    with pytest.raises(ValueError, match=r"runs/given has no parameter group of exactly 'b': create it with groups="):
        optimizer.add_param_group(states(b=[1.0]), lr=0.1)
