"""Small disks of a test's own, which get full, become read-only or fail. They need root."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

MIB = 1 << 20


def _run(*command: object) -> str:
    return subprocess.run([*map(str, command)], check=True, capture_output=True, text=True).stdout


@contextlib.contextmanager
def memory_disk(path: Path, size_bytes: int) -> Iterator[Path]:
    """A file system in memory (tmpfs) of so many bytes, at a path that it makes."""
    path.mkdir()
    _run("mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", path)
    try:
        yield path
    finally:
        _run("umount", "--lazy", path)


class LoopDisk:
    """An ext4 file system in a file. What is written to it takes room where the file is only then.

    Args:
        image: the file.
        path: where it is mounted.
        size_bytes: what it claims to hold, whatever there is room for.
    """

    def __init__(self, image: Path, path: Path, size_bytes: int) -> None:
        self._image, self.path = image, path
        path.mkdir()
        with image.open("wb") as file:
            file.truncate(size_bytes)
        # With its own journal: without one fdatasync may say yes and have lost what there was no room for (Linux 6.18).
        _run("mkfs.ext4", "-q", "-F", "-b", 4096, image)
        self.mount()

    def mount(self) -> None:
        _run("mount", "-o", "loop,errors=remount-ro", self._image, self.path)

    def unmount(self) -> None:
        _run("umount", self.path)

    def repair(self) -> None:
        """Unmounts it, lets the system mend it, and mounts it again."""
        self.unmount()
        code = subprocess.run(["e2fsck", "-f", "-y", self._image], check=False, capture_output=True).returncode
        assert code in (0, 1), f"e2fsck ended with {code}"
        self.mount()

    def break_down(self) -> None:
        """Has the kernel find an error in it: it is read-only from then on."""
        device = Path(_run("findmnt", "-n", "-o", "SOURCE", self.path).strip()).name
        Path("/sys/fs/ext4", device, "trigger_fs_error").write_text("1", encoding="ascii")

    def __enter__(self) -> "LoopDisk":
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(subprocess.CalledProcessError):
            self.unmount()


def obstacle(directory: Path, *, loop: bool = False) -> str:
    """Why there can be no such disks here; empty if nothing is in the way."""
    if os.geteuid() != 0:
        return "needs root to mount file systems"
    try:
        with memory_disk(directory / "probe", 8 * MIB) as path:
            if loop:
                with LoopDisk(path / "image", path / "mounted", 16 * MIB):
                    return ""
    except (OSError, subprocess.CalledProcessError) as error:
        return f"file systems cannot be mounted here: {error}"
    return ""


class Ballast:
    """A file that takes all the room there is."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / "ballast"

    def fill(self) -> None:
        """Takes what room is left, to the last byte."""
        size = MIB
        with self._path.open("ab", buffering=0) as file:
            while size:
                try:
                    file.write(b"\0" * size)
                except OSError:
                    size //= 2

    def drop(self) -> None:
        self._path.unlink()
