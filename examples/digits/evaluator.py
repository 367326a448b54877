"""Follows the slow weights, and says how good they are on images that nobody trains with.

The server's address is in KEDGE_ADDRESS, and open_run.py has opened the run. It goes on until it is told to stop.
"""

import signal
import sys
import time

import data
import kedge
import model

_LOOK_SECONDS = 1.0


def follow(run: kedge.Run, digits: data.Digits) -> None:
    """Prints a line whenever there are newer weights, at most one a second."""
    seen = -1
    while True:
        snapshot = run.snapshot("slow")
        if snapshot.step > seen:
            print(f"step {snapshot.step:6d}  slow weights: accuracy {model.accuracy(snapshot.slow, digits):.3f}")
            seen = snapshot.step
        time.sleep(_LOOK_SECONDS)


def main() -> None:
    """The command."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    _, test_digits = data.load()
    with kedge.connect() as client:
        follow(client.get_run(model.RUN, like=model.init()), test_digits)


if __name__ == "__main__":
    main()
