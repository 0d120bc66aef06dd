"""The matrix products of a forward pass by themselves: what the arithmetic of a step takes at the least."""

import torch

from benchmarks.step_setup import Size


class BareProducts:
    """torch.mm on random operands, each weight its own, as in linear layers; outputs are there before.

    tokens: rows of the seven products of a layer. rows: rows of the head.
    """

    def __init__(self, size: Size, tokens: int, rows: int, device: str, dtype: torch.dtype):
        self.size, self.tokens, self.rows = size, tokens, rows
        generator = torch.Generator(device).manual_seed(0)

        def operands(rows: int, inputs: int, outputs: int) -> tuple[torch.Tensor, ...]:
            options = {"generator": generator, "device": device, "dtype": dtype}
            left, weight = torch.randn(rows, inputs, **options), torch.randn(outputs, inputs, **options)
            return left, weight.t(), left.new_empty(rows, outputs)

        hidden, mlp = size.hidden, size.mlp
        shapes = [(hidden, hidden)] * 4 + [(hidden, mlp)] * 2 + [(mlp, hidden)]
        self._layer = [operands(tokens, *shape) for shape in shapes]
        self._head = operands(rows, hidden, size.classes)

    def layer(self) -> None:
        """q, k, v, o, gate, up, down."""
        for left, right, out in self._layer:
            torch.mm(left, right, out=out)

    def head(self) -> None:
        """The logits of all rows."""
        left, right, out = self._head
        torch.mm(left, right, out=out)

    def gflops(self, layer_ms: float, head_ms: float) -> float:
        """GFLOP/s of one forward pass, from the times of both."""
        body = 2e-9 * self.size.body_parameters * self.tokens
        head = 2e-9 * self.rows * self.size.hidden * self.size.classes
        return 1e3 * (body + head) / (self.size.layers * layer_ms + head_ms)
