"""Opens the run for workers that come and go, if it is not there yet. The server's address is in KEDGE_ADDRESS.

Where a server asks for tokens this takes an admin's; the workers then do with a worker's.
"""

import kedge
import model


def main() -> None:
    """The command."""
    with kedge.connect() as client:
        # A step is one contribution, whoever sent it: nobody waits for workers that are gone.
        run = model.open_run(client, aggregation=kedge.Asynchronous(scaling="inverse"))
        print(f"{run.name} is open, at step {run.status().step}")


if __name__ == "__main__":
    main()
