"""Kedge for brainstate: optimizers with the interface of `braintools.optim`, whose arithmetic is a server's.

A training loop changes in one line, that of the optimizer.

Example:
    >>> import brainstate
    >>> import kedge
    >>> from kedge.adapters import brainstate as kb
    >>> model = brainstate.nn.Linear(10, 5)
    >>> optimizer = kb.AdaBelief(lr=1e-3, client=kedge.connect("localhost:50051"))
    >>> optimizer.register_trainable_weights(model.states(brainstate.ParamState))
    >>> for batch in batches:
    ...     grads = brainstate.transform.grad(loss_of(batch), model.states(brainstate.ParamState))()
    ...     optimizer.update(grads)

The schedules of `kedge.optim` are here too, under their names, as schedulers that tick by their `step()`: `kb.StepLR`,
`kb.ExponentialLR` and so on. braintools' own schedulers are taken as well; braintools itself is not needed.
"""

try:
    import brainstate  # noqa: F401  what needs it is imported below
except ImportError as error:
    raise ImportError("kedge.adapters.brainstate needs brainstate: pip install kedge[brainstate]") from error

from typing import Any

from kedge import optim
from kedge.adapters._brainstate_optimizer import RemoteOptimizer
from kedge.adapters._brainstate_rates import Scheduler, by_hand, rate_to_create_with
from kedge.adapters._brainstate_tensors import Tensors
from kedge.client import Client
from kedge.run import Run

__all__ = ["AdaBelief", "Lookahead", "RemoteOptimizer", "Scheduler", "params"]


class AdaBelief(RemoteOptimizer):
    """AdaBelief as `kedge.optim.AdaBelief` has it, for brainstate.

    Args:
        lr: a number; a schedule of `kedge.optim`, which the server ticks; or a scheduler of this module or of
            braintools, which is ticked by its `step()`.
        betas: the decay rates of the first and second moment, each in [0, 1).
        eps: added to the denominator and to the second moment, > 0.
        weight_decay: coupled L2 decay, >= 0.
        grad_clip_norm: the gradient's global norm is clipped to it.
        grad_clip_value: the gradient's elements are clipped to [-value, value].
        max_direction: the direction's elements are clipped to [-value, value]; what signs as gradients need.
        run: a run of kedge that exists, or the name of one that is opened, or created where there is none. Without it a
            name is made. A run that is created takes a step with each contribution (`kedge.Synchronous(quorum=1)`).
        client: what `kedge.connect` returns. Not needed if `run` is a run.

    Raises:
        TypeError, ValueError: for an argument out of range, and for neither a run nor a client; the message names it.

    Source: arXiv:2010.07468, algorithm 2.
    """

    def __init__(
        self,
        lr: Any = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-16,
        weight_decay: float = 0.0,
        grad_clip_norm: float | None = None,
        grad_clip_value: float | None = None,
        *,
        max_direction: float | None = None,
        run: Run | str | None = None,
        client: Client | None = None,
    ) -> None:
        clips = (grad_clip_norm, grad_clip_value)
        rate = rate_to_create_with(lr)
        optimizer = optim.AdaBelief(rate, betas, eps, weight_decay, *clips, max_direction=max_direction)
        super().__init__(optimizer, lr, run=run, client=client)
        self.betas = optimizer.betas
        self.eps = eps
        self.weight_decay = weight_decay
        self.grad_clip_norm = grad_clip_norm
        self.grad_clip_value = grad_clip_value
        self.max_direction = max_direction


class Lookahead(RemoteOptimizer):
    """Lookahead around a base optimizer, as `kedge.optim.Lookahead` has it, for brainstate.

    The registered weights are the fast ones; `pull("slow")` puts the slow ones into the model, to evaluate it.

    Args:
        base_optimizer: an optax transformation that `kedge.adapters.optax.from_optax` can read, as
            `optax.sgd(learning_rate=0.1, momentum=0.9)`, or an optimizer of `kedge.optim`.
        sync_period: k, the fast steps from one lookahead sync to the next, >= 1.
        alpha: the slow step size, in [0, 1].
        lr: the rate of the base optimizer, as for `AdaBelief`; None keeps the one that the base optimizer has.
            (braintools: 0.001, which it then ignores, whatever is given.)
        weight_decay: coupled L2 decay, >= 0.
        grad_clip_norm: the gradient's global norm is clipped to it.
        grad_clip_value: the gradient's elements are clipped to [-value, value].
        run: as for `AdaBelief`.
        client: as for `AdaBelief`.

    Raises:
        TypeError, ValueError: for an argument out of range, for a base optimizer that cannot be read, and for neither a
            run nor a client; the message names it.

    Source: arXiv:1907.08610, algorithm 1.
    """

    def __init__(
        self,
        base_optimizer: Any,
        sync_period: int = 5,
        alpha: float = 0.5,
        lr: Any = None,
        weight_decay: float = 0.0,
        grad_clip_norm: float | None = None,
        grad_clip_value: float | None = None,
        *,
        run: Run | str | None = None,
        client: Client | None = None,
    ) -> None:
        optimizer = optim.Lookahead(
            _rule_of(base_optimizer),
            sync_period,
            alpha,
            rate_to_create_with(lr),
            weight_decay,
            grad_clip_norm,
            grad_clip_value,
        )
        super().__init__(optimizer, lr, run=run, client=client)
        self.base_optimizer = base_optimizer
        self.sync_period = sync_period
        self.alpha = alpha
        self.weight_decay = weight_decay
        self.grad_clip_norm = grad_clip_norm
        self.grad_clip_value = grad_clip_value


def params(states: Any) -> dict[str, Any]:
    """The values of States by tensor name: what to create a run for them with.

    Args:
        states: a tree of States, as `model.states(brainstate.ParamState)` gives it.

    Raises:
        TypeError: for a leaf that is no State.

    Example:
        >>> run = client.get_or_create_run(
        ...     "net",
        ...     params=kb.params(model.states(brainstate.ParamState)),
        ...     optimizer=optim.AdaBelief(),
        ...     aggregation=kedge.Synchronous(quorum=4),
        ... )
        >>> optimizer = kb.AdaBelief(run=run)
    """
    return Tensors().merged(states).arrays()


def _rule_of(base_optimizer: Any) -> Any:
    if isinstance(base_optimizer, optim.Rule) or not hasattr(base_optimizer, "update"):
        return base_optimizer
    from kedge.adapters.optax import from_optax

    return from_optax(base_optimizer)


def __getattr__(name: str) -> Any:
    kind = getattr(optim, name, None)
    if isinstance(kind, type) and issubclass(kind, optim.Schedule) and kind is not optim.Schedule:
        return by_hand(kind)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
