"""How a run goes about it, as plain values: how contributions become steps, which are taken, what is kept of them."""

import math
from dataclasses import KW_ONLY, dataclass
from typing import Literal, get_args

__all__ = [
    "OUTLIER_WARM_UP",
    "OUTLIER_WINDOW",
    "Admission",
    "Asynchronous",
    "BoundedStaleness",
    "Buffered",
    "Checkpoints",
    "Combine",
    "Durability",
    "Policy",
    "Scaling",
    "Synchronous",
    "fewest_contributions",
]

Combine = Literal["mean", "trimmed_mean", "median"]
"""How a round's contributions become one gradient, element by element."""

Scaling = Literal["none", "inverse"]
"""How staleness scales a contribution: not at all, or by 1 / (1 + staleness)."""

Durability = Literal["memory", "checkpoint", "journal", "journal-sync"]
"""What an acknowledged push survives: nothing but the server's process; that as of the last checkpoint; the end of the
process at any moment, and loss of power but for the last second; loss of power."""

OUTLIER_WINDOW = 16
"""A worker's vote on what is an outlier is the median of so many norms: those of what it sent last."""

OUTLIER_WARM_UP = 8
"""Before so many norms are known nothing is called an outlier."""

_MIN_SECONDS, _MAX_SECONDS = 1e-9, 315_576_000_000.0  # what a message can say


def fewest_contributions(combine: Combine, trim_count: int) -> int:
    """How many contributions a round needs, so that this combination of them is more than a mean."""
    return {"mean": 1, "trimmed_mean": 2 * trim_count + 1, "median": 3}[combine]


@dataclass(frozen=True)
class Synchronous:
    """A step is made of the first `quorum` contributions of its round, at most one a worker.

    Once `quorum` workers have been alive at one time, a round also ends when every live worker that was there at its
    first contribution has contributed, or sent what was rejected for its values: a lost worker delays it by its lease
    at most, a broken one or one that joins later by nothing. What comes too late is rejected as STALE_GRADIENT.

    Attributes:
        quorum: the contributions that close a round, >= 1. More workers than that are backup workers.
        timeout_seconds: a round that has a contribution ends after this time with those that it has; None: it waits.
        combine: "mean" weighted by `example_count`; or, whatever the example counts, "trimmed_mean" or "median" of each
            element, which bear bad contributions. A round with too few for that waits for more workers to join; at its
            time limit, or where the policy is changed, it is refused: its contributions are rejected as
            COHORT_TOO_SMALL.
        trim_count: with "trimmed_mean", how many of the least and of the greatest values are left out, >= 1. It bears
            as many bad contributions, and needs 2 * trim_count + 1. A median needs 3, and bears fewer than half.
        deterministic: the sum is in the order of the workers' names, so that its bits do not depend on who came first;
            False: in the order of arrival. Give the workers names of your own, `run.join("w0")`: the default ones are
            random, and so is their order.
    """

    quorum: int
    _: KW_ONLY
    timeout_seconds: float | None = None
    combine: Combine = "mean"
    trim_count: int = 1
    deterministic: bool = True

    def __post_init__(self) -> None:
        """Checks every field."""
        _check_count("quorum", self.quorum)
        if self.timeout_seconds is not None:
            _check_seconds("timeout_seconds", self.timeout_seconds, or_none="None, or ")
        _check_combine(self.combine, self.trim_count, what="quorum", count=self.quorum)
        _check_flag("deterministic", self.deterministic)


@dataclass(frozen=True)
class Asynchronous:
    """A step is one contribution.

    Attributes:
        max_staleness: a staler contribution is rejected as STALE_GRADIENT; None: no bound.
        scaling: "none", or "inverse": a contribution counts 1 / (1 + staleness).
    """

    max_staleness: int | None = None
    scaling: Scaling = "none"

    def __post_init__(self) -> None:
        """Checks every field."""
        _check_staleness(self.max_staleness)
        _check_scaling(self.scaling)


