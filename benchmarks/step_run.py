"""The file of rows of a benchmark that must finish in time: whatever goes wrong is a row and not the end."""

import importlib.metadata
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.gpu_reached import print_done
from benchmarks.record import append, provenance
from benchmarks.step_setup import Size
from benchmarks.step_timing import free_memory

FIELDS = (
    *("date", "git", "device", "torch", "triton", "transformers"),
    *("case", "K", "T", "N", "attention", "head"),
    *("ms", "ms_reference", "ms_forward", "ms_backward"),
    *("tokens_per_s", "tflops", "pct_of_gemm", "peak_GiB", "score", "loss", "note"),
)


def label(case: str, num_samples: object = None) -> str:
    """Name of a row: the case, and K where a case has several."""
    return f"{case}, K = {num_samples}" if case in ("LoRA", "full") and num_samples else case


class Run:
    """The device, the sizes, the file of rows, and the time that is left."""

    def __init__(self, device: str, size: Size, dtype: torch.dtype, output: Path, seconds: float, git: str):
        self.device, self.size, self.dtype, self.output = device, size, dtype, output
        self.deadline = time.monotonic() + seconds
        self.autocast = dtype if dtype is torch.bfloat16 else None
        self.gemm_tflops: float | None = None
        self.reserved = 0.0  # seconds at the end that `attempt` leaves alone
        self._seconds: dict[int, float] = {}
        known = provenance(device)
        self.provenance = {name: known[name] for name in ("date", "git", "device", "torch", "triton")}
        self.provenance["transformers"] = importlib.metadata.version("transformers")
        if git:
            self.provenance["git"] = git

    def took(self, tokens: int, ms: float) -> None:
        """What a step of so many tokens took, for `expected`."""
        self._seconds[tokens] = 1e-3 * ms

    def expected(self, tokens: int, steps: float) -> float:
        """Seconds for so many steps, from the measured step whose size is nearest; 0 if there is none."""
        if not self._seconds:
            return 0.0
        nearest = min(self._seconds, key=lambda known: abs(known - tokens))
        return steps * self._seconds[nearest] * max(1.0, tokens / nearest)

    def row(self, case: str, **values: object) -> None:
        """One row to the file and to the screen."""
        spelled = {key: f"{v:.5g}" if isinstance(v, float) else v for key, v in values.items()}
        append([{**self.provenance, "case": case, **spelled}], self.output, FIELDS)
        print(f"[step] {case}:", *(f"{key}={value}" for key, value in spelled.items()), flush=True)
        if not str(values.get("note", "")).startswith("skipped:"):
            print_done(label(case, values.get("K")))

    def attempt(self, case: str, work: Callable[[], None], needs: float = 0.0, **columns: object) -> bool:
        """Does one item; whatever goes wrong is a row with a note. False if it was skipped or failed.

        needs: seconds it takes, as far as is known.
        """
        left = self.deadline - time.monotonic() - self.reserved
        if left < needs or left <= 0:
            self.row(case, **columns, note=f"skipped: {left:.0f} s left, it needs {needs:.0f}")
            return False
        note = ""
        try:
            work()
        except torch.OutOfMemoryError as error:
            note = f"out of memory: {_first_line(error)}"
        except Exception as error:
            traceback.print_exc()
            note = f"{type(error).__name__}: {_first_line(error)}"
        if note:  # outside of the handler, whose traceback holds the frames and so the tensors
            self.row(case, **columns, note=note)
        free_memory(self.device)
        return not note


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]
