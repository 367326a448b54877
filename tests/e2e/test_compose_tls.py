"""`make up TLS=1` for real: the same containers with certificates and tokens as secrets."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from containers import Deployment, docker, inspect, logs, wait_until, what_is_missing

import kedge

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("secrets")


@pytest.fixture(scope="module")
def deployed(secrets: Path) -> Iterator[Deployment]:
    if what_is_missing():
        pytest.skip(what_is_missing())
    deployment = Deployment("kedge-test-tls", TLS="1", WORKERS="1", STEPS="10000000", KEDGE_SECRETS=str(secrets))
    try:
        deployment.make("up")
        yield deployment
    finally:
        deployment.remove()


@pytest.fixture(autouse=True)
def times(deployed: Deployment, record_property: Callable[[str, object], None]) -> Iterator[None]:
    yield
    deployed.report(record_property)


@pytest.fixture
def connect(deployed: Deployment, secrets: Path) -> Callable[..., kedge.Client]:
    """Connects from the host with the token of a role, or without one."""

    def connect_as(role: str | None) -> kedge.Client:
        token_file = None if role is None else secrets / f"{role}.token"
        return kedge.connect(deployed.address, ca_file=secrets / "ca.pem", token_file=token_file)

    return connect_as


def reason(call: Callable[[], Any]) -> str:
    """Why a call is refused; empty if it is not."""
    try:
        call()
    except kedge.KedgeError as error:
        return error.reason
    return ""


def test_the_containers_train_and_the_host_reads(deployed: Deployment, connect: Callable[..., kedge.Client]) -> None:
    with connect("reader") as client:
        run = client.get_run("digits")
        wait_until(lambda: run.status().step >= 500, "500 steps")
        assert set(run.pull("slow")) == {"hidden.w", "hidden.b", "output.w", "output.b"}
        assert reason(lambda: client.delete_run("digits")) == "PERMISSION_DENIED"
    wait_until(lambda: "slow weights: accuracy" in logs(deployed.container("evaluator")), "the evaluator's first line")
    assert inspect(deployed.container("server"))["State"]["Health"]["Status"] == "healthy"


def test_nobody_gets_in_without_a_token_or_tls(deployed: Deployment, connect: Callable[..., kedge.Client]) -> None:
    def list_without_token() -> None:
        with connect(None) as client:
            client.list_runs()

    assert reason(list_without_token) == "UNAUTHENTICATED"
    assert reason(lambda: kedge.connect(deployed.address, timeout_seconds=5)) == "TLS_FAILED"


def test_no_secret_is_in_what_the_engine_shows(deployed: Deployment, secrets: Path) -> None:
    tokens = [path.read_text().strip() for path in secrets.glob("*.token")]
    assert len(tokens) == 3
    for container in deployed.containers():
        shown = docker("inspect", container) + logs(container)
        assert not [token for token in tokens if token in shown]
        assert "PRIVATE KEY" not in shown


def test_a_token_that_is_taken_out_in_place_ends_at_once(
    deployed: Deployment, connect: Callable[..., kedge.Client], secrets: Path
) -> None:
    tokens = secrets / "tokens"
    held = tokens.read_text()
    with connect("reader") as client:
        assert reason(client.list_runs) == ""
        try:
            tokens.write_text(
                "".join(line for line in held.splitlines(keepends=True) if not line.startswith("reader:"))
            )
            with deployed.timed("until a token that was taken out is refused"):
                wait_until(lambda: reason(client.list_runs) == "UNAUTHENTICATED", "the refusal")
        finally:
            tokens.write_text(held)
        wait_until(lambda: reason(client.list_runs) == "", "the token's return")
