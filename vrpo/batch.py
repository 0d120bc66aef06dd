"""The data that flows through a step, as frozen dataclasses whose fields carry their axes.

    pairs -> ResponseBatch -> MaskDraw -> PackedBatch -> nll_N -> elbo_RK -> score_B -> loss

Axes: B preference pairs | R responses (pairs: R = 2B in the order (pair, side), side 0 chosen and 1 rejected)
K samples of a response | S = R*K segments of a pack in the order (response, sample) | L response length
P prompt length | U clean tokens of the R sequences | T tokens of the pack | N masked rows of the pack
D hidden size | V vocabulary | S1 = S + 1 cumulative. Log-probabilities and ELBOs are in nats.
"""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class ResponseBatch:
    """R tokenised sequences, each a prompt followed by one response. Lives on the CPU.

    tokens_U: int64, the sequences one after the other, without padding.
    prompt_length_R, response_length_R: int64, both at least 1.
    example_R: int64 in [0, 2**32), the row of the dataset; it keys the mask draw.
    side_R: int64, 0 chosen (or the only completion, or a desirable one), 1 rejected (or undesirable).
    num_sides: responses per example, 2 for preference pairs and 1 for completions.
    fill_R: int64, how many tokens at the end of each response are EOS fill (SFT only, estimator/eos_fill.py);
        response_length_R counts them. None: no response has any.
    """

    tokens_U: Tensor
    prompt_length_R: Tensor
    response_length_R: Tensor
    example_R: Tensor
    side_R: Tensor
    num_sides: int
    fill_R: Tensor | None = None

    @property
    def num_examples(self) -> int:
        return len(self.example_R) // self.num_sides

    @property
    def length_R(self) -> Tensor:
        return self.prompt_length_R + self.response_length_R

    def examples(self, start: int, stop: int) -> "ResponseBatch":
        """The examples start .. stop - 1 as a batch of their own."""
        first, last = start * self.num_sides, stop * self.num_sides
        begin = int(self.length_R[:first].sum())
        end = begin + int(self.length_R[first:last].sum())
        return ResponseBatch(
            tokens_U=self.tokens_U[begin:end],
            prompt_length_R=self.prompt_length_R[first:last],
            response_length_R=self.response_length_R[first:last],
            example_R=self.example_R[first:last],
            side_R=self.side_R[first:last],
            num_sides=self.num_sides,
            fill_R=None if self.fill_R is None else self.fill_R[first:last],
        )


@dataclass(frozen=True)
class MaskDraw:
    """Which response tokens are masked in each of the S = R*K segments, and what each counts.

    The ELBO estimate of response r is (1/K) * sum over its K segments of sum_n weight_n * log p_n, so a
    weight is the L/l of the l-form, the 1/t of the t-form, or whatever the design puts in its place.

    position_N: int64, position within the response, ascending inside a segment.
    weight_N: float32.
    offsets_S1: int64, the rows of segment s are offsets_S1[s] : offsets_S1[s + 1].
    num_samples: K.
    replicate_K: sample k belongs to independent replicate replicate_K[k] of the estimator; the spread
        between replicates estimates its variance. One replicate means that K samples say nothing of it.
    """

    position_N: Tensor
    weight_N: Tensor
    offsets_S1: Tensor
    num_samples: int
    replicate_K: tuple[int, ...]


@dataclass(frozen=True)
class PackedBatch:
    """All masked copies of a batch as one variable-length sequence: no padding, no token shared.

    tokens_T, position_T: int64; positions restart at 0 in every segment.
    cu_seqlens_S1: int32, tokens of segment s are cu_seqlens_S1[s] : cu_seqlens_S1[s + 1].
    max_seqlen: the longest segment, on the host.
    row_N: int64 ascending index into T of the masked tokens; target_N: int64, what stood there.
    weight_N, offsets_S1, num_samples, replicate_K: as in MaskDraw.
    trunk_TD, trunk_layers: activations after that many of the model's lowest layers, where they are known.

    A pack may hold a run of the segments only (`segments`); its S is then no multiple of num_samples.
    """

    tokens_T: Tensor
    position_T: Tensor
    cu_seqlens_S1: Tensor
    max_seqlen: int
    row_N: Tensor
    target_N: Tensor
    weight_N: Tensor
    offsets_S1: Tensor
    num_samples: int
    replicate_K: tuple[int, ...]
    trunk_TD: Tensor | None = None
    trunk_layers: int = 0

    @property
    def num_segments(self) -> int:
        return len(self.offsets_S1) - 1

    def segments(self, start: int, stop: int) -> "PackedBatch":
        """The segments start .. stop - 1 as a pack of their own: the same tokens, masks and weights.

        On the CPU only, where reading the boundaries is free.
        """
        if (start, stop) == (0, self.num_segments):
            return self
        first_token, end_token = self.cu_seqlens_S1[start].item(), self.cu_seqlens_S1[stop].item()
        first_row, end_row = self.offsets_S1[start].item(), self.offsets_S1[stop].item()
        cu_seqlens_S1 = self.cu_seqlens_S1[start : stop + 1] - first_token
        return replace(
            self,
            tokens_T=self.tokens_T[first_token:end_token],
            position_T=self.position_T[first_token:end_token],
            cu_seqlens_S1=cu_seqlens_S1,
            max_seqlen=int(cu_seqlens_S1.diff().max()),
            row_N=self.row_N[first_row:end_row] - first_token,
            target_N=self.target_N[first_row:end_row],
            weight_N=self.weight_N[first_row:end_row],
            offsets_S1=self.offsets_S1[start : stop + 1] - first_row,
        )

    def to(self, device: torch.device | str) -> "PackedBatch":
        moved = {
            field.name: value.to(device, non_blocking=True)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **moved)

    def model_inputs(self) -> dict[str, Tensor | int]:
        """Keyword arguments of the model's forward (vrpo/models), which returns nll_N."""
        trunk = {} if self.trunk_TD is None else {"trunk_hidden": self.trunk_TD[None]}
        return trunk | {
            "input_ids": self.tokens_T[None],
            "position_ids": self.position_T[None],
            "cu_seq_lens_q": self.cu_seqlens_S1,
            "cu_seq_lens_k": self.cu_seqlens_S1,
            "max_length_q": self.max_seqlen,
            "max_length_k": self.max_seqlen,
            "rows": self.row_N,
            "targets": self.target_N,
            "trunk_layers": self.trunk_layers,
        }
