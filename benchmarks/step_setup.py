"""What `python -m benchmarks gpu-step` runs: a model of LLaDA-8B's shape, pairs, and ways to score them.

The weights are random and made where they are used. Models are scored as the trainer scores them, with
`ModelNLL` and under autocast; the other heads and the padded layout stand for how public code does it.
"""

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vrpo.batch import PackedBatch, ResponseBatch
from vrpo.models import LLaDAConfig, LLaDAForMaskedDiffusion
from vrpo.models.adapters import add_adapter
from vrpo.training.packed_trainer import ModelNLL
from vrpo.training.precision import leave_adapter_inputs_to_autocast

LORA_RANK = 16
LORA_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
HEADS = ("fused", "full logits", "masked logits")


@dataclass(frozen=True)
class Size:
    """Sizes of model and pairs. mixed: four response lengths of two pairs, with the mean of `response`."""

    layers: int
    hidden: int
    heads: int
    mlp: int
    classes: int
    mask_token_id: int
    prompt: int
    response: int
    mixed: tuple[int, int, int, int]
    gemm: int

    @property
    def body_parameters(self) -> int:
        """Weights of the layers' matmuls: all but the embedding, the norms and the head."""
        return self.layers * (4 * self.hidden**2 + 3 * self.hidden * self.mlp)

    @property
    def upper_parameters(self) -> int:
        """Those of them that masked rows alone are multiplied with: above the attention of the last layer."""
        return self.hidden**2 + 3 * self.hidden * self.mlp


# config.json of GSAI-ML/LLaDA-8B-Instruct.
LLADA_8B = Size(32, 4096, 32, 12288, 126464, 126336, 512, 512, (128, 896, 640, 384), gemm=8192)
TINY = Size(2, 32, 4, 48, 300, 299, 8, 8, (2, 14, 10, 6), gemm=64)


def build_model(size: Size, device: str, dtype: torch.dtype) -> LLaDAForMaskedDiffusion:
    """A model with random weights (standard deviation 0.02, norms 1), drawn once and on the device."""
    config = LLaDAConfig(
        d_model=size.hidden,
        n_layers=size.layers,
        n_heads=size.heads,
        mlp_hidden_size=size.mlp,
        embedding_size=size.classes,
        max_sequence_length=4096,
        rope_theta=500000.0,
        mask_token_id=size.mask_token_id,
        attn_implementation="vrpo",
    )
    with torch.device("meta"):  # nothing is allocated, so nothing is drawn twice
        model = LLaDAForMaskedDiffusion(config).to(dtype)
    model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.ones_(parameter)
        else:
            nn.init.normal_(parameter, std=0.02, generator=generator)
    return model.requires_grad_(False)


def with_lora(model: nn.Module, layers: Iterable[int] | None = None) -> nn.Module:
    """The model with a new adapter on every linear layer but the head, put on as the trainer does it.

    layers: only those with these numbers.

    PEFT keeps the adapter's weights in float32 above a 16-bit base; what enters it is left to autocast.
    """
    from peft import LoraConfig

    config = LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules=list(LORA_LAYERS))
    if layers is not None:
        config.layers_to_transform = list(layers)
    adapted = add_adapter(model, config, seed=0)
    leave_adapter_inputs_to_autocast(adapted)
    return adapted


def checkpoint_activations(model: nn.Module, on: bool) -> None:
    """Gradient checkpointing as transformers.Trainer turns it on; the name changed in transformers 5.23."""
    verb = "enable" if on else "disable"
    newest = getattr(model, f"activation_checkpointing_{verb}", None)
    (newest or getattr(model, f"gradient_checkpointing_{verb}"))()


