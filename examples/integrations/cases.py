"""Every drop-in beside its formula, on the same random batch: for the tests and for the measurement."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from examples.integrations import (
    automodel,
    axolotl,
    d1,
    dare,
    diffucoder,
    dllm,
    espo,
    formulas,
    llada,
    nemo_rl,
)
from vrpo_kernels import last_hidden


@dataclass(frozen=True)
class Case:
    """name: module and variant. Both functions take a model and give the same differentiable tensor."""

    name: str
    ours: Callable[[nn.Module], Tensor]
    all_logits: Callable[[nn.Module], Tensor]


class Batch:
    """Prompts of a quarter of the length, answers that end anywhere; mask_id is also an ordinary token."""

    mask_id = 1

    def __init__(self, size: int, length: int, vocab_size: int, dtype: torch.dtype, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        shape = (size, length)
        self.tokens = torch.randint(0, vocab_size, shape, generator=generator)
        position = torch.arange(length).expand(shape)
        self.keep = length - length // 4
        ends = torch.randint(length // 2 + 1, length + 1, (size, 1), generator=generator)
        self.completion = position >= length - self.keep
        self.answer = self.completion & (position < ends)
        self.labels = torch.where(self.answer, self.tokens, -100)
        self.t = 0.2 + 0.6 * torch.rand(size, generator=generator, dtype=dtype)
        uniform = torch.rand(shape, generator=generator, dtype=dtype)
        self.half = (uniform < self.t[:, None]) & self.completion  # a part of the completion
        self.masked = self.half & self.answer  # a part of the answer
        self.p_mask = self.t[:, None].expand(shape) * (position < ends)  # 0 at the padding
        self.count = self.half.sum(1).to(dtype)

    def noised(self, masked: Tensor) -> Tensor:
        return torch.where(masked, self.mask_id, self.tokens)


def cases(batch: Batch) -> Iterator[Case]:
    """The first case of each module is the one that is measured."""
    for make in (_dllm, _d1, _llada, _diffucoder, _espo, _dare, _automodel, _nemo_rl, _axolotl):
        yield from make(batch)


def _head(model: nn.Module) -> Tensor:
    return model.get_output_embeddings().weight


def _dllm(b: Batch) -> Iterator[Case]:
    noised, weights, maskable = b.noised(b.masked), 1 / b.t, b.labels != -100
    for norm, shift in (("token", False), ("sequence", True), ("batch", False)):

        def ours(model: nn.Module, norm=norm, shift=shift) -> Tensor:
            inputs = {"input_ids": noised}
            arguments = (b.tokens, b.labels, b.masked, weights)
            return dllm.mdlm_loss(model, _head(model), inputs, *arguments, loss_norm_type=norm, shift=shift)

        def all_logits(model: nn.Module, norm=norm, shift=shift) -> Tensor:
            logits = model(noised).logits
            logits = formulas.one_later(logits) if shift else logits
            return formulas.dllm(logits, b.tokens, maskable, b.masked, weights, norm)

        yield Case(f"dllm, {norm}", ours, all_logits)


def _d1(b: Batch) -> Iterator[Case]:
    noised, unguided = b.noised(b.completion), torch.full_like(b.tokens, b.mask_id)
    unguided = torch.where(b.completion, noised, unguided)

    def ours(model: nn.Module, cfg_scale: float) -> Tensor:
        return d1.per_token_logps(
            model, _head(model), noised, b.tokens, b.keep, cfg_scale=cfg_scale, mask_id=b.mask_id
        )

    def all_logits(model: nn.Module, cfg_scale: float) -> Tensor:
        logits = model(noised).logits
        if cfg_scale > 0:
            logits = formulas.guided(logits, model(unguided).logits, cfg_scale)
        return formulas.d1(logits, b.tokens, b.keep)

    for scale in (1.5, 0.0):
        yield Case(f"d1, guidance {scale}", *(partial(f, cfg_scale=scale) for f in (ours, all_logits)))


def _llada(b: Batch) -> Iterator[Case]:
    noised = b.noised(b.half)
    unguided = torch.where(b.completion, noised, b.mask_id)
    p_mask = b.count.clamp_min(1) / b.keep

    def ours(model: nn.Module, cfg_scale: float) -> Tensor:
        guidance = {"cfg_scale": cfg_scale, "unguided_ids": unguided}
        return llada.log_likelihood(model, _head(model), noised, b.tokens, b.half, p_mask, **guidance)

    def all_logits(model: nn.Module, cfg_scale: float) -> Tensor:
        logits = model(noised).logits
        if cfg_scale > 0:
            logits = formulas.guided(logits, model(unguided).logits, cfg_scale)
        return formulas.llada(logits, b.tokens, b.half, p_mask)

    for scale in (0.0, 0.5):
        yield Case(f"llada, guidance {scale}", *(partial(f, cfg_scale=scale) for f in (ours, all_logits)))


def _diffucoder(b: Batch) -> Iterator[Case]:
    ratio = 0.4
    copies = [b.noised(masked) for masked in (b.completion, b.half, b.completion & ~b.half)]

    def ours(model: nn.Module) -> Tensor:
        arguments = (b.tokens, b.completion, b.half, ratio, b.mask_id)
        return diffucoder.coupled_logps(model, _head(model), *arguments)[:, -b.keep :]

    def all_logits(model: nn.Module) -> Tensor:
        logits = model(torch.cat(copies)).logits[:, :-1][:, -b.keep :]  # each predicts the token after it
        tokens, half = (part[:, -b.keep :] for part in (b.tokens, b.half))
        return formulas.diffucoder(*logits.chunk(3), tokens, half, ratio)

    yield Case("diffucoder", ours, all_logits)


def _espo(b: Batch) -> Iterator[Case]:
    half = b.half.clone()
    half[0] = b.completion[0]  # all masked: the complement is empty and its probability 0
    p_mask = half.sum(1).clamp_min(1).to(b.t.dtype) / (b.keep + 1)

    def ours(model: nn.Module, shift: bool) -> Tensor:
        arguments = (b.tokens, b.completion, half, p_mask, b.mask_id)
        return espo.coupled_elbo(model, _head(model), *arguments, shift=shift)

    def all_logits(model: nn.Module, shift: bool) -> Tensor:
        logits = [model(b.noised(masked)).logits for masked in (half, b.completion & ~half)]
        logits = [formulas.one_later(part) if shift else part for part in logits]
        return formulas.espo(*logits, b.tokens, b.completion, half, p_mask)

    for shift in (False, True):
        name = "espo, shift" if shift else "espo"
        yield Case(name, *(partial(f, shift=shift) for f in (ours, all_logits)))


def _dare(b: Batch) -> Iterator[Case]:
    lengths = [b.tokens.shape[1] - 2 * (i % 3) for i in range(len(b.tokens))]
    real = torch.arange(b.tokens.shape[1]) < torch.tensor(lengths)[:, None]
    bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    tokens, masked, noised = (part[real] for part in (b.tokens, b.masked, b.noised(b.masked)))

    def ours(model: nn.Module) -> Tensor:
        inputs = {"input_ids": noised[None]}
        return dare.packed_elbos(model, _head(model), inputs, tokens, masked, b.t, bounds)

    def all_logits(model: nn.Module) -> Tensor:
        (logits,) = model(noised[None]).logits
        return formulas.dare(logits, tokens, masked, b.t.tolist(), bounds.tolist())

    yield Case("dare", ours, all_logits)


def _automodel(b: Batch) -> Iterator[Case]:
    noised, count = b.noised(b.half), int(b.answer.sum())
    p_mask = b.t[:, None].expand(b.tokens.shape)

    def mdlm(model: nn.Module) -> Tensor:
        arguments = (b.tokens, b.half, p_mask, b.answer, count)
        return automodel.mdlm_loss(last_hidden(model, noised), _head(model), *arguments)

    def blocks(model: nn.Module) -> Tensor:
        hidden = last_hidden(model, noised)
        return automodel.block_diffusion_loss(hidden, _head(model), b.tokens, b.answer, softcap=1.5)

    yield Case(
        "automodel, mdlm",
        mdlm,
        lambda model: formulas.automodel(model(noised).logits, b.tokens, b.half, p_mask, b.answer, count),
    )
    yield Case(
        "automodel, blocks",
        blocks,
        lambda model: formulas.automodel_blocks(model(noised).logits, b.tokens, b.answer, 1.5),
    )


def _nemo_rl(b: Batch) -> Iterator[Case]:
    points = [b.half, b.completion & ~b.half]
    coefficients = [0.5 / 0.21, 0.5 / 0.79]

    def ours(model: nn.Module) -> Tensor:
        score = nemo_rl.score_function(model, _head(model), b.completion, b.mask_id)
        scored = zip(points, coefficients, strict=True)
        return sum(w * score(b.noised(masked), b.tokens) * masked for masked, w in scored)

    def all_logits(model: nn.Module) -> Tensor:
        logits = [model(b.noised(masked)).logits for masked in points]
        return formulas.nemo_rl(logits, b.tokens, points, coefficients)

    yield Case("nemo_rl", ours, all_logits)


def _axolotl(b: Batch) -> Iterator[Case]:
    noised = b.noised(b.masked)

    def ours(model: nn.Module, labels: Tensor | None, weigh: bool) -> Tensor:
        inputs = {"input_ids": noised}
        arguments = (b.tokens, b.masked, b.p_mask, labels)
        return axolotl.diffusion_loss(model, _head(model), inputs, *arguments, importance_weighting=weigh)[0]

    def all_logits(model: nn.Module, labels: Tensor | None, weigh: bool) -> Tensor:
        answer = None if labels is None else labels != -100
        logits = formulas.one_later(model(noised).logits)
        return formulas.axolotl(logits, b.tokens, b.masked, b.p_mask, answer, weigh)

    for labels, weigh in ((b.labels, True), (b.labels, False), (None, True), (None, False)):
        name = f"axolotl, {'all tokens' if labels is None else 'answers'}, {'1/p' if weigh else 'flat'}"
        yield Case(name, *(partial(f, labels=labels, weigh=weigh) for f in (ours, all_logits)))
