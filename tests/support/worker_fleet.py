"""The worker processes of a test: started side by side, followed event by event, gone when the test ends."""

import contextlib
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import marking_worker
from marking_worker import Task

Event = dict[str, Any]


class Member:
    """One process of a fleet. `events` is what it has said, `log` what it has logged."""

    def __init__(self, task: Task, *, command: Sequence[str | Path], pass_fds: Sequence[int]) -> None:
        self.task = task
        self.events: list[Event] = []
        self.log: list[str] = []
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            pass_fds=pass_fds,
        )

    @property
    def steps(self) -> list[Event]:
        """What became of its contributions."""
        return self.events_called("step")

    @property
    def applied(self) -> list[Event]:
        """Those of them that became part of a step."""
        return [event for event in self.steps if event["outcome"] == "applied"]

    def events_called(self, name: str) -> list[Event]:
        return [event for event in self.events if event["event"] == name]

    def contribute(self) -> None:
        """Lets a gated worker make its next contribution."""
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    def stop(self) -> None:
        """Asks it to leave."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()

    def pause(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


class Fleet:
    """Starts processes and waits for what they say; kills what is left at its end.

    Args:
        prefix: what each command begins with, to run it elsewhere than here.
    """

    def __init__(self, prefix: Sequence[str] = ()) -> None:
        self._prefix = tuple(prefix)
        self.members: list[Member] = []
        self._changed = threading.Condition()
        self._readers: list[threading.Thread] = []

    def start(
        self,
        *tasks: Task,
        script: Path = Path(marking_worker.__file__),
        arguments: Sequence[str] = (),
        pass_fds: Sequence[int] = (),
    ) -> list[Member]:
        """Starts a process for each task."""
        started = [
            Member(task, command=[*self._prefix, sys.executable, script, task.to_json(), *arguments], pass_fds=pass_fds)
            for task in tasks
        ]
        for member in started:
            reader = threading.Thread(target=self._read, args=(member,), daemon=True)
            reader.start()
            self._readers.append(reader)
        self.members += started
        return started

    def wait_until(self, holds: Callable[[], Any], *, seconds: float = 45) -> None:
        """Waits for something that the members' events decide."""
        with self._changed:
            assert self._changed.wait_for(holds, seconds), f"it did not come to hold: {self}"

    def wait_for_step(self, step: int, members: Sequence[Member] | None = None) -> None:
        """Waits until each of the members has seen a step."""
        self.wait_until(lambda: all(m.steps and m.steps[-1]["step"] >= step for m in members or self.members))

    def finish(self, members: Sequence[Member] | None = None) -> list[int]:
        """Asks members to leave, all at once; their exit codes."""
        leaving = list(self.members if members is None else members)
        for member in leaving:
            member.stop()
        codes = [member.process.wait(timeout=30) for member in leaving]
        self.wait_until(lambda: all(member.events_called("done") or member.process.returncode for member in leaving))
        return codes

    def _read(self, member: Member) -> None:
        for line in member.process.stdout:
            with self._changed:
                if line.startswith("{"):
                    member.events.append(json.loads(line))
                else:
                    member.log.append(line)
                self._changed.notify_all()

    def __repr__(self) -> str:
        parts = [f"{m.task.name}: {m.events[-2:]} {m.log[-2:]} exit {m.process.poll()}" for m in self.members]
        return "\n".join(parts)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for member in self.members:
            member.kill()
        for reader in self._readers:
            reader.join(timeout=5)
        for member in self.members:
            member.stop()
            member.process.stdout.close()


def longest_gap(members: Sequence[Member], *, since: float | None = None, until: float | None = None) -> float:
    """The longest time, in seconds, in which one of the members saw no step.

    Each is looked at from `since`, or its first step, until `until`, or its last.
    """
    longest = 0.0
    for member in members:
        seen = [event["at"] for event in member.steps]
        begin, end = seen[0] if since is None else since, seen[-1] if until is None else until
        moments = [begin, *(at for at in seen if begin < at < end), end]
        longest = max(longest, *(later - earlier for earlier, later in pairwise(moments)))
    return longest