def make_batch(size: Size, *, mixed: bool = False, seed: int = 0, pairs: int = 1) -> ResponseBatch:
    """Pairs of `response` tokens each, or two pairs of mixed lengths; random tokens, on the CPU."""
    lengths = list(size.mixed) if mixed else [size.response] * 2 * pairs
    generator = torch.Generator().manual_seed(seed)
    tokens = []
    for pair in range(len(lengths) // 2):
        prompt = torch.randint(size.mask_token_id, (size.prompt,), generator=generator)
        for length in lengths[2 * pair : 2 * pair + 2]:
            tokens += [prompt, torch.randint(size.mask_token_id, (length,), generator=generator)]
    num_responses = len(lengths)
    return ResponseBatch(
        tokens_U=torch.cat(tokens),
        prompt_length_R=torch.full((num_responses,), size.prompt),
        response_length_R=torch.tensor(lengths),
        example_R=torch.arange(num_responses // 2).repeat_interleave(2),
        side_R=torch.arange(2).repeat(num_responses // 2),
        num_sides=2,
    )


def padded_inputs(pack: PackedBatch) -> dict[str, Tensor]:
    """The masked copies of a pack as rows of one (S, longest) batch with an attention mask."""
    length_S = pack.cu_seqlens_S1.diff().long()
    num_segments, longest = len(length_S), pack.max_seqlen
    segment_T = torch.arange(num_segments, device=length_S.device).repeat_interleave(length_S)
    place_T = segment_T * longest + pack.position_T
    ids = pack.tokens_T.new_zeros(num_segments * longest)
    ids[place_T] = pack.tokens_T
    attend = torch.zeros_like(ids)
    attend[place_T] = 1
    position = torch.arange(longest, device=ids.device).expand(num_segments, -1)
    return {
        "input_ids": ids.view(num_segments, longest),
        "attention_mask": attend.view(num_segments, longest),
        "position_ids": position,
        "rows": place_T[pack.row_N],
        "targets": pack.target_N,
    }


@dataclass
class Scorer:
    """A model as `preference_step` takes it: a pack in, nll_N (N,) float32 out.

    head: "fused" is the model's own; "full logits" makes the logits of all positions, widens them to float32
        and scores the masked ones; "masked logits" makes and widens those of the masked rows only.
    padded: a padded batch instead of a pack; it is laid out once and kept, as a collator would hand it over.
    alone: one forward pass for every sample of every response, with its full logits, as public code does it;
        `head` and `padded` do not apply.
    adapter: off for the reference of a model with LoRA.
    autocast: the dtype, or None for none.
    """

    model: nn.Module
    head: str = "fused"
    padded: bool = False
    alone: bool = False
    adapter: bool = True
    autocast: torch.dtype | None = None
    _kept: dict[str, Tensor] = field(default_factory=dict)

    def __call__(self, pack: PackedBatch) -> Tensor:
        with self._context(pack.tokens_T.device.type):
            if self.alone:
                return torch.cat(list(self._one_by_one(pack)))
            if self.head == "fused" and not self.padded:
                return ModelNLL(self.model)(pack)
            inputs = dict(self._padded(pack) if self.padded else pack.model_inputs())
            if self.head == "fused":
                return self.model(**inputs).nll
            rows, targets = inputs.pop("rows"), inputs.pop("targets")
            if self.head == "full logits":
                logits = self.model(**inputs).logits.flatten(0, 1).float()[rows]
            else:
                logits = self.model(**inputs, rows=rows).logits.float()
            return F.cross_entropy(logits, targets, reduction="none")

    def _one_by_one(self, pack: PackedBatch) -> Iterator[Tensor]:
        for first, last in itertools.pairwise(pack.cu_seqlens_S1.tolist()):
            inside = (pack.row_N >= first) & (pack.row_N < last)
            logits = self.model(input_ids=pack.tokens_T[None, first:last]).logits[0].float()
            rows, targets = pack.row_N[inside] - first, pack.target_N[inside]
            yield F.cross_entropy(logits[rows], targets, reduction="none")

    @contextlib.contextmanager
    def _context(self, device_type: str) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            if self.autocast is not None:
                stack.enter_context(torch.autocast(device_type, self.autocast))
            if not self.adapter:
                stack.enter_context(self.model.disable_adapter())
            yield

    def _padded(self, pack: PackedBatch) -> dict[str, Tensor]:
        if not self._kept:
            self._kept.update(padded_inputs(pack))
        return self._kept


def step_flops(size: Size, length_S: Tensor, num_rows: int, *, full: bool, checkpointing: bool) -> float:
    """Floating-point operations of the matmuls of one step; those of LoRA's own (1 %) are left out.

        forward of the body:  2 P T - 2 U (T - N) + sum over segments of 4 D L^2 per layer
                              (projections, less those above the last attention; attention)
        one pass of the head: 2 N D V
        body:  reference + policy + recomputation (checkpointing) + dX, whose attention counts twice, + dW if
               all weights are trained (as a forward, without attention)
        head:  reference + policy + dX, + dW if all weights are trained

    Real tokens and masked rows only: what padding, or logits of other rows, cost beyond that is overhead.
    Result files of up to 2026-11-27 count without the U: the last layer then ran on every token.
    """
    tokens = float(length_S.sum())
    projections = 2.0 * (size.body_parameters * tokens - size.upper_parameters * (tokens - num_rows))
    attention = 4.0 * size.hidden * size.layers * float((length_S.double() ** 2).sum())
    head = 2.0 * num_rows * size.hidden * size.classes
    forwards = 2 + int(checkpointing)
    body = forwards * (projections + attention) + projections * (1 + int(full)) + 2 * attention
    return body + head * (3 + int(full))
