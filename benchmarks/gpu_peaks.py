"""What GPUs can do at best, by their maker's word and as found here: what a measured rate is a share of.

`peaks_of` is given a device's name as the driver has it and hands on its `Peaks`, or None for a model that is
not listed. Dense rates, without sparsity, products accumulated in float32, boost clock. `measured_peaks` is
given PyTorch and hands on what its largest products and copies reach on this device, at the clock that its
power allows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.gpu_arrays import TorchArrays
from benchmarks.gpu_clocks import FEWER_REPEATS, Ask, Clock

SIDE = 8192
"""Rows and columns of the matrices whose product is measured."""

COPY_BYTES = 2 << 30
"""Of the copy that is measured: far more than a cache holds."""


@dataclass(frozen=True)
class Peaks:
    """One model.

    Attributes:
        pattern: words that its name must contain.
        rates: precision as in the table to TFLOP/s of the unit that is made for it.
        bandwidth: of device memory, GB/s.
        source: where the figures are from.
    """

    pattern: tuple[str, ...]
    rates: dict[str, float]
    bandwidth: float
    source: str

    def rate(self, precision: str) -> float | None:
        """TFLOP/s of the unit for a precision; None where it has none."""
        return self.rates.get(precision)


def _rates(float32: float, tf32: float | None, half: float, bfloat16: float | None) -> dict[str, float]:
    found = {"float32": float32, "float16": half}
    if tf32 is not None:
        found["tf32"] = tf32
    if bfloat16 is not None:
        found["bfloat16"] = bfloat16
    return found


PEAKS = (
    Peaks(("H200",), _rates(66.9, 494.7, 989.4, 989.4), 4800, "NVIDIA H200 datasheet, SXM"),
    Peaks(("H100", "PCIe"), _rates(51.2, 378, 756, 756), 2000, "NVIDIA H100 datasheet, PCIe"),
    Peaks(("H100", "NVL"), _rates(60, 417.5, 835.5, 835.5), 3900, "NVIDIA H100 datasheet, NVL"),
    Peaks(("H100",), _rates(66.9, 494.7, 989.4, 989.4), 3350, "NVIDIA H100 datasheet, SXM"),
    Peaks(("A100", "40GB"), _rates(19.5, 156, 312, 312), 1555, "NVIDIA A100 datasheet, 40 GB"),
    Peaks(("A100", "PCI"), _rates(19.5, 156, 312, 312), 1935, "NVIDIA A100 datasheet, 80 GB PCIe"),
    Peaks(("A100",), _rates(19.5, 156, 312, 312), 2039, "NVIDIA A100 datasheet, 80 GB SXM"),
    Peaks(("RTX 4090",), _rates(82.6, 82.6, 165.2, 165.2), 1008, "NVIDIA Ada architecture whitepaper"),
    Peaks(("T4",), _rates(8.1, None, 65, None), 320, "NVIDIA T4 datasheet"),
    Peaks(("L4",), _rates(30.3, 60, 121, 121), 300, "NVIDIA L4 datasheet, without sparsity"),
)
"""The first whose words are all in a name is taken."""


def peaks_of(name: str) -> Peaks | None:
    """The peaks of a device by the name that its driver gives it."""
    words = name.replace("-", " ").split()
    for peaks in PEAKS:
        if all(_named(part, name, words) for part in peaks.pattern):
            return peaks
    return None


def _named(part: str, name: str, words: list[str]) -> bool:
    """Whether a name has these words: whole ones where they are short, so that an L40 is no L4."""
    return part in words if len(part) < 3 else part in name


def measured_peaks(
    arrays: TorchArrays, clock: Clock, dtypes: dict[str, str], *, side: int = SIDE, nbytes: int = COPY_BYTES
) -> dict[str, float]:
    """TFLOP/s of a product of matrices in each precision, and GB/s of a copy as "memory": the best of three.

    Args:
        arrays: PyTorch's, on the device.
        clock: of its work.
        dtypes: precision to the dtype of its tensors; "tf32" alone allows TF32.
        side: rows and columns of the matrices.
        nbytes: of what is copied; it is read and written.
    """
    torch, device, found = arrays.torch, arrays.device, dict[str, float]()
    for precision, name in dtypes.items():
        torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        kind = getattr(torch, name)
        a, b = (torch.randn(side, side, device=device).to(kind) for _ in range(2))
        out = torch.empty_like(a)
        seconds = clock.times(_product(torch, a, b, out), 1, FEWER_REPEATS).fastest
        found[precision] = 2 * side**3 / seconds / 1e12
    source, target = (torch.zeros(nbytes, dtype=torch.uint8, device=device) for _ in range(2))
    seconds = clock.times(lambda _: target.copy_(source), 1, FEWER_REPEATS).fastest
    found["memory"] = 2 * nbytes / seconds / 1e9
    return found


def _product(torch: Any, a: Any, b: Any, out: Any) -> Ask:
    def ask(_: int) -> None:
        torch.matmul(a, b, out=out)

    return ask
