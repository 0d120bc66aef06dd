"""LLaDA on transformers' Llama layers: checkpoint names, forward with masked rows.

LLaDA (arXiv 2502.09992) is a Llama without a causal mask and with OLMo-style names. No remote code
is used: the original config.json and weights load into the classes here, and what they save carries
the original names again.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, LlamaModel
from transformers.core_model_loading import WeightRenaming
from transformers.modeling_outputs import BaseModelOutputWithPast, ModelOutput

from vrpo.models.attention import ATTENTION_NAMES, Segments
from vrpo.models.layers import Attention, LlamaDecoderLayer, RMSNorm, RotaryEmbedding
from vrpo.models.llada_config import LLaDAConfig
from vrpo.models.names import CHECKPOINT_RENAMINGS, TO_HERE, to_here
from vrpo_kernels import (
    linear_cross_entropy,
    linear_cross_entropy_replay,
    linear_cross_entropy_statistics,
)


def checkpoint_renamings() -> list[WeightRenaming]:
    """The 12 rules of `CHECKPOINT_RENAMINGS` for transformers, which also reverses them to write."""
    return [WeightRenaming(source, target) for source, target in CHECKPOINT_RENAMINGS]


def _accept_checkpoint_names(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """load_state_dict pre-hook: takes original names too, and refuses adapter weights that fit nothing.

    transformers.Trainer resumes with a plain load_state_dict(strict=False), past from_pretrained's renaming,
    and PEFT loads adapters so; without this every weight would silently stay as it was.
    """
    for name in [n for n in state_dict if n.startswith(prefix + "model.transformer.")]:
        state_dict[prefix + to_here(name.removeprefix(prefix))] = state_dict.pop(name)
    # Parameter names, not state_dict(): under FSDP that is a collective.
    both = module.named_parameters, module.named_buffers  # shared ones under each name, as RandLora has
    own = {name for named in both for name, _ in named(remove_duplicate=False)}
    if not any(".base_layer." in name or ".original_module." in name for name in own):
        return  # no adapter here
    if any("_fsdp_wrapped_module" in name or "_flat_param" in name for name in own):
        return  # FSDP1 renames parameters and fits them itself
    given = (name.removeprefix(prefix) for name in state_dict if name.startswith(prefix))
    unmatched = sorted(name for name in given if name not in own)
    if unmatched:
        raise ValueError(
            f"the adapter has {len(unmatched)} weights that fit nothing here, such as {unmatched[0]}: "
            "its config does not select these layers. vrpo.models.adapters.load_adapter reads adapters "
            "that name layers as LLaDA does"
        )


@dataclass
class MaskedDiffusionOutput(ModelOutput):
    """What one call returns: nll or logits.

    Fields:
        nll: (N,) fp32, nats; -log p(target) of each masked row (training).
        statistics: (3, N), beside nll if asked for: what a second pass needs to know (`known`).
        drift: 0-dim, beside a known nll: the largest difference between the target logits of the two passes.
        logits: (N, V) of the rows asked for, or (B, L, V), in the model's dtype. Position i predicts
            token i: no shift.
        trunk_hidden: (1, T, D), activations after the layers of the trunk, and trunk_dtype their dtype,
            which mixed precision may have widened on the way out.
    """

    nll: Tensor | None = None
    statistics: Tensor | None = None
    drift: Tensor | None = None
    logits: Tensor | None = None
    trunk_hidden: Tensor | None = None
    trunk_dtype: torch.dtype | None = None


class MaskedDiffusionHead(nn.Linear):
    """The head (V, D): logits, or the NLL of targets without logits.

    A module call and not a look at `.weight` from outside, because wrappers act on calls: accelerate makes
    the head an FSDP2 unit of its own, whose weight exists only while it runs, and PEFT's modules_to_save
    puts a copy in its place.
    """

    @classmethod
    def around(cls, linear: nn.Linear) -> "MaskedDiffusionHead":
        """A head that uses the weight of this layer: no copy, and nothing drawn from the random generators.

        Past the constructor: while transformers loads a model for DeepSpeed ZeRO-3, constructors partition
        the weights that they make, and `linear.weight` is an empty tensor.
        """
        head = cls.__new__(cls)
        nn.Module.__init__(head)
        head.in_features, head.out_features = linear.in_features, linear.out_features
        head.weight = linear.weight
        head.register_parameter("bias", None)
        return head

    def forward(
        self,
        hidden: Tensor,
        targets: Tensor | None = None,
        backend: str = "auto",
        return_statistics: bool = False,
        known: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits (..., V) of hidden (..., D), or NLLs (N,) fp32 of hidden (N, D) and targets (N,) int64.

        With return_statistics (nll, statistics), without gradient; with `known`, that pair, (nll, drift).
        """
        if targets is None:
            return super().forward(hidden)
        if return_statistics:
            return linear_cross_entropy_statistics(hidden, self.weight, targets, backend=backend)
        if known is not None:
            return linear_cross_entropy_replay(hidden, self.weight, targets, *known, backend=backend)
        return linear_cross_entropy(hidden, self.weight, targets, backend=backend)


