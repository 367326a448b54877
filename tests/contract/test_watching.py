"""What a watch tells, from where, and how it ends."""

from datetime import UTC

import numpy as np
import pytest

import kedge
from kedge import optim
from kedge.errors import NotFoundError
from kedge.transport import RunUpdate

SGD = optim.SGD(lr=1.0)
KEPT = 4096


def grad(*values):
    return {"w": np.array(values, np.float32)}


def name_of(event):
    return event.worker.split("/")[-1]


def kinds(events):
    return [event.kind for event in events]


def test_steps_syncs_and_rejections_are_told_in_order(new_run, numbered_worker, take):
    run = new_run(optim.Lookahead(SGD, sync_period=2), kedge.Synchronous(2))
    a, b = numbered_worker(run, "a"), numbered_worker(run, "b")
    with run.watch() as watch:
        a.push(1, 1, loss=1.0, example_count=1)
        rejected = a.push(2, 1)
        b.push(1, 1, loss=4.0, example_count=3)
        b.push(2, np.nan, base_step=1)
        a.push(3, 1, base_step=1)
        events = take(watch, 5)

    first, step, second, other_step, sync = events
    assert kinds(events) == ["rejected", "step", "rejected", "step", "lookahead_sync"]
    assert [event.number for event in events] == list(range(first.number, first.number + 5))
    assert [event.step for event in events] == [0, 1, 1, 2, 2]
    assert (first.worker, first.epoch) == a.lease[:2]
    assert (
        (first.reason, first.message) == (rejected.reason, rejected.message) == ("ALREADY_CONTRIBUTED", first.message)
    )
    assert first.message
    assert (second.worker, second.epoch, second.reason) == (*b.lease[:2], "NON_FINITE_GRADIENT")
    assert (step.reason, step.contribution_count, step.loss) == ("QUORUM_REACHED", 2, (1 * 1 + 3 * 4) / 4)
    assert (other_step.reason, other_step.contribution_count, other_step.loss) == ("ALL_LIVE_CONTRIBUTED", 1, None)
    assert sync.contribution_count == 0
    assert all(event.time.tzinfo is UTC for event in events)
    assert [event.time for event in events] == sorted(event.time for event in events)


def test_coming_and_going_is_told(new_run, numbered_worker, take):
    run = new_run(SGD, kedge.Asynchronous())
    with run.watch() as watch:
        a = numbered_worker(run, "a")
        again = numbered_worker(run, "a")
        again.leave()
        b = numbered_worker(run, "b")
        run.evict("b", "for a test")
        events = take(watch, 6)

    assert [(event.kind, event.reason) for event in events] == [
        ("joined", ""),
        ("evicted", "WORKER_SUPERSEDED"),
        ("joined", ""),
        ("left", ""),
        ("joined", ""),
        ("evicted", "WORKER_EVICTED"),
    ]
    who = [a, a, again, again, b, b]
    assert [(event.worker, event.epoch) for event in events] == [worker.lease[:2] for worker in who]
    assert events[1].message
    assert "for a test" in events[5].message


def test_lease_that_runs_out_is_told_before_the_step_that_it_ends(new_run, in_background, take):
    run = new_run(SGD, kedge.Synchronous(2))
    with run.join("a") as a, run.join("b", lease_seconds=0.5) as b, run.watch() as watch:
        b._session._stop_heartbeats()
        waiting = in_background(a.push, grad(1), base_step=0, wait_seconds=60)
        expired, step = take(watch, 2)
        assert waiting.result(30).reason == step.reason == "ALL_LIVE_CONTRIBUTED"

    assert (expired.kind, expired.reason, expired.step) == ("evicted", "LEASE_EXPIRED", 0)
    assert (expired.worker, expired.epoch) == (b.name, b.epoch)
    assert (step.kind, step.step, step.contribution_count) == ("step", 1, 1)


