"""Trains a small network on handwritten digits: one server, four workers, one of which does not live to see the end.

    python examples/digits/demo.py

Everything is real: processes of their own, gRPC between them, SIGKILL. A third of the way in a worker is killed and
another one joins; the others go on as soon as that one contributes, or when the lost worker's lease has expired.
"""

import argparse
import signal
import sys
import time
from pathlib import Path

from safetensors.numpy import save_file

import data
import display
import kedge
import model
from fleet import Fleet, ProcessCrashedError
from watch import Progress

_POLL_SECONDS = 0.25
_SYNCS_PER_EVALUATION = 25
_OUTPUT = Path(__file__).parent / "out" / "digits-slow.safetensors"


class Demo:
    """One training from beginning to end."""

    def __init__(self, fleet: Fleet, test_digits: data.Digits, *, worker_count: int, steps: int) -> None:
        self._fleet = fleet
        self._worker_count = worker_count
        self._steps = steps
        self._test_digits = test_digits
        self._next_evaluation = 0
        self._killed = ""
        self.progress = Progress()

    def train(self, client: kedge.Client, screen: display.Display) -> None:
        """Starts the workers, and watches until they have finished."""
        run = model.open_run(client, aggregation=kedge.Synchronous(quorum=self._worker_count))
        for index in range(self._worker_count):
            self._start_worker(index, part=index)
        while self._fleet.is_training():
            self._fleet.check()
            self._look(run)
            screen.show(self.progress)
            time.sleep(_POLL_SECONDS)
        self._fleet.check()
        self._finish(run)
        screen.show(self.progress)

    def _look(self, run: kedge.Run) -> None:
        self.progress.update(run.status())
        if self.progress.sync_count >= self._next_evaluation:
            self._evaluate(run)
            self._next_evaluation = self.progress.sync_count + _SYNCS_PER_EVALUATION
        victim = _worker_name(self._worker_count // 2)
        is_time = max(1, self._steps // 3) <= self.progress.step < self._steps
        if is_time and not self._killed and self._fleet.is_running(victim):
            self._replace(victim)

    def _evaluate(self, run: kedge.Run) -> None:
        snapshot = run.snapshot()
        self.progress.fast = model.accuracy(snapshot.fast, self._test_digits)
        self.progress.slow = model.accuracy(snapshot.slow, self._test_digits)

    def _replace(self, victim: str) -> None:
        self._killed = victim
        self._fleet.kill(victim)
        self.progress.kill(victim)
        self._start_worker(self._worker_count, part=self._worker_count // 2)
        self.progress.tell(f"{_worker_name(self._worker_count)} starts and takes over its part of the images")

    def _start_worker(self, index: int, *, part: int) -> None:
        self._fleet.start_worker(_worker_name(index), part=part, parts=self._worker_count, steps=self._steps)

    def _finish(self, run: kedge.Run) -> None:
        self.progress.update(run.status())
        for index in range(self._worker_count + bool(self._killed)):
            name = _worker_name(index)
            if name != self._killed:
                self.progress.finish(name, self._fleet.counts(name))
        self._evaluate(run)


def main() -> int:
    """The command; returns the exit code."""
    arguments = _parse_arguments()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        with Fleet() as fleet:
            _run(fleet, arguments)
    except ProcessCrashedError as crash:
        print(crash, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: every process of the demo has ended", file=sys.stderr)
        return 130
    return 0


def _run(fleet: Fleet, arguments: argparse.Namespace) -> None:
    fleet.start_server()
    _, test_digits = data.load()
    address = fleet.wait_for_server()
    print(f"a server listens on {address}; {arguments.workers} workers start", flush=True)
    demo = Demo(fleet, test_digits, worker_count=arguments.workers, steps=arguments.steps)
    # Brief retries: this client only watches, and a server that has died is to be shown at once.
    with kedge.connect(address, retry_seconds=2) as client:
        try:
            with display.make(plain=arguments.plain) as screen:
                demo.train(client, screen)
            _report(client, demo.progress, arguments.output)
        except kedge.KedgeError:
            fleet.check()
            raise


def _report(client: kedge.Client, progress: Progress, output: Path) -> None:
    run = client.get_run(model.RUN)
    status = run.status()
    print("\n" + "\n".join(display.summary(progress)))
    print(f"the run counts {status.applied_count} contributions applied in {status.step} steps")
    output.parent.mkdir(parents=True, exist_ok=True)
    save_file(run.pull("slow"), output, metadata={"step": str(status.step)})
    print(f"the slow weights are in {output}")
    print(f"slow weights: accuracy {progress.slow:.3f}")


def _worker_name(index: int) -> str:
    return f"worker-{index + 1}"


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train on handwritten digits against a server on this machine.")
    parser.add_argument("--workers", type=_count, default=4, help="how many begin; also the run's quorum")
    parser.add_argument("--steps", type=_count, default=2500, help="fast updates to make")
    parser.add_argument("--output", type=Path, default=_OUTPUT, help="where the slow weights go, as safetensors")
    parser.add_argument("--plain", action="store_true", help="print lines, also on a terminal")
    return parser.parse_args()


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
