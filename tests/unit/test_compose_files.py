"""The files of docker/, as far as they can be judged without an engine."""

import os
import re
import subprocess
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml
from containers import ROOT, compose_command

DOCKER = ROOT / "docker"
SCRIPT = DOCKER / "compose.sh"
COMBINATIONS = [
    tuple(extra for extra, is_wanted in zip(("gpu", "tls"), wanted, strict=True) if is_wanted)
    for wanted in product((False, True), repeat=2)
]


def configuration(extras: tuple[str, ...]) -> dict[str, Any]:
    """What Compose makes of the files; it must have nothing to say about them."""
    if not compose_command():
        pytest.skip("there is no Compose")
    files = ["compose.yaml", *(f"compose.{extra}.yaml" for extra in extras)]
    done = subprocess.run(
        [*compose_command(), *(f"--file={DOCKER / name}" for name in files), "config"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    read: dict[str, Any] = yaml.safe_load(done.stdout)
    return read


@pytest.mark.parametrize("extras", COMBINATIONS)
def test_every_combination_of_the_files_is_clean_and_closed(extras: tuple[str, ...]) -> None:
    services = configuration(extras)["services"]
    assert set(services) == {"server", "opener", "worker", "evaluator"}
    for service in services.values():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert not service.get("privileged")
    assert [name for name, service in services.items() if "ports" in service] == ["server"]
    assert "127.0.0.1" in str(services["server"]["ports"])
    assert services["opener"]["restart"] == "no"  # Compose would wait for it for ever


@pytest.mark.parametrize("extras", COMBINATIONS)
def test_it_is_insecure_only_without_tls(extras: tuple[str, ...]) -> None:
    services = configuration(extras)["services"]
    has_tls = "tls" in extras
    assert ("--insecure" in services["server"]["command"]) is not has_tls
    for service in services.values():
        files = [value for value in service.get("environment", {}).values() if value.startswith("/run/secrets/")]
        given = [secret["source"] for secret in service.get("secrets", [])]
        assert bool(given) is has_tls
        assert {Path(path).name for path in files} <= set(given)


@pytest.mark.parametrize("extras", COMBINATIONS)
def test_only_the_server_gets_the_gpu(extras: tuple[str, ...]) -> None:
    services = configuration(extras)["services"]
    with_gpu = [name for name, service in services.items() if "nvidia" in str(service.get("deploy"))]
    assert with_gpu == (["server"] if "gpu" in extras else [])
    assert (services["server"]["build"]["args"].get("JAX") == "cuda13") is ("gpu" in extras)


@pytest.mark.parametrize("lock", sorted(path.name for path in DOCKER.glob("*.lock")))
def test_the_images_hold_the_versions_that_are_tested(lock: str) -> None:
    tested, held = pinned(ROOT / "requirements.lock"), pinned(DOCKER / lock)
    # What NVIDIA's GPUs need is in no environment of a machine without one.
    only_there = {line for line in held - tested if not re.match(r"(nvidia|jax-cuda13)-", line)}
    assert only_there == set()
    assert held


def pinned(lock: Path) -> set[str]:
    return {line.split(" ")[0] for line in lock.read_text().splitlines() if "==" in line and line[0].isalnum()}


def run_script(*arguments: str, commands: dict[str, str], folder: Path) -> subprocess.CompletedProcess[str]:
    """The script where only these commands are there beside the system's; each is a line of shell."""
    for name in ("sh", "dirname"):
        (folder / name).symlink_to(f"/bin/{name}" if name == "sh" else "/usr/bin/dirname")
    for name, line in commands.items():
        (folder / name).write_text(f"#!/bin/sh\n{line}\n")
        (folder / name).chmod(0o755)
    return subprocess.run(
        [SCRIPT, *arguments],
        env={"PATH": str(folder), "HOME": os.environ.get("HOME", "/")},
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )


@pytest.mark.parametrize(
    ("commands", "said"),
    [
        ({}, "there is no docker command: install Docker"),
        ({"docker": "exit 1"}, "no Docker engine answers: start it"),
        ({"docker": '[ "$1" = info ]'}, "there is no Compose: install docker-compose"),
    ],
)
@pytest.mark.parametrize("target", ["up", "down"])
def test_what_is_missing_is_said_with_what_to_do(
    target: str, commands: dict[str, str], said: str, tmp_path: Path
) -> None:
    done = run_script(target, commands=commands, folder=tmp_path)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith(f"error: {said}")


@pytest.mark.parametrize(
    ("commands", "called"),
    [
        ({"docker": 'echo "docker $*"', "docker-compose": "exit 9"}, "docker compose"),
        ({"docker": '[ "$1" = info ]', "docker-compose": 'echo "docker-compose $*"'}, "docker-compose"),
    ],
)
def test_it_takes_the_compose_that_is_there_and_passes_on_what_is_not_its_own(
    commands: dict[str, str], called: str, tmp_path: Path
) -> None:
    done = run_script("up", "--scale", "worker=8", commands=commands, folder=tmp_path)
    assert done.stdout.splitlines()[-1] == f"{called} -f compose.yaml up --scale worker=8"