def test_quarantine_is_told_after_its_cause(new_run, numbered_worker, take):
    run = new_run(SGD, kedge.Asynchronous(), admission=kedge.Admission(quarantine_after=2))
    a = numbered_worker(run, "a")
    with run.watch() as watch:
        a.push(1, np.nan)
        a.push(2, np.inf)
        events = take(watch, 3)

    assert [(event.kind, event.reason) for event in events] == [
        ("rejected", "NON_FINITE_GRADIENT"),
        ("rejected", "NON_FINITE_GRADIENT"),
        ("evicted", "WORKER_EVICTED"),
    ]
    assert "NON_FINITE_GRADIENT" in events[2].message


def test_refused_round_is_a_rejection_for_each(new_run, numbered_worker, take):
    run = new_run(SGD, kedge.Synchronous(3, combine="median"))
    a, b = numbered_worker(run, "a"), numbered_worker(run, "b")
    with run.watch() as watch:
        b.push(1, 1)
        a.push(1, 1)
        run.set_aggregation(kedge.Asynchronous())
        events = take(watch, 3)

    assert kinds(events) == ["rejected", "rejected", "aggregation_changed"]
    assert {name_of(event) for event in events[:2]} == {"a", "b"}
    assert {event.reason for event in events[:2]} == {"COHORT_TOO_SMALL"}


@pytest.mark.parametrize(
    "policy",
    [
        kedge.Synchronous(1, timeout_seconds=1.5, deterministic=False),
        kedge.BoundedStaleness(3),
        kedge.Buffered(5, max_staleness=7, scaling="none", combine="trimmed_mean", trim_count=2),
    ],
)
def test_new_aggregation_is_told_and_the_step_of_what_was_held(new_run, numbered_worker, take, policy):
    run = new_run(SGD, kedge.Buffered(2))
    numbered_worker(run, "a").push(1, 1)
    with run.watch() as watch:
        run.set_aggregation(policy)
        run.set_aggregation(policy)
        run.set_aggregation(kedge.Asynchronous())
        events = take(watch, 3)

    # A step is told when it is applied, which may be after what ended its round.
    (step,) = [event for event in events if event.kind == "step"]
    assert (step.step, step.reason, step.contribution_count) == (1, "POLICY_CHANGED", 1)
    assert [event.aggregation for event in events if event.kind == "aggregation_changed"] == [
        policy,
        kedge.Asynchronous(),
    ]
    assert [event.step for event in events] == sorted(event.step for event in events)


def test_waiting_for_workers_is_told_whenever_it_changes(new_run, numbered_worker, take):
    run = new_run(SGD, kedge.Synchronous(3))
    told = []
    with run.watch() as watch:
        a = numbered_worker(run, "a")
        told.append(run.status().waiting_for)
        numbered_worker(run, "b")
        told.append(run.status().waiting_for)
        numbered_worker(run, "c")
        a.leave()
        run.set_aggregation(kedge.Synchronous(4))
        told.append(run.status().waiting_for)
        events = take(watch, 8)

    assert kinds(events) == [
        *("joined", "waiting", "joined", "waiting", "joined"),
        *("left", "aggregation_changed", "waiting"),
    ]
    assert [event.message for event in events if event.kind == "waiting"] == told
    assert "2 more workers" in told[0]
    assert "1 more worker " in told[1]
    assert "2 more workers" in told[2]


@pytest.fixture
def trained(new_run, numbered_worker):
    """A run with these events: joined, step 1, step 2, lookahead_sync, step 3."""
    run = new_run(optim.Lookahead(SGD, sync_period=2), kedge.Asynchronous())
    worker = numbered_worker(run, "a")
    for sequence in (1, 2, 3):
        worker.push(sequence, 1)
    return run, worker


