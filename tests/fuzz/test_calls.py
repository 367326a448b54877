"""Every RPC of a server, called with what it does not expect, while somebody trains there."""

import zlib
from collections.abc import Iterator

import pytest

from kedge.v1 import run_service_pb2 as run_pb

from .calls import METHODS, Caller, Requests, Target, batches
from .decoder import VALUES
from .figures import CALLS, SEED, Figures
from .victim import LONG, Victim

_INPUTS_OF_ONE_RUN = 2_000
_TOKENS_SHARE = 10
"""With tokens the same is decoded: a tenth of the inputs, and all methods once more without a token."""

pytestmark = pytest.mark.timeout(1200)


@pytest.fixture(scope="module", params=[False, True], ids=["asks nobody", "asks for tokens"])
def victim(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    victim = Victim(tmp_path_factory.mktemp("victim"), asks=request.param)
    try:
        yield victim
    finally:
        victim.close()


def prepared(victim: Victim) -> Target:
    """The run that inputs are about, as good as new."""
    client = victim.client()
    try:
        for run in client.call("RunService", "ListRuns", run_pb.ListRunsRequest()).runs:
            if run.name != "runs/honest":
                client.call("RunService", "DeleteRun", run_pb.DeleteRunRequest(name=run.name))
        run = client.create("fuzz", VALUES[:4])
        return Target(run, client.join(run.name, "w", lease=LONG))
    finally:
        client.close()


def throw(victim: Victim, requests: Requests, method: str, count: int, figures: Figures, token: str | None) -> None:
    """Makes so many calls."""
    for batch in batches(requests, count):
        caller = Caller(victim.address, token)
        try:
            caller.send(b"".join(caller.call(METHODS[method], data, requests.random) for data in batch))
            seconds = caller.finish()
        finally:
            caller.close()
        figures.note(seconds, b"".join(batch), count=len(batch))


@pytest.mark.parametrize("method", METHODS)
def test_method_bears_what_it_does_not_expect(victim: Victim, method: str) -> None:
    seed = SEED ^ zlib.crc32(method.encode())
    prepared(victim)
    throw(victim, Requests(METHODS[method], prepared(victim), seed), method, 200, Figures(""), victim.token)
    name = f"{method}, {'with a token' if victim.token else 'no tokens'}"
    count = CALLS // _TOKENS_SHARE if victim.token else CALLS
    with victim.under(name) as figures:
        for done in range(0, count, _INPUTS_OF_ONE_RUN):
            requests = Requests(METHODS[method], prepared(victim), seed + 1 + done)
            throw(victim, requests, method, min(_INPUTS_OF_ONE_RUN, count - done), figures, victim.token)


def test_calls_of_nobody_are_as_harmless(victim: Victim) -> None:
    if victim.token is None:
        pytest.skip("it asks nobody")
    target = prepared(victim)
    count = min(CALLS, _INPUTS_OF_ONE_RUN)
    with victim.under("all methods, without a token") as figures:
        for number in range(CALLS // count):
            for method in METHODS:
                requests = Requests(METHODS[method], target, SEED + number)
                throw(victim, requests, method, -(-count // len(METHODS)), figures, None)
