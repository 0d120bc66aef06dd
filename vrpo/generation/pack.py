"""The sequences being denoised, laid out as one pack without padding."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Pack:
    """B prompts with their unfinished responses; with guidance a second copy with masked prompts.

    Args:
        prompts: B int64 tensors of any lengths.
        response_BG: int64, revealed tokens and masks.
        guided: whether there is the second copy.
    """

    def __init__(
        self,
        prompts: Sequence[Tensor],
        response_BG: Tensor,
        mask_token_id: int,
        guided: bool,
        device: torch.device,
    ):
        self.num_responses, self.num_new = response_BG.shape
        bodies = [torch.cat(pair) for pair in zip(prompts, response_BG, strict=True)]
        if guided:
            bodies += [
                torch.cat((torch.full_like(prompt, mask_token_id), response_G))
                for prompt, response_G in zip(prompts, response_BG, strict=True)
            ]
        lengths = torch.tensor([len(body) for body in bodies])
        ends = lengths.cumsum(0)
        self.tokens_T = torch.cat(bodies).to(device)
        self.position_T = torch.cat([torch.arange(n) for n in lengths.tolist()]).to(device)
        self.cu_S1 = torch.cat((ends.new_zeros(1), ends)).to(torch.int32).to(device)
        self.max_seqlen = int(lengths.max())
        self.start_S = (ends - self.num_new).to(device)  # where each response begins

    def _rows(self, position_BM: Tensor) -> Tensor:
        """Index into T of response positions, for every copy."""
        copies = len(self.start_S) // self.num_responses
        return self.start_S[:, None] + position_BM.repeat(copies, 1)

    def logits(self, model: Callable, position_BM: Tensor) -> Tensor:
        """(B * M, V) of the given response positions, in the model's dtype; then those of the copies."""
        return model(
            input_ids=self.tokens_T[None],
            position_ids=self.position_T[None],
            cu_seq_lens_q=self.cu_S1,
            cu_seq_lens_k=self.cu_S1,
            max_length_q=self.max_seqlen,
            max_length_k=self.max_seqlen,
            rows=self._rows(position_BM).flatten(),
        ).logits

    def write(self, position_Bn: Tensor, token_Bn: Tensor) -> None:
        """Put revealed tokens into every copy."""
        rows_Sn = self._rows(position_Bn)
        self.tokens_T[rows_Sn] = token_Bn.repeat(len(rows_Sn) // len(token_Bn), 1)

    def responses(self) -> Tensor:
        """(B, G) current responses."""
        start_B = self.start_S[: self.num_responses, None]
        return self.tokens_T[start_B + torch.arange(self.num_new, device=self.tokens_T.device)]