@pytest.mark.parametrize(
    ("start", "expected"),
    [
        ({"from_step": 0}, [(1, "joined"), (2, "step"), (3, "step"), (4, "lookahead_sync"), (5, "step"), (6, "left")]),
        ({"from_step": 2}, [(3, "step"), (4, "lookahead_sync"), (5, "step"), (6, "left")]),
        ({"from_step": 3}, [(5, "step"), (6, "left")]),
        ({"after_number": 0}, [(1, "joined"), (2, "step"), (3, "step")]),
        ({"after_number": 3}, [(4, "lookahead_sync"), (5, "step"), (6, "left")]),
        ({"after_number": 5}, [(6, "left")]),
        ({}, [(6, "left")]),
    ],
)
def test_watch_begins_where_it_is_told_to(trained, take, start, expected):
    run, worker = trained
    with run.watch(**start) as watch:
        worker.leave()
        events = take(watch, len(expected))

    assert [(event.number, event.kind) for event in events] == expected


def test_watch_from_a_step_to_come_waits_for_it(trained, take):
    run, worker = trained
    with run.watch(from_step=5) as watch:
        worker.push(4, 1)
        worker.push(5, np.nan)
        worker.push(6, 1)
        (event,) = take(watch, 1)

    assert (event.kind, event.step, event.number) == ("step", 5, 9)


def test_every_watch_tells_the_same(trained, take):
    run, _ = trained
    with run.watch(from_step=0) as one, run.watch(from_step=0) as other:
        assert take(one, 5) == take(other, 5)


def test_deleting_the_run_ends_a_watch(trained, in_background):
    run, _ = trained
    with run.watch() as watch:
        waiting = in_background(next, watch)
        run.delete()
        with pytest.raises(NotFoundError) as error:
            waiting.result(30)
    assert error.value.reason == "RUN_NOT_FOUND"


def test_there_is_no_watching_a_run_that_is_not_there(new_run):
    run = new_run(SGD, kedge.Asynchronous())
    run.delete()
    with pytest.raises(NotFoundError) as error:
        run.watch()
    assert error.value.reason == "RUN_NOT_FOUND"


def test_closing_from_another_thread_ends_the_iteration(trained, in_background):
    run, _ = trained
    watch = run.watch()
    waiting = in_background(list, watch)
    watch.close()
    watch.close()

    assert waiting.result(30) == []


def test_events_that_are_no_longer_kept_are_summed_up(client, new_run, numbered_worker, take, in_background):
    run = new_run(SGD, kedge.Synchronous(5))
    with run.watch() as unread:
        worker = numbered_worker(run, "a")
        _make_events(client, run, KEPT + 2)
        with run.watch(after_number=0) as watch:
            summary, following = take(watch, 2)
        with run.watch(after_number=2) as watch:
            later_summary, later_following = take(watch, 2)
        with run.watch(from_step=0) as watch:
            assert take(watch, 1)[0].skipped_counts == summary.skipped_counts
        with run.watch(after_number=4) as watch:
            assert take(watch, 1) == [following] == [later_following]

        run.set_aggregation(kedge.Asynchronous())
        worker.push(1, 1)
        with run.watch(from_step=1) as watch:
            assert take(watch, 1)[0].kind == "step"
        in_background(_read_without_gaps, unread, following.number + KEPT).result(60)

    assert (summary.kind, summary.number, summary.step, following.number) == ("summary", 4, 0, 5)
    assert summary.skipped_counts == {"joined": 1, "waiting": 2, "aggregation_changed": 1}
    assert (later_summary.kind, later_summary.number) == ("summary", 4)
    assert sum(later_summary.skipped_counts.values()) == 2


def _make_events(client, run, count):
    """Changes the policy of a run that has too few workers: each time it tells of that, and of waiting."""
    for number in range(count // 2):
        client._transport.update_run(run.name, RunUpdate(kedge.Synchronous(6 + number % 2)), request_id="")


def _read_without_gaps(watch, last):
    """Each number up to the last is an event, or counted in a summary."""
    seen = 0
    while seen < last:
        event = next(watch)
        counted = sum(event.skipped_counts.values()) if event.kind == "summary" else 1
        assert event.number == seen + counted
        seen = event.number
