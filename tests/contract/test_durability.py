"""Runs of a server without a data directory: they are kept in memory, and it says so."""

import pytest

import kedge
from kedge import optim
from kedge.errors import ConflictError, KedgeError

SGD = optim.SGD(lr=1.0)
ALONE = kedge.Synchronous(quorum=1)


def refusal(call, *arguments, **options):
    with pytest.raises(KedgeError) as error:
        call(*arguments, **options)
    return error.value


@pytest.mark.parametrize("asked", [None, "memory"])
def test_run_is_kept_in_memory(client, new_run, run_name, asked):
    run = new_run(SGD, ALONE, durability=asked)

    assert run.durability == client.get_run(run_name).durability == "memory"
    info = run.info()
    assert (info.durability, info.checkpoints) == ("memory", kedge.Checkpoints())
    assert (info.status.durable_step, info.status.storage_problem) == (0, "")


@pytest.mark.parametrize("durability", ["checkpoint", "journal", "journal-sync"])
def test_run_that_is_to_be_kept_on_disk_is_refused(client, new_run, run_name, durability):
    error = refusal(new_run, SGD, ALONE, durability=durability)

    assert (error.reason, error.metadata) == ("DURABILITY_UNAVAILABLE", {"durability": durability})
    assert isinstance(error, ConflictError)
    assert refusal(client.get_run, run_name).reason == "RUN_NOT_FOUND"


def test_checkpoints_are_kept_as_they_were_given(new_run):
    checkpoints = kedge.Checkpoints(every_steps=10, every_seconds=1.5, keep_latest=4, keep_best=2, metric="accuracy")
    assert new_run(SGD, ALONE, checkpoints=checkpoints).info().checkpoints == checkpoints


def test_result_says_that_it_is_kept_in_memory(new_run):
    with new_run(SGD, ALONE).join() as worker:
        weights = worker.pull()
        result = worker.push(weights)
        worker.step(weights)
    assert (result.outcome, result.durability, result.durable_step) == ("applied", "memory", 0)
    assert worker.last_result[-2:] == ("memory", 0)


def test_run_in_memory_has_no_checkpoints(new_run, run_name):
    run = new_run(SGD, ALONE)

    assert run.checkpoints() == []
    for call in (
        run.checkpoint,
        lambda: run.checkpoint({"accuracy": 0.5}),
        lambda: run.restore("0-1"),
        lambda: run.fork(f"{run.name}/checkpoints/0-1", f"{run_name}-fork"),
    ):
        error = refusal(call)
        assert (error.reason, error.metadata) == ("DURABILITY_UNAVAILABLE", {"durability": "memory"})


def test_checkpoints_of_an_unknown_run_are_refused(client, new_run):
    run = new_run(SGD, ALONE)
    client.delete_run(run.name)

    for call in (run.checkpoint, run.checkpoints, lambda: run.restore("0-1"), lambda: run.fork("0-1", "other")):
        assert refusal(call).reason == "RUN_NOT_FOUND"


def test_watch_goes_on_within_one_generation_and_begins_anew_in_another(client, new_run, take):
    run = new_run(SGD, ALONE)
    transport = client._transport
    with run.join("a"), run.watch(from_step=0) as watch:
        (joined,) = take(watch, 1)
    generation = transport.watch(run.name, kedge.transport.WatchStart()).server_generation
    assert generation >= 1

    def first_after(number, server_generation):
        start = kedge.transport.WatchStart(after_number=number, server_generation=server_generation)
        watched = transport.watch(run.name, start)
        (event,) = take(watched, 1)
        watched.close()
        return event.number

    assert first_after(joined.number, generation) == joined.number + 1
    assert first_after(joined.number, 0) == joined.number + 1
    assert first_after(joined.number, generation + 1) == 1
