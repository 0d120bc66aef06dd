"""What a micro benchmark is: an operation in one mode, prepared for a device, a dtype and sizes."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sizes:
    """Problem sizes of all benchmarks.

    Attributes:
        rows, hidden, classes: N, D and V of the heads; half of 2 N tokens are masked.
        segments, length, samples: sequences of the masking ops, their tokens, corrupted copies of each.
        heads, head_size: of the rotation, over `length` positions.
    """

    rows: int
    hidden: int
    classes: int
    segments: int
    length: int
    samples: int
    heads: int
    head_size: int


SIZES = {
    "tiny": Sizes(12, 16, 150, 4, 20, 2, 2, 8),
    "cpu": Sizes(256, 512, 16384, 64, 512, 8, 8, 64),
    "cuda": Sizes(1024, 4096, 126464, 512, 4096, 8, 32, 128),
}


@dataclass(frozen=True)
class Where:
    """device ("cpu", "cuda"), dtype of floating inputs, sizes."""

    device: str
    dtype: torch.dtype
    sizes: Sizes

    def generator(self, seed: int = 0) -> torch.Generator:
        """The same numbers for every revision and every run."""
        return torch.Generator(self.device).manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0, seed: int = 0) -> Tensor:
        """Random numbers of this standard deviation, in the dtype."""
        numbers = torch.randn(*shape, generator=self.generator(seed), device=self.device)
        return (scale * numbers).to(self.dtype)

    def integers(self, below: int, *shape: int) -> Tensor:
        """Random int64 in [0, below)."""
        return torch.randint(below, shape, generator=self.generator(), device=self.device)


@dataclass(frozen=True)
class Prepared:
    """One benchmark ready to run.

    Attributes:
        run: one call, with its backward pass if the mode has one.
        check: raises AssertionError unless the operation's results are right.
    """

    run: Callable[[], object]
    check: Callable[[], None]


@dataclass(frozen=True)
class Micro:
    """One benchmark.

    Attributes:
        op: name of the operation in `vrpo_kernels`.
        mode: which form of it, and which passes.
        shape: says the sizes, for the name of the group.
        prepare: makes the inputs.
        floating: it depends on the dtype.
        needs_extension: on a CPU it runs in the C++ extension.
    """

    op: str
    mode: str
    shape: Callable[[Sizes], str]
    prepare: Callable[[Where], Prepared]
    floating: bool = True
    needs_extension: bool = False

    @property
    def name(self) -> str:
        return f"{self.op}, {self.mode}"


def synchronised(run: Callable[[], object], device: str) -> Callable[[], object]:
    """`run`, and on CUDA the wait until the device has done it."""
    if device != "cuda":
        return run

    def run_and_wait() -> object:
        result = run()
        torch.cuda.synchronize()
        return result

    return run_and_wait
