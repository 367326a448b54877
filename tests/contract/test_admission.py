"""Which gradients are taken: norms, outliers, quarantine."""

import numpy as np
import pytest

import kedge
from kedge import optim
from kedge.errors import LeaseError

SGD = optim.SGD(lr=1.0)
EACH = kedge.Asynchronous()


@pytest.fixture
def begin(new_run, numbered_worker):
    """A run of two parameters with an admission, and a function that pushes gradients of its worker "a"."""

    def create(optimizer=SGD, aggregation=EACH, **admission):
        params = {"w": np.zeros(2, np.float32)}
        run = new_run(optimizer, aggregation, params, admission=kedge.Admission(**admission))
        worker, sequences = numbered_worker(run, "a"), iter(range(1, 1000))
        return run, lambda *values, **changes: worker.push(next(sequences), *values, **changes)

    return create


def reasons(push, *gradients):
    return [push(*gradient).reason for gradient in gradients]


def test_norm_above_the_limit_is_rejected_and_at_it_taken(begin):
    run, push = begin(max_norm=5.0)
    assert push(3, 4)[:2] == ("applied", "EACH_CONTRIBUTION")
    result = push(3, 4.01)

    assert result[:4] == ("rejected", "NORM_ABOVE_LIMIT", 1, 1)
    assert result.message
    assert run.status().rejected_counts == {"NORM_ABOVE_LIMIT": 1}
    assert run.pull()["w"].tolist() == [-3, -4]


def test_rejected_gradient_leaves_no_trace_in_the_moments(begin):
    run, push = begin(optim.SGD(lr=1.0, momentum=0.5), max_norm=5.0)
    push(1, 0)
    push(100, 0)
    push(1, 0)

    assert run.pull()["w"].tolist() == [-1 - (0.5 * 1 + 1), 0]


def test_outlier_is_rejected_once_eight_norms_are_known(begin):
    run, push = begin(outlier_factor=3.0)
    assert reasons(push, *[(1, 0)] * 7, (100, 0)) == ["EACH_CONTRIBUTION"] * 8
    result = push(3.01, 0)

    assert result[:4] == ("rejected", "NORM_OUTLIER", 8, 8)
    assert result.message
    assert push(0, 3).outcome == "applied"
    assert run.pull()["w"].tolist() == [-107, -3]


def test_median_of_an_even_number_of_norms_is_the_mean_of_the_two_in_the_middle(begin):
    _, push = begin(outlier_factor=2.0)
    reasons(push, *[(1, 0)] * 4, *[(2, 0)] * 4)

    assert reasons(push, (3.01, 0), (3, 0)) == ["NORM_OUTLIER", "EACH_CONTRIBUTION"]


def test_values_are_judged_before_anything_else_and_in_order(begin):
    run, push = begin(aggregation=kedge.Asynchronous(max_staleness=10), max_norm=1000.0, outlier_factor=3.0)
    reasons(push, *[(1, 0)] * 11)

    assert reasons(push, (np.nan, 1e30), (1e30, 0), (1001, 0), (999, 0), (1, 0)) == [
        "NON_FINITE_GRADIENT",
        "GRADIENT_TOO_LARGE",
        "NORM_ABOVE_LIMIT",
        "NORM_OUTLIER",
        "STALE_GRADIENT",
    ]
    assert run.status().step == 11


def test_admission_comes_back_as_it_was_given(client, begin, run_name):
    given = {"max_norm": 5.0, "outlier_factor": 3.0, "quarantine_after": 4, "quarantine_seconds": 1.5}
    begin(**given)

    run = client.get_run(run_name)
    assert run.admission == run.info().admission == kedge.Admission(**given)


def test_admission_can_be_changed_on_a_live_run(begin, client, run_name):
    run, push = begin()
    push(100, 0)

    assert run.set_admission(kedge.Admission(max_norm=5.0)) == 2
    assert client.get_run(run_name).admission == run.admission == kedge.Admission(max_norm=5.0)
    assert push(6, 0).reason == "NORM_ABOVE_LIMIT"
    run.set_admission(kedge.Admission())
    assert push(6, 0).outcome == "applied"


def test_changed_admission_leaves_the_open_round_alone(begin, numbered_worker):
    run, push = begin(aggregation=kedge.Synchronous(2))
    push(10, 0)
    run.set_admission(kedge.Admission(max_norm=5.0))

    assert numbered_worker(run, "b").push(1, 2, 0)[:3] == ("applied", "QUORUM_REACHED", 1)
    assert run.pull()["w"].tolist() == [-6, 0]


