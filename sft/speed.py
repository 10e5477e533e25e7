"""How fast is a step, and how much of the hardware does it use."""

from __future__ import annotations

import re
import sys

import torch

# Dense bf16 tensor-core peak in FLOP/s with fp32 accumulation, from the vendors' data sheets (without sparsity).
# The first name that occurs in the device's name as whole words counts, so the longer names come first.
PEAK_BF16_FLOPS = {
    "GB300": 2500e12,
    "GB200": 2500e12,
    "B300": 2250e12,
    "B200": 2250e12,
    "B100": 1750e12,
    "GH200": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800 PCIe": 756e12,
    "H800": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "A40": 149.7e12,
    "A30": 165e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L20": 119.5e12,
    "L4": 121e12,
    "RTX PRO 6000 Blackwell Workstation Edition": 503.8e12,
    "RTX 6000 Ada Generation": 364.2e12,
    "RTX A6000": 154.8e12,
    "RTX A5000": 111.1e12,
    "RTX 5090": 209.5e12,
    "RTX 4090 D": 147e12,
    "RTX 4090": 165e12,
    "RTX 3090 Ti": 80e12,
    "RTX 3090": 71e12,
    "MI325X": 1307e12,
    "MI300X": 1307e12,
    "MI250X": 191.5e12,  # of one of its two devices
}
# slower parts of the same name, and slices of a GPU
OTHER_PARTS = re.compile(r"\b(Laptop|Mobile|Max-Q|MIG)\b")


def peak_flops(device: torch.device) -> float | None:
    """The dense bf16 peak of a GPU in FLOP/s; None for CPUs and for GPUs that the table does not hold."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    if OTHER_PARTS.search(name):
        return None
    return next((peak for known, peak in PEAK_BF16_FLOPS.items() if re.search(rf"\b{known}\b", name)), None)


def model_flops_utilisation(flops: float, seconds: float, *, world_size: int, peak: float | None) -> float | None:
    """Model FLOPs over what the devices could have done in that time; None where the peak is unknown."""
    return None if peak is None or seconds <= 0 else flops / (seconds * world_size * peak)


def compiled_graphs() -> int:
    """How many graphs torch.compile has made in this process so far."""
    dynamo = sys.modules.get("torch._dynamo.utils")  # not there where nothing was compiled; importing it takes seconds
    return 0 if dynamo is None else dynamo.counters["stats"]["unique_graphs"]


def memory_gib(device: torch.device) -> float:
    """Peak memory of this process in GiB: allocated on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss counts bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