class LLaDABody(LlamaModel):
    """Everything below the head: embedding, layers, last norm."""

    config_class = LLaDAConfig

    def __init__(self, config: LLaDAConfig):
        super().__init__(config)
        for index, layer in enumerate(self.layers):
            layer.__class__ = LlamaDecoderLayer  # has the same weights, and another forward
            layer.self_attn = Attention(config, index)
            layer.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
            layer.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self._mark_last_layer()
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(config)
        # Llama gives the embedding padding_idx = pad_token_id: that row starts at zero and never gets a
        # gradient. LLaDA's pad token is its EOS, which stands in texts like any other token.
        self.padding_idx = None
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        *args: Any,
        trunk_layers: int = 0,
        trunk_hidden: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """All layers and the norm; of a pack also the lowest `trunk_layers` alone, or those above them.

        The same bits in one go or in two. With rows=(N,) int64 among the keywords, positions in [0, B * L),
        last_hidden_state is (N, D): theirs alone.
        """
        if kwargs.get("rows") is not None:
            self._mark_last_layer()
        if not trunk_layers:
            return super().forward(input_ids, *args, **kwargs)
        if trunk_hidden is None:
            hidden = self._run_layers(self.embed_tokens(input_ids), slice(trunk_layers), **kwargs)
        else:
            if (
                self.training and torch.is_grad_enabled() and self.checkpoints_reentrantly
            ):  # that form differentiates only what its input tells it to
                trunk_hidden = trunk_hidden.detach().requires_grad_()
            upper = slice(trunk_layers, self.config.num_hidden_layers)
            hidden = self.norm(self._run_layers(trunk_hidden, upper, **kwargs))
        return BaseModelOutputWithPast(last_hidden_state=hidden)

    def _mark_last_layer(self) -> None:
        """Before each call: layers may have been left out, added or put in another order."""
        layers = self.layers[: self.config.num_hidden_layers]  # those that transformers runs
        for layer in layers:
            layer.is_last = layer is layers[-1]

    def _run_layers(
        self,
        hidden: Tensor,
        which: slice,
        position_ids: Tensor,
        segments: Segments,
        rows: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        position_embeddings = self.rotary_emb(hidden, position_ids=position_ids)
        for layer in self.layers[which]:
            hidden = layer(
                hidden,
                attention_mask=None,
                position_ids=position_ids,
                position_embeddings=position_embeddings,
                segments=segments,
                rows=rows,
            )
        return hidden

    @property
    def checkpoints_reentrantly(self) -> bool:
        layer = self.layers[-1]
        if not layer.gradient_checkpointing:
            return False
        return getattr(layer._gradient_checkpointing_func, "keywords", {}).get("use_reentrant", False)


class LLaDAForMaskedDiffusion(LlamaForCausalLM):
    """LLaDA: p(token at i | all tokens, some of them masked), for every position i at once."""

    config_class = LLaDAConfig
    # PEFT's from_pretrained reads it: adapters written for the original class find their layers here.
    _checkpoint_conversion_mapping = TO_HERE

    def __init__(self, config: LLaDAConfig):
        if getattr(config, "is_causal", True):
            raise ValueError(
                f"a masked-diffusion model needs is_causal=False, got a {config.model_type} config "
                "with a causal mask"
            )
        super(LlamaForCausalLM, self).__init__(config)  # Llama's own body would be built to be thrown away
        self.model = LLaDABody(config)
        self.vocab_size = config.vocab_size
        self.set_output_embeddings(nn.Linear(config.hidden_size, config.vocab_size, bias=False))
        self.post_init()
        self.register_load_state_dict_pre_hook(_accept_checkpoint_names)

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Makes the weight of this layer the head; resize_token_embeddings comes here too."""
        self.lm_head = MaskedDiffusionHead.around(new_embeddings)

    def enable_input_require_grads(self) -> None:
        """Lets the embedding's output require a gradient, but only for re-entrant checkpoints, which need it.

        With others, frozen lowest layers would get a graph, and be recomputed and differentiated for nothing.
        """
        if self.model.checkpoints_reentrantly:
            super().enable_input_require_grads()

    def generate(self, *args: Any, **kwargs: Any) -> None:
        """Refuses: the inherited left-to-right decoding would run and be wrong."""
        raise TypeError("LLaDA does not decode left to right: use vrpo.generation.generate")

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        rows: Tensor | None = None,
        targets: Tensor | None = None,
        backend: str = "auto",
        return_statistics: bool = False,
        known: tuple[Tensor, Tensor] | None = None,
        trunk_layers: int = 0,
        trunk_hidden: Tensor | None = None,
        **kwargs: Any,
    ) -> MaskedDiffusionOutput:
        """NLL or logits of chosen rows of a pack, or logits of padded sequences.

            nll_n = -log softmax(head hidden_{rows[n]})[targets[n]]

        The head runs in here, so DDP, FSDP and ZeRO see every parameter; call the *wrapped*
        model. With `rows`, what follows the last attention runs on N rows, and no (B, L, V) tensor exists.

        Args:
            input_ids: (1, T) int64 for a pack, (B, L) for padded sequences.
            attention_mask: (B, L), nonzero = real token, None = no padding. Not with a pack.
            position_ids: same shape as input_ids; for a pack restarting at 0 in each segment.
            inputs_embeds: instead of input_ids.
            cu_seq_lens_q, cu_seq_lens_k: (S + 1,) int32, the pack's segment boundaries, equal.
            max_length_q, max_length_k: the longest segment, tokens, equal.
            rows: (N,) int64, unique: which of the B * L (or T) positions are wanted; None = all.
            targets: (N,) int64 in [0, V): the clean token of each row; None = return logits.
            backend: of `vrpo_kernels.linear_cross_entropy`.
            return_statistics: with targets; the first pass of a replay, whose nll has no gradient.
            known: (nll, statistics) of the first pass on the same inputs; the second pass, whose head
                computes no logits in forward (`vrpo_kernels.linear_cross_entropy_replay`).
            trunk_layers, trunk_hidden: of a pack; how many of the lowest layers make up a trunk, and what
                they gave, (1, T, D). Without trunk_hidden only the trunk runs, and its activations return.
        Returns: `MaskedDiffusionOutput` with `nll` if `targets` is given, else with `logits`.
        Errors: ValueError for labels (transformers' loss shifts), targets without rows, a pack on
            an attention that would leak across segments, an adapter on the head that the fused loss
            would bypass.
        """
        if kwargs.get("labels") is not None:
            raise ValueError("labels are not supported: pass rows and targets, read .nll")
        if kwargs.get("use_cache") or kwargs.get("past_key_values") is not None:
            raise ValueError("use_cache must be False: a bidirectional model has no key-value cache")
        if rows is None and targets is not None:
            raise ValueError("targets need rows: which positions they belong to")
        body_kwargs = {key: kwargs[key] for key in ("output_hidden_states",) if key in kwargs}
        segments = self._segments(attention_mask, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)
        if segments is not None:
            body_kwargs["segments"] = segments
        if rows is not None:
            body_kwargs["rows"] = rows
        if trunk_layers:
            self._check_trunk(trunk_layers, segments)
            body_kwargs |= {"trunk_layers": trunk_layers, "trunk_hidden": trunk_hidden}
        if attention_mask is not None and self.config._attn_implementation in ATTENTION_NAMES:
            # Our attention builds no mask, so hand it a finished one, (B, 1, 1, L), True = attend.
            attention_mask = attention_mask.bool()[:, None, None, :]
        hidden = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=False,
            **body_kwargs,
        ).last_hidden_state
        if trunk_layers and trunk_hidden is None:
            return MaskedDiffusionOutput(trunk_hidden=hidden, trunk_dtype=hidden.dtype)
        if targets is None:
            return MaskedDiffusionOutput(logits=self.lm_head(hidden))
        if hasattr(self.lm_head, "base_layer"):
            raise ValueError(
                "an adapter on lm_head would be bypassed by the fused loss: leave lm_head out of "
                "target_modules, or train it whole with modules_to_save=['lm_head']"
            )
        if return_statistics:
            nll, statistics = self.lm_head(hidden, targets, backend=backend, return_statistics=True)
            return MaskedDiffusionOutput(nll=nll, statistics=statistics)
        if known is not None:
            nll, drift = self.lm_head(hidden, targets, backend=backend, known=known)
            return MaskedDiffusionOutput(nll=nll, drift=drift)
        return MaskedDiffusionOutput(nll=self.lm_head(hidden, targets, backend=backend))

    def _check_trunk(self, trunk_layers: int, segments: Segments | None) -> None:
        if segments is None:
            raise ValueError("trunk_layers need a pack: cu_seq_lens_q, cu_seq_lens_k and max_length")
        if not 0 < trunk_layers < self.config.num_hidden_layers:
            raise ValueError(
                f"trunk_layers must be in [0, {self.config.num_hidden_layers}), the model's layers, "
                f"got {trunk_layers}"
            )

    def _segments(self, attention_mask, cu_q, cu_k, max_q, max_k) -> Segments | None:
        """Boundaries of a pack, after the checks that keep segments apart; None if padded."""
        if cu_q is None and cu_k is None:
            return None
        if cu_q is None or cu_k is None or max_q is None or max_k is None or max_q != max_k:
            raise ValueError(
                "a pack needs cu_seq_lens_q = cu_seq_lens_k and max_length_q = max_length_k, all given"
            )
        if attention_mask is not None:
            raise ValueError("a pack takes no attention_mask: cu_seq_lens says who attends to whom")
        if self.config._attn_implementation not in ATTENTION_NAMES:
            raise ValueError(
                f"attention {self.config._attn_implementation!r} would let the segments of a pack see "
                f"each other; load with attn_implementation in {sorted(ATTENTION_NAMES)} or call "
                "model.set_attn_implementation('vrpo')"
            )
        return Segments(cu_q, max_q)
