"""What the golden trajectories start from: integers turned into floats, so that no generator's version matters.

Weights:   w[i] = (hash(0, i) mod 2001 - 1000) / 512
Gradients: g[t][i] = (hash(t, i) mod 4093 - 2046) / 1024 * 2^-(i mod 7), t = 1, 2, ...
with hash(t, i) = (1103515245 (7919 t + 104729 i + 12345) + 12345) mod 2^31 / 2^8. Every value is exact in float32.
"""

import numpy as np

PARAMETER_COUNT = 37
STEP_COUNT = 60
CHECKPOINTS = (1, 2, 5, 6, 10, 23, 30, 59, 60)


def _hash(step: int, index: int) -> int:
    return ((1103515245 * (7919 * step + 104729 * index + 12345) + 12345) % 2**31) // 2**8


def weights() -> np.ndarray:
    """The initial weights, float64."""
    return np.array([(_hash(0, i) % 2001 - 1000) / 512 for i in range(PARAMETER_COUNT)])


def gradients() -> list[np.ndarray]:
    """The gradients of steps 1, 2, ..., float64."""
    return [
        np.array([(_hash(t, i) % 4093 - 2046) / 1024 * 2.0 ** -(i % 7) for i in range(PARAMETER_COUNT)])
        for t in range(1, STEP_COUNT + 1)
    ]
