"""The examples that come with braintools' AdaBelief and Lookahead, as a user would type them."""

BASIC = """
>>> import brainstate as brainstate
>>> import braintools as braintools
>>> model = brainstate.nn.Linear(10, 5)
"""

REGISTER = """
>>> optimizer.register_trainable_weights(model.states(brainstate.ParamState))
"""

ADABELIEF = {
    "basic": BASIC
    + """
>>> optimizer = braintools.optim.AdaBelief(lr=0.001)
"""
    + REGISTER,
    "betas": BASIC
    + """
>>> optimizer = braintools.optim.AdaBelief(lr=0.001, betas=(0.8, 0.999))
"""
    + REGISTER,
    "step_lr": BASIC
    + """
>>> scheduler = braintools.optim.StepLR(base_lr=0.001, step_size=30, gamma=0.5)
>>> optimizer = braintools.optim.AdaBelief(lr=scheduler)
"""
    + REGISTER,
    "weight_decay": BASIC
    + """
>>> optimizer = braintools.optim.AdaBelief(lr=0.001, weight_decay=0.01)
"""
    + REGISTER,
    "clipping": BASIC
    + """
>>> optimizer = braintools.optim.AdaBelief(
...     lr=0.001,
...     grad_clip_norm=1.0
... )
"""
    + REGISTER,
    "complete": """
>>> import brainstate as brainstate
>>> import braintools as braintools
>>>
>>> model = brainstate.nn.Linear(1000, 500)
>>>
>>> scheduler = braintools.optim.StepLR(base_lr=0.001, step_size=20, gamma=0.5)
>>>
>>> optimizer = braintools.optim.AdaBelief(
...     lr=scheduler,
...     betas=(0.9, 0.999),
...     eps=1e-16,
...     weight_decay=0.0001,
...     grad_clip_norm=1.0
... )
"""
    + REGISTER,
}

LOOKAHEAD = {
    "sgd": BASIC
    + """
>>> import optax
>>> base_opt = optax.sgd(learning_rate=0.1)
>>> optimizer = braintools.optim.Lookahead(
...     base_optimizer=base_opt,
...     sync_period=5,
...     alpha=0.5
... )
"""
    + REGISTER,
    "adam": BASIC
    + """
>>> import optax
>>> base_opt = optax.adam(learning_rate=0.001)
>>> optimizer = braintools.optim.Lookahead(
...     base_optimizer=base_opt,
...     sync_period=6,
...     alpha=0.5
... )
"""
    + REGISTER,
    "sync_period": BASIC
    + """
>>> import optax
>>> base_opt = optax.sgd(learning_rate=0.1, momentum=0.9)
>>> optimizer = braintools.optim.Lookahead(
...     base_optimizer=base_opt,
...     sync_period=10,  # Synchronize every 10 steps
...     alpha=0.5
... )
"""
    + REGISTER,
    "alpha": BASIC
    + """
>>> import optax
>>> base_opt = optax.adam(learning_rate=0.001)
>>> optimizer = braintools.optim.Lookahead(
...     base_optimizer=base_opt,
...     sync_period=5,
...     alpha=0.3  # More conservative than default 0.5
... )
"""
    + REGISTER,
    "exponential_lr": BASIC
    + """
>>> import optax
>>> scheduler = braintools.optim.ExponentialLR(base_lr=0.1, gamma=0.95)
>>> base_opt = optax.sgd(learning_rate=0.1)
>>> optimizer = braintools.optim.Lookahead(
...     base_optimizer=base_opt,
...     lr=scheduler,
...     sync_period=5,
...     alpha=0.5
... )
"""
    + REGISTER,
}

TRAINING = (
    """
>>> import brainstate as brainstate
>>> import braintools as braintools
>>> import jax.numpy as jnp
>>> import optax
>>>
>>> model = brainstate.nn.Sequential(
...     brainstate.nn.Linear(784, 128),
...     brainstate.nn.ReLU(),
...     brainstate.nn.Linear(128, 10)
... )
>>>
>>> base_opt = optax.sgd(learning_rate=0.1, momentum=0.9)
>>> optimizer = braintools.optim.Lookahead(
...     base_optimizer=base_opt,
...     sync_period=5,
...     alpha=0.5
... )
"""
    + REGISTER
    + """
>>> for epoch in range(10):
...     for batch_x, batch_y in data_loader:
...         def loss_fn():
...             logits = model(batch_x)
...             return jnp.mean(
...                 braintools.metric.softmax_cross_entropy(logits, batch_y)
...             )
...
...         grads = brainstate.transform.grad(loss_fn, model.states(brainstate.ParamState))()
...         optimizer.update(grads)
"""
)
