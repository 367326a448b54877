"""What had happened when a server was killed, said a second time: facts that are kept for ever, and what follows.

Each stands beside one commit. Where the server folds commits into an image, a model begins anew here and looks at every
fact that was written, each time.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from kedge.policies import Admission, Policy, Synchronous

from .model import Ended, Entry, Fact, Joined, Judged, Member, Model, ModelRound, Rejected

NORM_WINDOW = 16
UNFIT = {"NON_FINITE_GRADIENT", "GRADIENT_TOO_LARGE", "NORM_ABOVE_LIMIT", "NORM_OUTLIER"}


class Held(NamedTuple):
    """A worker is told that its contribution is held."""

    judged: Judged


class Stepped(NamedTuple):
    """A round became a step."""

    round: ModelRound
    judged: tuple[Judged, ...]


class Changed(NamedTuple):
    """The operator changed something. What is None stayed."""

    policy: Policy | None = None
    admission: Admission | None = None
    request_id: str = ""


class Restored(NamedTuple):
    """The run went back to what the first so many facts had made of it."""

    fact_count: int
    request_id: str


AnyFact = Fact | Held | Stepped | Changed | Restored


def survivor(blank: Model, written: Sequence[AnyFact], now: float) -> Model:
    """What a server that is started anew must know: live leases are renewed, and the open round opens now.

    Args:
        blank: the model of a run in which nothing has happened.
        written: all that was durable.
        now: the time.
    """
    model = _after(blank, written)
    for member in model.live.values():
        member.joined_at, member.expires_at = now, now + member.duration_seconds
    model.formed_at = None if model.formed_at is None else now
    model.opened_at = now
    model.pending_count = len(model.held)
    return model


def _after(model: Model, written: Sequence[AnyFact]) -> Model:
    begins_at = 0
    for number, fact in enumerate(written):
        match fact:
            case Joined():
                _join(model, fact)
            case Ended():
                _end(model, fact)
            case Rejected():
                _settle(model, [fact.judged.entry], fact.reason)
                model.rejected_counts[fact.reason] += 1
                _note_unfit(model, fact)
            case Held():
                model.fates[fact.judged.entry.key] = "held"
                model.held.append(fact.judged.entry)
            case Stepped():
                model.rounds.append(fact.round)
                model.closed_step += 1
                _open_round(model)
                model.applied_count += len(fact.judged)
                _settle(model, [judged.entry for judged in fact.judged], f"step {model.closed_step}")
            case Changed():
                _change(model, fact)
            case Restored():
                model.go_back_to(_after(model.blank(), written[: fact.fact_count]))
                _open_round(model)
                begins_at = number
        _move_clocks(model, _judged_of(fact))
        _look_whether_formed(model)
    _remember(model, written, begins_at)
    return model


def _join(model: Model, fact: Joined) -> None:
    model.live.pop(fact.name, None)
    model.live[fact.name] = Member(fact.name, fact.epoch, fact.duration_seconds, 0.0, 0.0, fact.clock)
    model.last_epochs[fact.name] = fact.epoch
    model.last_sequences[fact.name, fact.epoch] = 0
    model.bad_counts[fact.name] = fact.bad_count


def _end(model: Model, fact: Ended) -> None:
    del model.live[fact.name]
    if fact.is_evicted:
        model.evicted.add((fact.name, fact.epoch))
    if fact.blocked_until is not None:
        model.blocked_until[fact.name] = fact.blocked_until


def _change(model: Model, fact: Changed) -> None:
    model.admission = fact.admission or model.admission
    if fact.policy is not None and fact.policy != model.policy:
        model.policy, model.formed_at = fact.policy, None
        _open_round(model)
        for member in model.live.values():
            member.clock = 0


def _open_round(model: Model) -> None:
    model.unfit, model.late_unfit = set(), set()


def _note_unfit(model: Model, fact: Rejected) -> None:
    if fact.reason == "COHORT_TOO_SMALL":
        _open_round(model)
    if fact.reason in UNFIT:
        name = fact.judged.entry.header.worker_id
        model.unfit.add(name)
        if model.held:
            model.late_unfit.add(name)


def _settle(model: Model, entries: list[Entry], fate: str) -> None:
    keys = {entry.key for entry in entries}
    model.fates.update(dict.fromkeys(keys, fate))
    model.held = [entry for entry in model.held if entry.key not in keys]


def _judged_of(fact: AnyFact) -> tuple[Judged, ...]:
    if isinstance(fact, Stepped):
        return fact.judged
    return (fact.judged,) if isinstance(fact, Rejected | Held) else ()


def _move_clocks(model: Model, judged: Iterable[Judged]) -> None:
    for each in judged:
        member = model.live.get(each.entry.header.worker_id)
        if member is not None and member.epoch == each.entry.header.epoch:
            member.clock = max(member.clock, each.clock)


def _look_whether_formed(model: Model) -> None:
    if isinstance(model.policy, Synchronous) and len(model.live) >= model.policy.quorum:
        model.formed_at = 0.0
    if not model.live:
        model.formed_at = None


def _remember(model: Model, written: Sequence[AnyFact], begins_at: int) -> None:
    """What is known of each worker's contributions, as they came."""
    model.judged = known = {each.entry.key: each for fact in written for each in _judged_of(fact)}
    model.judged_count = max((each.number for each in known.values()), default=0)
    recent = {each.entry.key for fact in written[begins_at:] for each in _judged_of(fact)}
    for judged in sorted(known.values(), key=lambda each: each.number):
        name, epoch, sequence = judged.entry.key
        last = model.last_sequences[name, epoch]
        model.last_sequences[name, epoch] = max(last, sequence)
        if model.last_epochs[name] == epoch:
            model.bad_counts[name] = judged.bad_count
        member = model.live.get(name)
        if member is None or member.epoch != epoch or judged.entry.key not in recent:
            continue
        if judged.norm:
            member.norms = [*member.norms, judged.norm][-NORM_WINDOW:]
            member.is_outlier = judged.is_outlier
