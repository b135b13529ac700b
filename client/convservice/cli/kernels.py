"""The filters that image people know by name, and those that they bring in a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convservice.cli.arguments import load_array
from convservice.cli.outcome import CommandFailed, Exit

Kernel = NDArray[np.float32]

_BINOMIAL = np.array([1, 4, 6, 4, 1], np.float32)

KERNELS: dict[str, Kernel] = {
    "sobel-x": np.array([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]], np.float32),
    "sobel-y": np.array([[-1, -2, -1], [0, 0, 0], [1, 2, 1]], np.float32),
    "gaussian": _BINOMIAL[:, None] * _BINOMIAL / np.float32(256),
    "sharpen": np.array([[0, -1, 0], [-1, 5, -1], [0, -1, 0]], np.float32),
    "box": np.full((3, 3), 1 / 9, np.float32),
    "laplacian": np.array([[0, 1, 0], [1, -4, 1], [0, 1, 0]], np.float32),
}
"""By name, each (kh, kw): Sobel's derivatives, a binomial blur, a sharpening, a mean, a second derivative."""


def kernel_of(name: str) -> Kernel:
    """The kernel of a name, or the matrix in a `.npy` file, as float32 (kh, kw).

    Raises:
        CommandFailed: no such name or file, or the file holds no matrix of finite real numbers.
    """
    if name in KERNELS:
        return KERNELS[name]
    if not name.endswith(".npy"):
        raise CommandFailed(
            f"--kernel must be {', '.join(KERNELS)} or the name of a .npy file, not {name!r}", Exit.USAGE
        )
    loaded: NDArray[Any] = load_array(Path(name))
    if loaded.ndim != 2 or 0 in loaded.shape or loaded.dtype.kind not in "iuf":
        raise CommandFailed(
            f"a kernel is a matrix (kh, kw) of real numbers; {name} holds {loaded.dtype} of shape"
            f" {loaded.shape}",
            Exit.USAGE,
        )
    kernel = loaded.astype(np.float32)
    if not np.isfinite(kernel).all():
        raise CommandFailed(f"a kernel's weights must be finite in float32; {name} has others", Exit.USAGE)
    return kernel


def finds_edges(kernel: Kernel) -> bool:
    """Whether the kernel gives 0 on even areas, so that what it finds has either sign."""
    return bool(abs(kernel.sum(dtype=np.float64)) <= 1e-6 * np.abs(kernel).sum(dtype=np.float64))
