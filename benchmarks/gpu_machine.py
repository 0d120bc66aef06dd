"""What `make gpu` says about the machine: versions, the GPU's state before, its clocks meanwhile."""

import importlib.metadata
import os
import platform
import subprocess
import sys
import threading

from benchmarks.gpu_process import Log

PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "transformers",
    "accelerate",
    "peft",
    "pytest",
    "pytest-xdist",
    "nvidia-ml-py",
)
RIVALS = ("liger-kernel", "trl", "cut-cross-entropy", "quack-kernels", "flash-attn")


def output_of(*command: str) -> str:
    """Standard output of a command; empty if it fails, hangs or does not exist."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def has_device() -> bool:
    """True if there is a CUDA device; torch is asked (it takes seconds) where nvidia-smi is not installed."""
    if output_of("nvidia-smi", "-L"):
        return True
    return output_of(sys.executable, "-c", "import torch; print(torch.cuda.is_available())") == "True"


def describe_machine(log: Log) -> list[str]:
    """Versions, processor, and the GPU's state before anything runs; returns what of it a summary shows."""
    versions = []
    for package in (*PACKAGES, *RIVALS):
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            version = "-"
        versions.append(f"{package} {version}")
    cores = len(os.sched_getaffinity(0))
    shown = [", ".join(versions), f"Python {platform.python_version()}, {cores} cores"]
    names = "--query-gpu=name,driver_version,compute_cap,power.limit,clocks.max.sm,clocks.max.mem"
    shown += output_of("nvidia-smi", names, "--format=csv").splitlines()
    cuda = [line for line in output_of("nvidia-smi", "-q").splitlines() if line.startswith("CUDA Version")]
    shown += [" ".join(line.split()) for line in cuda]
    sections = "MEMORY,POWER,CLOCK,TEMPERATURE,PERFORMANCE"
    for line in (*shown, *output_of("nvidia-smi", "-q", "-d", sections).splitlines()):
        log.line(line, "environment")
    return shown


def watch_clocks(log: Log, stop: threading.Event, seconds: float = 5.0) -> None:
    """Clocks, power and temperature every few seconds: a GPU that throttles explains many a figure."""
    fields = "clocks.sm,clocks.mem,power.draw,temperature.gpu,memory.used"
    reasons = ["clocks_event_reasons.active", "clocks_throttle_reasons.active"]  # new and old name
    while reasons and not output_of("nvidia-smi", f"--query-gpu={reasons[0]}", "--format=csv,noheader"):
        reasons.pop(0)
    query = ",".join([fields, *reasons[:1]])
    while not stop.wait(seconds):
        found = output_of("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader")
        if not found:
            return
        log.line(found, "clocks")
