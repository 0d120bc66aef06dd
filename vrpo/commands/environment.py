"""`vrpo env`: versions, devices and backends, for bug reports."""

import importlib.metadata
import platform
from collections.abc import Iterator

import torch

from vrpo.commands.console import say
from vrpo.models import choose_attention
from vrpo_kernels import describe
from vrpo_kernels.linear_cross_entropy.cpu import resolve_gemm

_PACKAGES = (
    "vrpo",
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "tokenizers",
    "numpy",
    "triton",
    "peft",
    "flash-attn",
)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def env() -> None:
    """Print `report`."""
    say(report())


def report() -> str:
    """What this process would run on, one `name: value` per line."""
    lines = [f"python: {platform.python_version()}", f"platform: {platform.platform()}"]
    lines += [f"{name}: {_version(name)}" for name in _PACKAGES]
    lines += _devices()
    lines += [f"kernels, {name}: {state}" for name, state in describe().items()]
    gemms = (f"{_short(dtype)} {resolve_gemm('auto', dtype)}" for dtype in _DTYPES)
    lines.append("kernels, cpu linear_cross_entropy multiplies by: " + ", ".join(gemms))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for dtype in (torch.float32, torch.bfloat16):
        name, reason = choose_attention(device, dtype)
        lines.append(f"attention, {device} {_short(dtype)}: {name} ({reason})")
    return "\n".join(lines) + "\n"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _version(package: str) -> str:
    if package == "torch":
        return torch.__version__  # the metadata of PyPI's wheels does not name the CUDA build
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> Iterator[str]:
    yield (
        f"cpu: {platform.machine()}, {torch.get_num_threads()} threads, "
        f"{torch.backends.cpu.get_cpu_capability()}"
    )
    yield f"cuda of torch: {torch.version.cuda or 'none, a CPU build'}"
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        yield (
            f"gpu {index}: {device.name}, {device.total_memory / 2**30:.0f} GiB, "
            f"compute capability {device.major}.{device.minor}"
        )
