"""What the distributions promise: the client needs no JAX, and the folders of the repository are no packages."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


@pytest.mark.parametrize("folder", ["client", "server"])
def test_folders_of_the_repository_cannot_be_imported(folder: str) -> None:
    assert importlib.util.find_spec(folder) is None


@pytest.mark.slow
def test_client_wheel_installs_and_imports_where_there_is_no_jax(tmp_path: Path) -> None:
    environment = os.environ | {"UV_SYSTEM_CERTS": os.environ.get("UV_SYSTEM_CERTS", "true")}
    environment.pop("PYTHONPATH", None)

    def run(*command: object) -> str:
        done = subprocess.run(
            [str(part) for part in command], capture_output=True, text=True, cwd=tmp_path, env=environment, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, ROOT / "client")
    (wheel,) = tmp_path.glob("kedge-*.whl")
    python = tmp_path / "env" / "bin" / "python"
    run(BIN / "uv", "venv", "--python", sys.executable, tmp_path / "env")
    run(BIN / "uv", "pip", "install", "--python", python, wheel)
    code = """
import importlib.util, sys
assert importlib.util.find_spec("jax") is None and importlib.util.find_spec("kedge_server") is None
import kedge, numpy as np
with kedge.testing.FakeServer() as server, kedge.connect(server.address) as client:
    run = client.create_run("r", params={"w": np.zeros(2, np.float32)}, optimizer=kedge.optim.SGD(lr=1.0),
                            aggregation=kedge.Synchronous(1))
    with run.join() as worker:
        worker.pull()
        print(worker.step({"w": np.ones(2, np.float32)})["w"].tolist())
"""
    assert run(python, "-c", code).strip() == "[-1.0, -1.0]"
