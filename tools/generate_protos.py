"""Generates ``client/src/kedge/v1`` from ``proto/kedge/v1``, or checks that it is what would be generated.

Only messages and their stubs are generated. The services are registered by hand, with serializers of their own, so no
``*_pb2_grpc.py`` is wanted. It runs in an environment that holds the oldest supported grpcio-tools, because generated
code demands at least the protobuf that it was generated for: use ``make proto`` and ``make lint``.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.resources
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROTO_ROOT = ROOT / "proto"
PACKAGE = Path("kedge/v1")
TARGET_ROOT = ROOT / "client/src"
GENERATED_PATTERNS = ("*_pb2.py", "*_pb2.pyi", "*_pb2_grpc.py")


def generate(output_root: Path) -> None:
    """Compile all protos of the package into ``output_root``.

    Args:
        output_root: The folder that is to hold ``kedge/v1``.

    Raises:
        SystemExit: When there is nothing to compile, or when the compiler finds an error, which it has printed.
    """
    from grpc_tools import protoc

    protos = sorted((PROTO_ROOT / PACKAGE).glob("*.proto"))
    if not protos:
        raise SystemExit(f"error: there are no .proto files in {(PROTO_ROOT / PACKAGE).relative_to(ROOT)}")
    arguments = [
        "protoc",
        f"--proto_path={PROTO_ROOT}",
        f"--proto_path={importlib.resources.files('grpc_tools') / '_proto'}",  # google/protobuf
        f"--proto_path={sysconfig.get_path('purelib')}",  # google/rpc
        f"--python_out={output_root}",
        f"--pyi_out={output_root}",
        *(str(proto.relative_to(PROTO_ROOT)) for proto in protos),
    ]
    if protoc.main(arguments) != 0:
        raise SystemExit("error: the protos do not compile, see above")


def generated_files(root: Path) -> dict[str, bytes]:
    """Read the generated files of the package.

    Args:
        root: The folder that holds ``kedge/v1``.

    Returns:
        Content by file name, sorted by name.
    """
    paths = [path for pattern in GENERATED_PATTERNS for path in (root / PACKAGE).glob(pattern)]
    return {path.name: path.read_bytes() for path in sorted(paths)}


def differences(wanted: dict[str, bytes], found: dict[str, bytes]) -> list[str]:
    """Say in what the checked-in files differ from what would be generated.

    Args:
        wanted: What the protos generate.
        found: What is checked in.

    Returns:
        One sentence for each file that differs.
    """
    complaints = []
    for name in sorted(wanted.keys() | found.keys()):
        path = TARGET_ROOT.relative_to(ROOT) / PACKAGE / name
        if name not in found:
            complaints.append(f"{path} is missing")
        elif name not in wanted:
            complaints.append(f"{path} comes from no .proto file")
        elif wanted[name] != found[name]:
            complaints.append(f"{path} differs from what its .proto file generates")
    return complaints


def write(wanted: dict[str, bytes], found: dict[str, bytes]) -> None:
    """Make the checked-in files equal to the wanted ones, touching only those that differ.

    Args:
        wanted: What the protos generate.
        found: What is checked in.
    """
    folder = TARGET_ROOT / PACKAGE
    folder.mkdir(parents=True, exist_ok=True)
    for name in found.keys() - wanted.keys():
        (folder / name).unlink()
    for name, content in wanted.items():
        if found.get(name) != content:
            (folder / name).write_bytes(content)


def main() -> int:
    """Run the command.

    Returns:
        The exit status: 1 when ``--check`` found a difference.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing, fail when what is checked in is not fresh")
    check: bool = parser.parse_args().check

    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(ROOT):
        generate(Path(folder))
        wanted = generated_files(Path(folder))
    found = generated_files(TARGET_ROOT)
    complaints = differences(wanted, found)

    if not check:
        write(wanted, found)
        compiler = importlib.metadata.version("grpcio-tools")
        print(f"{len(wanted)} files generated with grpcio-tools {compiler}, {len(complaints)} of them changed")
        return 0
    if complaints:
        print("error: the generated code is not fresh:", *complaints, sep="\n  ", file=sys.stderr)
        print("Run 'make proto' and commit what it changes.", file=sys.stderr)
        return 1
    print(f"generated code is fresh ({len(wanted)} files)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
