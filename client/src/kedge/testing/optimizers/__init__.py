"""The optimizers of `kedge.optim` in plain NumPy and float64: slow, small, and written without a look at the server's.

Source: the papers and formulas that the classes of `kedge.optim` name; arXiv:1907.08610 for Lookahead.
"""

from kedge.testing.optimizers.updater import Updater

__all__ = ["Updater"]
