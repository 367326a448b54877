"""`kedge-server` as a person meets it: what it prints, how it refuses, how it ends."""

import itertools
import json
import os
import re
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from server_process import EXECUTABLE, ServerProcess
from wire_client import WireClient, floats, push_header, reason_of, stream, synchronous

from kedge.v1 import optimizer_service_pb2 as pb


def kedge_server(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [EXECUTABLE, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=os.environ | environment,
    )


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_it_with_exit_code_0(signal_number: int) -> None:
    server = ServerProcess()
    server.process.send_signal(signal_number)
    assert server.process.wait(timeout=30) == 0
    server.stop()


def test_open_streams_and_waiting_workers_do_not_keep_it_from_ending() -> None:
    with ServerProcess(environment={"KEDGE_SERVER__GRACE_SECONDS": "60"}) as server:
        wire = WireClient(server.address)
        run = wire.create("r", floats(1), aggregation=synchronous(2))
        leases = [wire.join(run.name), wire.join(run.name)]
        idle = wire.call("OptimizerService", "Exchange", endless())
        header = push_header(leases[0], run.manifest.digest, size_bytes=4, wait=Duration(seconds=50))
        push = stream(pb.ExchangeRequest, pb.ExchangeRequest(push=header), floats(1).tobytes())
        waiting = wire.call("OptimizerService", "Exchange", itertools.chain(push, endless()))
        while not wire.run(run.name).state.round.contribution_count:
            pass
        server.process.send_signal(signal.SIGTERM)
        for call in (idle, waiting):
            with pytest.raises(grpc.RpcError) as caught:
                next(call)
            assert reason_of(caught.value) == "SERVER_DRAINING"
        assert server.process.wait(timeout=30) == 0
        wire.close()


def endless() -> Iterator[Any]:
    """Requests that never come and never end."""
    threading.Event().wait(120)
    yield from ()


def test_address_has_a_line_of_its_own_where_the_log_goes_to_the_same_file(tmp_path: Path) -> None:
    path = tmp_path / "output"
    for _ in range(3):
        with path.open("wb") as output:
            server = subprocess.Popen(
                [EXECUTABLE, "serve", "--listen", "127.0.0.1:0"],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | {"PYTHONUNBUFFERED": "1"},
            )
        pause = threading.Event()
        while path.read_bytes().count(b"\n") < 2:
            assert server.poll() is None
            pause.wait(0.02)
        server.terminate()
        assert server.wait(timeout=30) == 0
        lines = path.read_text(encoding="utf-8").splitlines()
        assert sum(re.fullmatch(r"listening on 127\.0\.0\.1:\d+", line) is not None for line in lines) == 1


def test_port_in_use_is_refused_with_its_name(server: ServerProcess) -> None:
    second = kedge_server("serve", "--listen", server.address)
    assert second.returncode == 2
    assert server.address in second.stderr
    assert "in use" in second.stderr


@pytest.mark.parametrize("host", ["localhost", "0.0.0.0", "[::]"])
@pytest.mark.parametrize("taken", ["127.0.0.1", "::1"])
def test_port_that_another_has_at_one_address_of_the_host_is_refused(host: str, taken: str) -> None:
    try:
        other = socket.create_server((taken, 0), family=socket.AF_INET6 if ":" in taken else socket.AF_INET)
    except OSError as error:
        pytest.skip(f"{taken} is no address of this host: {error}")
    with other:
        done = kedge_server("serve", "--insecure", "--listen", f"{host}:{other.getsockname()[1]}")
    assert done.returncode == 2
    assert "in use" in done.stderr


def test_beyond_loopback_it_refuses_to_start_without_insecure() -> None:
    refused = kedge_server("serve", "--listen", "0.0.0.0:0")
    assert refused.returncode == 2
    assert "--insecure" in refused.stderr


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("[server]\nlistn = '127.0.0.1:0'\n", "server.listn"),
        ("[severs]\n", "severs"),
        ("[server]\nlisten = 'here'\n", "server.listen"),
        ("[limits]\nruns = 0\n", "limits.runs"),
        ("[limits]\nruns = 'many'\n", "limits.runs"),
        ("limits = 3\n", "limits"),
        ("[log]\nlevel = 'loud'\n", "log.level"),
        ("[server\n", "TOML"),
    ],
)
def test_bad_configuration_names_the_key(tmp_path: Path, text: str, key: str) -> None:
    path = tmp_path / "kedge.toml"
    path.write_text(text, encoding="utf-8")
    for command in (["config", "check"], ["serve"]):
        refused = kedge_server(*command, "--config", str(path))
        assert refused.returncode == 2
        assert key in refused.stderr
        assert "Traceback" not in refused.stderr


def test_missing_configuration_file_is_named() -> None:
    refused = kedge_server("config", "check", "--config", "nowhere.toml")
    assert refused.returncode == 2
    assert "nowhere.toml" in refused.stderr


def test_unknown_variable_of_the_environment_is_named() -> None:
    refused = kedge_server("config", "check", KEDGE_LIMITS__RUN="3")
    assert refused.returncode == 2
    assert "limits.run " in refused.stderr


@pytest.mark.parametrize(
    ("variable", "named"),
    [
        ("KEDGE_SERVER_LISTEN", "KEDGE_SERVER__LISTEN"),
        ("KEDGE_LEASES__MIN_SECONDS", "leases"),
        ("KEDGE_LEASES__MAX_SECONDS", "leases"),
    ],
)
def test_variable_that_would_change_nothing_or_contradict_is_refused(variable: str, named: str) -> None:
    refused = kedge_server("config", "check", **{variable: "100" if "MIN" in variable else "inf"})
    assert refused.returncode == 2
    assert named in refused.stderr


def test_version_is_told() -> None:
    assert kedge_server("--version").stdout.startswith("kedge-server ")


def test_environment_wins_over_the_file_and_arguments_over_both(tmp_path: Path) -> None:
    path = tmp_path / "kedge.toml"
    path.write_text("[limits]\nruns = 7\nworkers_per_run = 5\n", encoding="utf-8")
    shown = kedge_server("config", "show", "--config", str(path), KEDGE_LIMITS__RUNS="9")
    limits = json.loads(shown.stdout)["limits"]
    assert (limits["runs"], limits["workers_per_run"]) == (9, 5)


def test_schema_documents_every_key() -> None:
    schema = json.loads(kedge_server("config", "schema").stdout)
    for section in schema["$defs"].values():
        for name, field in section["properties"].items():
            assert field.get("description"), name
