"""The optimizers of `kedge.optim` in plain NumPy and float64: slow, small, and written without a look at the server's.

The fake server's updates and a worker's local steps are made by it. It knows tensors, and neither runs nor workers.

Source: the papers and formulas that the classes of `kedge.optim` name; arXiv:1907.08610 for Lookahead.
"""

from kedge.updates.updater import Updater

__all__ = ["Updater"]
