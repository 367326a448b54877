"""The Beale function, the usual two-dimensional test of optimizers; its minimum is 0 at (3, 0.5)."""

import numpy as np

START = (-2.5, -2.5)


def gradient(point: np.ndarray) -> np.ndarray:
    """Of (1.5 - x + xy)^2 + (2.25 - x + xy^2)^2 + (2.625 - x + xy^3)^2, in float64."""
    x, y = float(point[0]), float(point[1])
    residuals = (1.5 - x + x * y, 2.25 - x + x * y**2, 2.625 - x + x * y**3)
    by_x = sum(2 * r * (y**k - 1) for k, r in enumerate(residuals, start=1))
    by_y = sum(2 * r * k * x * y ** (k - 1) for k, r in enumerate(residuals, start=1))
    return np.array([by_x, by_y])
