"""The GPU that is measured: the backend on it, what its driver says of it, whether it still answers."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess

from convservice_backends.cuda.backend import CudaBackend
from convservice_backends.cuda.device import Device

QUERY = {
    "driver": "driver_version",
    "SM clock": "clocks.sm",
    "at most": "clocks.max.sm",
    "power limit": "power.limit",
}
"""What is asked of nvidia-smi, by the words that the header has for it."""

VISIBLE = "CUDA_VISIBLE_DEVICES"


def backend_of(device: str) -> CudaBackend:
    """The backend on one GPU, the first of several, or on the device that stands in for one.

    PyTorch and CuPy count the visible devices alike, so that both then mean the same one.
    """
    if device == "emulator":
        found: CudaBackend = importlib.import_module("convservice_emulator.backend").EmulatorBackend()
        return found
    os.environ[VISIBLE] = os.environ.get(VISIBLE, "0").split(",")[0]
    from convservice_backends.cupy.backend import CupyBackend

    return CupyBackend()


def driver_state(bus: str) -> str:
    """The driver's release, the SM clock now and at most, the power limit, or why nobody says so.

    Args:
        bus: where the GPU is on the PCI bus.
    """
    program = shutil.which("nvidia-smi")
    if program is None:
        return "there is no nvidia-smi here"
    command = [program, f"--id={bus}", f"--query-gpu={','.join(QUERY.values())}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as exc:
        return f"nvidia-smi does not say: {exc}"
    values = done.stdout.strip().split(", ")
    if len(values) != len(QUERY):
        return " ".join(done.stdout.split())
    return ", ".join(f"{name} {value}" for name, value in zip(QUERY, values, strict=True))


def lost(device: Device, exc: BaseException) -> str:
    """Why nothing more can be had of a device after an error; empty where the next call may succeed.

    Args:
        device: the device, which knows of its own errors.
        exc: the error; PyTorch's begin with "CUDA error" where they are CUDA's, and the device does not hear
            of them.
    """
    if device.failure:
        return device.failure
    return str(exc) if "CUDA error" in str(exc) else ""
