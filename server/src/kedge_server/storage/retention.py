"""Which checkpoints of a run are kept, and when the next one is due. Pure: the clock comes in as an argument."""

import math
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

from kedge.policies import Checkpoints, Durability
from kedge_server.core.stored import CheckpointInfo

CHECKPOINT_LEVEL_SECONDS = 600.0
"""How often a run without a journal is checkpointed where its rules name no time and no steps."""

STATE_MULTIPLE = 8
"""A journal is worth a checkpoint once it is so many times as large as the state: to write that costs as much."""


class Since(NamedTuple):
    """What happened since a run's last checkpoint, or since its creation."""

    steps: int
    seconds: float
    journal_bytes: int


def is_due(
    since: Since, rules: Checkpoints, *, durability: Durability, state_bytes: int, journal_limit_bytes: int
) -> bool:
    """Whether a run is to be checkpointed now.

    A long journal makes one due whatever the rules are: recovery replays all of it, and the disk holds all of it.

    Args:
        since: what happened since the last one.
        rules: the run's.
        durability: the run's. Without a journal and without a rule, one is due every `CHECKPOINT_LEVEL_SECONDS`.
        state_bytes: the size of a checkpoint.
        journal_limit_bytes: the server's limit of the journal since the last checkpoint. It counts as at least
            `STATE_MULTIPLE` times the state.
    """
    if durability == "memory":
        return False
    if durability != "checkpoint" and since.journal_bytes >= max(journal_limit_bytes, STATE_MULTIPLE * state_bytes):
        return True
    return since.steps > 0 and (
        since.seconds >= _every_seconds(rules, durability) or since.steps >= (rules.every_steps or math.inf)
    )


def _every_seconds(rules: Checkpoints, durability: Durability) -> float:
    if rules.every_seconds is not None:
        return rules.every_seconds
    is_ruled = durability != "checkpoint" or rules.every_steps is not None
    return math.inf if is_ruled else CHECKPOINT_LEVEL_SECONDS


def to_delete(
    infos: Sequence[CheckpointInfo], rules: Checkpoints, *, now_seconds: float, keep: Collection[str] = ()
) -> list[str]:
    """The ids of the checkpoints that no rule keeps, oldest first.

    The newest `keep_latest` stay whatever else holds, and so do those in `keep`. Age lets go of the others, those at
    multiples of steps and the best ones too. Which are newest goes by `next_index`, which grows where a step goes back.

    Args:
        infos: all intact checkpoints of one run, in any order.
        rules: the run's.
        now_seconds: the time, in seconds since 1970.
        keep: ids that must stay, such as that of one that is being read.
    """
    by_age = sorted(infos, key=lambda info: info.next_index)
    newest = _ids(by_age[-rules.keep_latest :])
    is_young = [info for info in by_age if now_seconds - info.created_at_seconds <= (rules.max_age_seconds or math.inf)]
    kept = newest | set(keep) | ((_at_multiples(by_age, rules) | _best(by_age, rules)) & _ids(is_young))
    return [info.checkpoint_id for info in by_age if info.checkpoint_id not in kept]


def _ids(infos: Iterable[CheckpointInfo]) -> set[str]:
    return {info.checkpoint_id for info in infos}


def _at_multiples(infos: Sequence[CheckpointInfo], rules: Checkpoints) -> set[str]:
    """The first one at or after each multiple of `keep_every_steps`, 0 not among them."""
    every = rules.keep_every_steps
    if every is None:
        return set()
    first: dict[int, str] = {}
    for info in sorted(infos, key=lambda info: (info.step, info.next_index)):
        first.setdefault(info.step // every, info.checkpoint_id)
    return {checkpoint_id for multiple, checkpoint_id in first.items() if multiple}


def _best(infos: Sequence[CheckpointInfo], rules: Checkpoints) -> set[str]:
    """The `keep_best` best by the metric; the newer one where two are equal, and none whose metric is no number."""
    sign = -1 if rules.is_greater_better else 1
    rated = [info for info in infos if not math.isnan(info.metrics.get(rules.metric, math.nan))]
    rated.sort(key=lambda info: (sign * info.metrics[rules.metric], -info.next_index))
    return _ids(rated[: rules.keep_best])
