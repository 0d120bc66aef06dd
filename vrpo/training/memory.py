"""Memory of a run, measured. Units: GB of 10^9 bytes."""

import resource
import sys

import torch


def peak_memory_gb(device: torch.device) -> float:
    """The most memory this process has held: tensors on a CUDA device, the resident set elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
