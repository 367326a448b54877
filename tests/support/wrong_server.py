"""`kedge-server` with an optimizer that is wrong on purpose: `wrong_server.py OPTIMIZER FIELD VALUE serve ...`.

Whatever the server is asked for, every optimizer of this class that it makes has the wrong value in the field. Nothing
of the server itself is touched: its clients are to notice.
"""

import sys
from typing import Any

from kedge import optim
from kedge_server import cli


def make_wrong(kind: type[Any], field: str, value: float) -> None:
    """Lets every new instance of `kind` have this value."""
    check = kind.__post_init__

    def set_and_check(self: Any) -> None:
        object.__setattr__(self, field, value)
        check(self)

    kind.__post_init__ = set_and_check


if __name__ == "__main__":
    kind, field, value = sys.argv[1:4]
    make_wrong(getattr(optim, kind), field, float(value))
    sys.argv[1:] = sys.argv[4:]
    cli.main()