def test_worker_is_evicted_with_the_last_of_too_many_bad_gradients_in_a_row(begin):
    run, push = begin(max_norm=5.0, quarantine_after=3)
    assert reasons(push, (6, 0), (np.nan, 0)) == ["NORM_ABOVE_LIMIT", "NON_FINITE_GRADIENT"]
    assert len(run.status().workers) == 1

    assert push(7, 0)[:2] == ("rejected", "NORM_ABOVE_LIMIT")
    assert run.status().workers == ()
    with pytest.raises(LeaseError) as error:
        push(1, 0)
    assert error.value.reason == "WORKER_EVICTED"
    assert error.value.metadata["worker"] == f"{run.name}/workers/a"
    assert "NORM_ABOVE_LIMIT" in error.value.metadata["cause"]
    assert "3" in error.value.metadata["cause"]


def test_good_gradient_ends_the_row(begin):
    run, push = begin(max_norm=5.0, quarantine_after=2)
    for _ in range(3):
        assert reasons(push, (6, 0), (1, 0)) == ["NORM_ABOVE_LIMIT", "EACH_CONTRIBUTION"]

    assert len(run.status().workers) == 1


def test_stale_gradient_neither_ends_the_row_nor_lengthens_it(begin):
    run, push = begin(aggregation=kedge.Asynchronous(max_staleness=0), max_norm=5.0, quarantine_after=2)
    push(1, 0)
    assert reasons(push, (1, 0), (1, 0), (1, 0), (6, 0), (1, 0)) == [
        *["STALE_GRADIENT"] * 3,
        "NORM_ABOVE_LIMIT",
        "STALE_GRADIENT",
    ]
    assert len(run.status().workers) == 1
    push(6, 0)
    assert run.status().workers == ()


@pytest.mark.parametrize("again", ["takes its lease over", "leaves and joins", "is evicted and joins"])
def test_row_goes_on_when_the_worker_joins_again(begin, numbered_worker, again):
    run, push = begin(max_norm=5.0, quarantine_after=3)
    reasons(push, (6, 0), (6, 0))
    if again == "leaves and joins":
        numbered_worker(run, "a").leave()
    elif again == "is evicted and joins":
        run.evict("a")
    worker = numbered_worker(run, "a")

    assert worker.push(1, 6, 0).reason == "NORM_ABOVE_LIMIT"
    assert run.status().workers == ()


def test_good_gradient_ends_the_row_of_a_worker_that_joined_again(begin, numbered_worker):
    run, push = begin(max_norm=5.0, quarantine_after=2)
    push(6, 0)
    worker = numbered_worker(run, "a")
    for sequence, (norm, reason) in enumerate([(1, "EACH_CONTRIBUTION"), (6, "NORM_ABOVE_LIMIT")] * 2, 1):
        assert worker.push(sequence, norm, 0).reason == reason

    assert len(run.status().workers) == 1


def test_rows_are_counted_for_each_worker(begin, numbered_worker):
    run, push = begin(max_norm=5.0, quarantine_after=2)
    push(6, 0)
    numbered_worker(run, "b").push(1, 6, 0)

    assert len(run.status().workers) == 2


def test_name_of_a_quarantined_worker_is_blocked_and_others_are_not(begin, numbered_worker):
    run, push = begin(max_norm=5.0, quarantine_after=1)
    push(6, 0)

    with pytest.raises(LeaseError) as error:
        run.join("a")
    assert error.value.reason == "WORKER_EVICTED"
    assert "NORM_ABOVE_LIMIT" in error.value.metadata["cause"]
    assert numbered_worker(run, "b").push(1, 1, 0).outcome == "applied"


def test_quarantine_ends(begin, numbered_worker, eventually):
    run, push = begin(max_norm=5.0, quarantine_after=1, quarantine_seconds=0.2)
    push(6, 0)

    def may_join():
        try:
            return numbered_worker(run, "a")
        except LeaseError:
            return None

    eventually(may_join)
    (listed,) = run.status().workers
    assert listed.rejected_count == 0


def test_quarantined_worker_lets_the_round_go_on(begin, numbered_worker):
    run, push = begin(aggregation=kedge.Synchronous(2), quarantine_after=1)
    other = numbered_worker(run, "b")
    assert other.push(1, 2, 0).outcome == "deferred"
    push(np.nan, 0)

    assert other.push(1, 2, 0)[:3] == ("applied", "ALL_LIVE_CONTRIBUTED", 1)


def test_step_of_a_poisoned_worker_goes_on_until_it_is_evicted(begin):
    run, _ = begin(quarantine_after=2)
    bad = {"w": np.full(2, np.nan, np.float32)}
    with run.join("b") as worker:
        worker.pull()
        for _ in range(2):
            assert worker.step(bad)["w"].tolist() == [0, 0]
        with pytest.raises(LeaseError) as error:
            worker.step(bad)
        assert error.value.reason == "WORKER_EVICTED"
        assert [w.name for w in run.status().workers] == [f"{run.name}/workers/a"]
