"""What `python -m benchmarks step` compares: the step of public code, hand assemblies, and ours by technique.

Every variant is one optimizer step's arithmetic on the same pairs: reference, policy, loss, backward pass.
Ours draw and pack inside the clock; for the others the masked copies lie ready.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.step import rivals
from benchmarks.step.setup import Models
from benchmarks.step_timing import forget_gradients
from vrpo.batch import PackedBatch, ResponseBatch
from vrpo.estimator.elbo import elbo
from vrpo.gradient import JointStep, Parts, ReplayStep
from vrpo.models import LLaDAForMaskedDiffusion
from vrpo.models.adapters import is_peft_model
from vrpo.models.attention import Segments
from vrpo.objectives import preference
from vrpo.step import Estimator, split_by_tokens, split_segments
from vrpo.training.packed_trainer import ModelNLL
from vrpo.training.trunk import shared_layers, with_trunk
from vrpo_kernels import gather_rows

BY_RESPONSE = "hand, response by response"
PAPER, OURS = "paper", "graded-balanced"
MAX_TOKENS = 65536  # of a pack: the trainer's default
CACHED = 2048  # of a pack on a CPU: small ones take less memory, and up to a ninth more time
MASK_SEED = 1


@dataclass(frozen=True)
class Variant:
    """One way to take the step.

    how: "public code", "hand" (one padded batch), "hand, pair by pair", "hand, response by response" (the K
        copies of one are equally long: no padding), "ours", or "one batched pass".
    head: of ours: "full logits", "masked logits", "fused", or "rows" (what the model does by itself: fused,
        and the last layer at the masked rows only).
    design, num_samples: of the masks. trains: "all" weights, or the "top" half of the layers.
    reference: "computed" or "known". replay: two passes, pack by pack. max_tokens: of a pack of ours.
    baseline: the variant with whose gradient its own has to agree.
    """

    how: str
    head: str = "rows"
    design: str = PAPER
    num_samples: int = 8
    trains: str = "all"
    reference: str = "computed"
    share_trunk: bool = False
    replay: bool = False
    max_tokens: int = MAX_TOKENS
    baseline: str = "public code"


def ladder(num_samples: int, fewer: int, max_tokens: int) -> dict[str, Variant]:
    """From public code to everything, one technique after the other: K samples, and fewer of better masks.

    max_tokens: of a pack, from "+ small packs" on.
    """
    paper = {"num_samples": num_samples}
    small = {**paper, "max_tokens": max_tokens}
    ours = {**small, "design": OURS, "num_samples": fewer, "baseline": "public code, our masks"}
    top = {**ours, "trains": "top", "baseline": "public code, our masks, upper half"}
    return {
        "public code": Variant("public code", **paper),
        "hand assembly": Variant("hand", "masked logits", **paper),
        "hand assembly, pair by pair": Variant("hand, pair by pair", "masked logits", **paper),
        "hand assembly, response by response": Variant(BY_RESPONSE, "masked logits", **paper),
        "packed": Variant("ours", "full logits", **paper),
        "+ masked rows": Variant("ours", "masked logits", **paper),
        "+ fused head": Variant("ours", "fused", **paper),
        "+ last layer at masked rows": Variant("ours", **paper),
        "+ small packs": Variant("ours", **small),
        "replay": Variant("ours", **small, replay=True),
        "+ reference known": Variant("ours", **small, reference="known"),
        "public code, our masks": Variant("public code", **ours),
        "+ better masks": Variant("ours", **ours),
        "+ better masks, reference known": Variant("ours", **ours, reference="known"),
        "public code, our masks, upper half": Variant("public code", **top),
        "+ better masks, upper half": Variant("ours", **top, share_trunk=True),
    }


def batched(num_samples: int, max_tokens: int) -> dict[str, Variant]:
    """LoRA: policy and reference in one pass, its adapter on in one half of the pack."""
    return {"one batched pass": Variant("one batched pass", num_samples=num_samples, max_tokens=max_tokens)}


def dpo_losses(policy_RK: Tensor, reference_RK: Tensor) -> Tensor:
    """loss_B, as the trainer computes it without its SFT term."""
    return preference.dpo_loss(preference.preference_score(policy_RK, reference_RK, rivals.BETA))


def below_adapter(model: nn.Module) -> LLaDAForMaskedDiffusion:
    """The model itself, whose layers carry the adapter if there is one."""
    return model.get_base_model() if is_peft_model(model) else model


@dataclass
class Stepper:
    """Takes the step of one variant; its gradient lies in the model afterwards."""

    variant: Variant
    models: Models
    batch: ResponseBatch
    known_RK: Tensor | None = field(default=None, init=False)

    @cached_property
    def estimator(self) -> Estimator:
        variant = self.variant
        return Estimator(
            self.models.size.mask_token_id, variant.num_samples, variant.design, 1, seed=MASK_SEED
        )

    @cached_property
    def drawn(self) -> PackedBatch:
        """All masked copies, on the CPU."""
        return self.estimator.pack(self.batch, 0, "cpu")

    @cached_property
    def laid_out(self) -> list[list[rivals.Padded]]:
        """Padded batches by micro-batch: for public code, one for each sample and side."""
        pairs, K = self.batch.num_examples, self.variant.num_samples
        if self.variant.how == "public code":
            groups = [[[(2 * b + side) * K + k for b in range(pairs)] for k in range(K) for side in (0, 1)]]
        elif self.variant.how == "hand":
            groups = [[list(range(2 * K * pairs))]]
        elif self.variant.how == "hand, pair by pair":
            groups = [[list(range(2 * K * b, 2 * K * (b + 1)))] for b in range(pairs)]
        else:
            groups = [[list(range(K * r, K * (r + 1))) for r in (2 * b, 2 * b + 1)] for b in range(pairs)]
        return [[rivals.padded(self.drawn, g, self.models.device) for g in group] for group in groups]

    def prepare(self) -> None:
        """What the clock must not see: the layout of the others, the reference where it is known."""
        if self.variant.how not in ("ours", "one batched pass"):
            _ = self.laid_out
        if self.variant.reference == "known":
            self.known_RK = torch.cat([self._reference(pack) for pack in self._packs()])

    def __call__(self) -> None:
        """One step."""
        forget_gradients(self.models.model)
        with self.models.autocast():
            for loss in self._losses():
                with torch.autocast(self.models.device, enabled=False):
                    loss.backward()

    def _losses(self) -> Iterator[Tensor]:
        if self.variant.how == "ours":
            yield from self._our_losses()
        elif self.variant.how == "one batched pass":
            yield from self._batched_losses()
        else:
            for batches in self.laid_out:
                with self.models.reference() as reference:
                    reference_RK = self._by_response(reference, batches)
                yield rivals.dpo_loss(self._by_response(self.models.model, batches), reference_RK)

    def _by_response(self, model: nn.Module, batches: list[rivals.Padded]) -> Tensor:
        base = below_adapter(model)
        head = "full logits" if self.variant.how == "public code" else self.variant.head
        parts = [rivals.elbos(base, batch, head=head) for batch in batches]
        if self.variant.how != "public code":
            return torch.cat(parts).view(-1, self.variant.num_samples)
        # Parts in the order (sample, side), each over the pairs: (K, 2, B) -> (B, 2, K).
        elbo_K2B = torch.stack(parts).view(self.variant.num_samples, 2, -1)
        return elbo_K2B.permute(2, 1, 0).flatten(0, 1)

    def _packs(self) -> Iterator[PackedBatch]:
        """Micro-batches of whole pairs, as the trainer cuts and draws them."""
        for part in split_by_tokens(self.batch, self.variant.num_samples, self.variant.max_tokens):
            yield self.estimator.pack(part, 0, "cpu")

    def _reference(self, pack: PackedBatch) -> Tensor:
        with self.models.reference() as model, self.models.autocast():
            moved = pack.to(self.models.device)
            return elbo(self._nll(model, moved), moved)

    def _nll(self, model: nn.Module, pack: PackedBatch) -> Tensor:
        head = self.variant.head
        if head == "rows":
            return ModelNLL(model)(pack)
        base, rows, targets = below_adapter(model), pack.row_N, pack.target_N
        hidden_TD = base.model(
            input_ids=pack.tokens_T[None],
            position_ids=pack.position_T[None],
            segments=Segments(pack.cu_seqlens_S1, pack.max_seqlen),
            use_cache=False,
        ).last_hidden_state[0]
        if head == "full logits":
            return F.cross_entropy(base.lm_head(hidden_TD)[rows].float(), targets, reduction="none")
        hidden_ND = gather_rows(hidden_TD, rows)
        if head == "masked logits":
            return F.cross_entropy(base.lm_head(hidden_ND).float(), targets, reduction="none")
        return base.lm_head(hidden_ND, targets)

    def _our_losses(self) -> Iterator[Tensor]:
        variant, device, done = self.variant, self.models.device, 0

        def policy(pack: PackedBatch) -> Tensor:
            return self._nll(self.models.model, pack)

        def reference(pack: PackedBatch) -> Tensor:
            with self.models.reference() as model:
                return self._nll(model, pack)

        trunk = shared_layers(self.models.model, self.models.frozen, True) if variant.share_trunk else 0

        def prepare(pack: PackedBatch) -> PackedBatch:
            pack = pack.to(device)
            return with_trunk(self.models.model, pack, trunk) if trunk else pack

        for pack in self._packs() if not variant.replay else [self.drawn]:
            known = None
            if self.known_RK is not None:
                count = pack.num_segments // pack.num_samples
                known, done = self.known_RK[done : done + count], done + count
            nll = ModelNLL(self.models.model) if variant.head == "rows" else policy
            parts = Parts(nll, reference, dpo_losses, prepare, known)
            if not variant.replay:
                yield JointStep(parts, pack).share(0)
                continue
            step = ReplayStep(parts, split_segments(pack, self.variant.max_tokens))
            yield from (step.share(index) for index in range(step.num_shares))

    def _batched_losses(self) -> Iterator[Tensor]:
        for pack in self._packs():
            both = twice(pack).to(self.models.device)
            with adapter_in_first_half(self.models.model):
                nll_policy, nll_reference = ModelNLL(self.models.model)(both).chunk(2)
            pack = pack.to(self.models.device)
            reference_RK = elbo(nll_reference.detach(), pack)
            yield dpo_losses(elbo(nll_policy, pack), reference_RK).sum()


def twice(pack: PackedBatch) -> PackedBatch:
    """A pack that holds the segments of another two times, one after the other."""
    num_tokens, num_rows = len(pack.tokens_T), len(pack.row_N)
    return replace(
        pack,
        tokens_T=pack.tokens_T.repeat(2),
        position_T=pack.position_T.repeat(2),
        cu_seqlens_S1=torch.cat([pack.cu_seqlens_S1, pack.cu_seqlens_S1[1:] + num_tokens]),
        row_N=torch.cat([pack.row_N, pack.row_N + num_tokens]),
        target_N=pack.target_N.repeat(2),
        weight_N=pack.weight_N.repeat(2),
        offsets_S1=torch.cat([pack.offsets_S1, pack.offsets_S1[1:] + num_rows]),
    )


@contextlib.contextmanager
def adapter_in_first_half(model: nn.Module) -> Iterator[None]:
    """LoRA's share of each layer counts for the first half of the tokens (or rows) only."""

    def silence(_: nn.Module, __: object, output: Tensor) -> Tensor:
        half = output.shape[-2] // 2
        return torch.cat([output[..., :half, :], torch.zeros_like(output[..., half:, :])], dim=-2)

    handles = [
        layer.register_forward_hook(silence) for name, layer in model.named_modules() if ".lora_B." in name
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