@dataclass(frozen=True)
class BoundedStaleness:
    """A step is one contribution, and no worker gets far ahead of another (stale synchronous parallel, SSP).

    A worker's clock counts its contributions. A worker whose clock is more than `bound` ahead of the slowest live
    worker's waits at its next pull of fast weights; a contribution without that pull is rejected as AHEAD_OF_BOUND.
    With bound 0 the workers go in lockstep: all pull the same weights, and the next ones when all have contributed.
    A worker counts from its join on: one that joins again and again and never contributes holds the others up, until
    its name is blocked (`Run.evict` with `block_seconds`).

    Source: Ho et al., "More Effective Distributed ML via a Stale Synchronous Parallel Parameter Server", 2013.

    Attributes:
        bound: the greatest difference of two clocks at a pull, >= 0.
    """

    bound: int

    def __post_init__(self) -> None:
        """Checks every field."""
        if isinstance(self.bound, bool) or not isinstance(self.bound, int):
            raise TypeError(f"bound is {self.bound!r}: it must be a whole number of contributions")
        if not 0 <= self.bound < 1 << 32:
            raise ValueError(f"bound is {self.bound!r}: it must be 0 to 2**32 - 1")


@dataclass(frozen=True)
class Buffered:
    """A step is made of `size` contributions, whoever sent them; nobody waits for it.

    A worker that pushes goes on at once with the weights that there are; its contribution is "deferred" until the
    buffer is full.

    Source: Nguyen et al., "Federated Learning with Buffered Asynchronous Aggregation" (FedBuff), arXiv:2106.06639.

    Attributes:
        size: the contributions that make a step, >= 1.
        max_staleness: a staler contribution is rejected as STALE_GRADIENT; None: no bound.
        scaling: "inverse": a contribution counts 1 / (1 + staleness); or "none".
        combine: as for `Synchronous`; "trimmed_mean" and "median" are of the scaled contributions. They bear bad
            contributions, not bad workers: a single one that is fast may fill the buffer.
        trim_count: as for `Synchronous`.
        deterministic: as for `Synchronous`; those of one worker are in the order of their sequences.
    """

    size: int
    _: KW_ONLY
    max_staleness: int | None = None
    scaling: Scaling = "inverse"
    combine: Combine = "mean"
    trim_count: int = 1
    deterministic: bool = True

    def __post_init__(self) -> None:
        """Checks every field."""
        _check_count("size", self.size)
        _check_staleness(self.max_staleness)
        _check_scaling(self.scaling)
        _check_combine(self.combine, self.trim_count, what="size", count=self.size)
        _check_flag("deterministic", self.deterministic)


Policy = Synchronous | Asynchronous | BoundedStaleness | Buffered


@dataclass(frozen=True, kw_only=True)
class Admission:
    """Which gradients a run takes. Whatever is set here, one with a NaN or an infinity is never taken.

    A rejected contribution changes no weight, no moment and no counter but that of the rejected ones.

    Attributes:
        max_norm: a gradient whose Euclidean norm is greater is rejected as NORM_ABOVE_LIMIT; None: no limit.
        outlier_factor: one whose norm is more than so many times the usual one is rejected as NORM_OUTLIER; > 1; None:
            none is. Usual is the median of the live workers' votes, each the median of the last 16 norms that it sent,
            taken or not; zeros do not count. It needs 8 norms to judge by: a run's first gradients are held to
            `max_norm` alone.
        quarantine_after: a worker of which so many gradients in a row were rejected for their values is evicted; >= 1;
            None: none is. Joining again under its name does not begin a new count. An outlier does not count while what
            most of the live workers sent last was one: then it is the run that has changed.
        quarantine_seconds: for how long nobody may join under the name of a worker that was evicted so.
    """

    max_norm: float | None = None
    outlier_factor: float | None = None
    quarantine_after: int | None = None
    quarantine_seconds: float = 600.0

    def __post_init__(self) -> None:
        """Checks every field."""
        if self.max_norm is not None and not (0 < self.max_norm < math.inf):
            raise ValueError(f"max_norm is {self.max_norm!r}: it must be None, or a finite number above 0")
        if self.outlier_factor is not None and not (1 < self.outlier_factor < math.inf):
            raise ValueError(f"outlier_factor is {self.outlier_factor!r}: it must be None, or a finite number above 1")
        if self.quarantine_after is not None:
            _check_count("quarantine_after", self.quarantine_after)
        _check_seconds("quarantine_seconds", self.quarantine_seconds)


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """When checkpoints of a run are taken, and which are kept. The newest two always are.

    Attributes:
        every_steps: one is taken after so many steps, >= 1; None: when the journal has grown by a few times the state's
            size, and without a journal every 10 minutes.
        every_seconds: one is taken after so long, if there was a step; None: time alone makes none.
        keep_latest: so many of the newest are kept, >= 2.
        keep_every_steps: the first one at or after each multiple of so many steps is kept, too, >= 1; None: none is.
        max_age_seconds: none but the newest are kept for longer; None: age alone deletes none.
        keep_best: so many of the best by `metric` are kept, too, >= 0.
        metric: "loss", the mean loss of the checkpoint's step, or the name of a metric given to `Run.checkpoint`.
        is_greater_better: whether greater values of the metric are better.
    """

    every_steps: int | None = None
    every_seconds: float | None = None
    keep_latest: int = 2
    keep_every_steps: int | None = None
    max_age_seconds: float | None = None
    keep_best: int = 0
    metric: str = "loss"
    is_greater_better: bool = False

    def __post_init__(self) -> None:
        """Checks every field."""
        for name in ("every_steps", "keep_every_steps"):
            if getattr(self, name) is not None:
                _check_count(name, getattr(self, name))
        for name in ("every_seconds", "max_age_seconds"):
            if getattr(self, name) is not None:
                _check_seconds(name, getattr(self, name), or_none="None, or ")
        _check_count("keep_latest", self.keep_latest)
        if self.keep_latest < 2:
            raise ValueError(f"keep_latest is {self.keep_latest}: it must be 2 at least, so that one may be damaged")
        if isinstance(self.keep_best, bool) or not isinstance(self.keep_best, int) or not 0 <= self.keep_best < 1 << 32:
            raise ValueError(f"keep_best is {self.keep_best!r}: it must be a whole number, 0 at least")
        if not isinstance(self.metric, str) or not 1 <= len(self.metric) <= METRIC_NAME_LENGTH:
            raise ValueError(f"metric is {self.metric!r}: give a name of 1 to {METRIC_NAME_LENGTH} characters")
        _check_flag("is_greater_better", self.is_greater_better)


METRIC_NAME_LENGTH = 64
"""Characters of the name of a metric."""


def _check_seconds(name: str, value: float, *, or_none: str = "") -> None:
    if not 0 < value <= _MAX_SECONDS:
        raise ValueError(f"{name} is {value!r}: it must be {or_none}above 0 and at most 10,000 years")
    if value < _MIN_SECONDS:
        raise ValueError(f"{name} is {value!r}: that is less than a nanosecond, the shortest time that counts")


def _check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {value!r}: it must be a whole number")
    if not 1 <= value < 1 << 32:
        raise ValueError(f"{name} is {value!r}: it must be 1 to 2**32 - 1")


def _check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}: it must be True or False")


def _check_staleness(value: object) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 63:
        raise ValueError(f"max_staleness is {value!r}: it must be None or a whole number of steps >= 0")


def _check_scaling(value: object) -> None:
    if value not in get_args(Scaling):
        raise ValueError(f"scaling is {value!r}: it must be 'none' or 'inverse'")


def _check_combine(combine: Combine, trim_count: int, *, what: str, count: int) -> None:
    if combine not in get_args(Combine):
        raise ValueError(f"combine is {combine!r}: it must be 'mean', 'trimmed_mean' or 'median'")
    _check_count("trim_count", trim_count)
    if combine != "trimmed_mean" and trim_count != 1:
        raise ValueError(f"trim_count is {trim_count!r}: only combine='trimmed_mean' leaves values out")
    fewest = fewest_contributions(combine, trim_count)
    if count < fewest:
        raise ValueError(f"{what} is {count!r}: combine={combine!r} needs at least {fewest} contributions in a round")
